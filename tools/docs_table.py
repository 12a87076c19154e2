"""Writes the README's table of methods from the methods' docstrings and docs/results/toy.json.

python tools/docs_table.py [--check]

With --check nothing is written, and the exit code is 1 where the README's table is out of date.
"""

import ast
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from launch._command import arguments, main

ROOT = Path(__file__).parents[1]
BEGIN = "<!-- methods: python tools/docs_table.py -->"
END = "<!-- end of methods -->"


def rows() -> list[str]:
    """The lines of the table, a method each."""
    path = ROOT / "docs/results/toy.json"
    measured = json.loads(path.read_text()) if path.exists() else []
    out = [
        "| method | paper | toy claim: value / bound x baseline, by seed | holds |",
        "|---|---|---|---|",
    ]
    for file in sorted((ROOT / "jaxdistill/methods").rglob("[!_]*.py")):
        text = ast.get_docstring(ast.parse(file.read_text())) or ""
        number = re.search(r"arXiv:(\d{4}\.\d{5})", text)
        paper = (
            f"[{number[1]}](https://arxiv.org/abs/{number[1]})" if number else ""
        )
        claim, holds = _measured(
            [row for row in measured if row["method"] == file.stem]
        )
        link = f"[`{file.stem}`]({file.relative_to(ROOT)})"
        out.append(f"| {link} {_title(text)} | {paper} | {claim} | {holds} |")
    return out


def _measured(seeds: list[dict]) -> tuple[str, str]:
    """(claim, how often it holds) of a method, from the results of its seeds."""
    if not seeds:
        return "", ""
    first = seeds[0]
    sign = {"lower": "≤", "higher": "≥"}[first["better"]]
    ratios = ", ".join(_ratio(row) for row in seeds)
    claim = f"{first['metric']}: {ratios} {sign} {first['bound']:g}"
    return claim, f"{sum(row['holds'] for row in seeds)} of {len(seeds)}"


def _ratio(row: dict) -> str:
    """The ratio of a run, or that it diverged."""
    return "diverges" if row["ratio"] is None else f"{row['ratio']:.3g}"


def _title(text: str) -> str:
    """The title in a docstring: its first paragraph up to "arXiv", or else its first sentence."""
    head = " ".join(text.split("\n\n")[0].split())
    title = head.split("arXiv")[0] if "arXiv" in head else head.split(". ")[0]
    title = title.rstrip(" .:,(")
    still_open = title.count("(") - title.count(")")
    return title + ")" * still_open


def docs_table(argv: list[str]) -> None:
    values, _ = arguments(argv, {"check": False})
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, rest = text.split(BEGIN)
    fresh = (
        f"{before}{BEGIN}\n" + "\n".join(rows()) + f"\n{END}{rest.split(END)[1]}"
    )
    if values["check"]:
        sys.exit(int(fresh != text))
    readme.write_text(fresh)


if __name__ == "__main__":
    main(docs_table)
