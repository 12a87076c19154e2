"""What each part of a method is worth on its toy: the toy's own run against one with a part
changed, on several seeds.

A toy config states its changes as `ABLATIONS`, name -> the words of a command line:
`"method.gan_weight=0"` is an override, `":random"` a variant. Nested runs (teacher, baseline) that
a change leaves alone are those of the toy's own run.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from ml_collections import ConfigDict
from tqdm import tqdm

from jaxdistill.core.types import Refused
from jaxdistill.run import loop, report
from jaxdistill.run.table import markdown_table, number
from launch._command import arguments, main, no_command
from tools.suites import keep

OUT = Path(__file__).parents[1] / "docs/results/ablations.json"
PAGE = """# Ablations of the toys, measured

`python tools/reproduce.py --ablations` writes this page. Each line is one change to a toy config
(`configs/toy`); values are those of the toy's claim, as the config stands and with the change, for
each pair of seeds (weights, data) in turn. The papers have every change for the worse, but where
its name says otherwise. Worse is the number of seeds on which it was so here.

"""


def of(path: Path) -> dict[str, tuple[str, ...]]:
    """The changes that a toy config names."""
    return getattr(importlib.import_module(f"configs.toy.{path.stem}"), "ABLATIONS", {})


def toy(path: Path, seed: int, data_seed: int, change: Iterable[str] = ()) -> ConfigDict:
    """The toy's config with these seeds, and with a change. Raises Refused."""
    variant = "".join(word for word in change if word.startswith(":"))
    words = [
        f"seed={seed}",
        f"data.seed={data_seed}",
        *(word for word in change if not word.startswith(":")),
    ]
    return arguments(
        [f"--config={path}{variant}", *(f"--config.{word}" for word in words)], {"config": ""}
    )[1]


def run(toys: Mapping[str, Path], pairs: list[tuple[int, int]], workdir: Path) -> Path:
    """Runs what is missing, writes docs/results/ablations.json and .md; returns the page. Raises
    Refused.
    """
    todo = [(name, seeds) for name, path in toys.items() if of(path) for seeds in pairs]
    if not todo:
        raise Refused(
            f"--ablations --only={','.join(toys)}: no ABLATIONS in"
            f" configs/toy/{next(iter(toys))}.py"
        )
    for name, (seed, data_seed) in tqdm(todo, desc="ablations", unit="toy"):
        path = toys[name]
        run_name = f"{name}_{seed}_{data_seed}"
        plain = toy(path, seed, data_seed)
        whole = workdir / run_name
        known: dict[str, Path] = {}
        models = loop.run(plain, whole, known=known)["models"]
        for change, words in of(path).items():
            other = toy(path, seed, data_seed, words)
            folder = workdir / "ablations" / run_name / _slug(change)
            claim = report.claim({**plain.claim, "metric": other.claim.metric}, models)
            without = loop.run(other, folder, known=known)["claim"]
            row = {
                "method": name,
                "change": change,
                "words": list(words),
                "seed": seed,
                "data_seed": data_seed,
                **{k: claim[k] for k in ("metric", "better", "value", "ratio")},
                "changed_value": without["value"],
                "changed_ratio": without["ratio"],
            }
            rows = keep(OUT, [row], "method", "change", "seed", "data_seed")
            OUT.with_suffix(".md").write_text(PAGE + table(rows) + "\n")
    return OUT.with_suffix(".md")


def _slug(change: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in change)


def table(rows: list[dict]) -> str:
    """One line for each change, seeds in turn."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["change"]), []).append(row)
    lines = []
    for (name, change), mine in groups.items():
        sign = {"lower": 1, "higher": -1}[mine[0]["better"]]
        each = lambda key, mine=mine: ", ".join(number(row[key]) for row in mine)
        worse = sum(sign * (row["changed_value"] - row["value"]) > 0 for row in mine)
        lines.append(
            [
                name,
                change,
                f"`{' '.join(mine[0]['words'])}`",
                f"{mine[0]['metric']} ({mine[0]['better']} is better)",
                each("value"),
                each("changed_value"),
                f"{worse} of {len(mine)}",
            ]
        )
    head = ("method", "change", "config", "metric", "as it stands", "changed", "worse")
    return markdown_table(head, lines)


if __name__ == "__main__":
    main(no_command, __doc__)
