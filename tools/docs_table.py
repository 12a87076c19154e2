"""Writes the README's table of methods from the methods' docstrings and docs/results/toy.json.

python tools/docs_table.py [--check]

With --check it writes nothing; the exit code is 1 where the README's table is another.
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
    path = ROOT / "docs/results/toy.json"
    measured = json.loads(path.read_text()) if path.exists() else []
    out = [
        "| method | paper | toy claim: value / bound x baseline, by seed | holds |",
        "|---|---|---|---|",
    ]
    for file in sorted((ROOT / "jaxdistill/methods").rglob("[!_]*.py")):
        text = ast.get_docstring(ast.parse(file.read_text())) or ""
        number = re.search(r"arXiv:(\d{4}\.\d{5})", text)
        paper = f"[{number[1]}](https://arxiv.org/abs/{number[1]})" if number else ""
        mine = [row for row in measured if row["method"] == file.stem]
        sign = {"lower": "≤", "higher": "≥"}
        ratios = ", ".join(f"{row['ratio']:.3g}" for row in mine)
        claim = (
            f"{mine[0]['metric']}: {ratios} {sign[mine[0]['better']]} {mine[0]['bound']:g}"
            if mine
            else ""
        )
        holds = f"{sum(row['holds'] for row in mine)} of {len(mine)}" if mine else ""
        link = f"[`{file.stem}`]({file.relative_to(ROOT)})"
        title = _title(text).rstrip(" .:,(")
        title += ")" * (title.count("(") - title.count(")"))
        out.append(f"| {link} {title} | {paper} | {claim} | {holds} |")
    return out


def _title(text: str) -> str:
    """What a docstring says before its first "arXiv", in its first paragraph; else its first
    sentence.
    """
    head = " ".join(text.split("\n\n")[0].split())
    return head.split("arXiv")[0] if "arXiv" in head else head.split(". ")[0]


def docs_table(argv: list[str]) -> None:
    """Writes the table; with --check the exit code is 1 where it is another than the README's, and
    nothing is written.
    """
    values, _ = arguments(argv, {"check": False})
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, rest = text.split(BEGIN)
    fresh = f"{before}{BEGIN}\n" + "\n".join(rows()) + f"\n{END}{rest.split(END)[1]}"
    if values["check"]:
        sys.exit(int(fresh != text))
    readme.write_text(fresh)


if __name__ == "__main__":
    main(docs_table)
