"""Ablations of methods on their toys, on several seeds: the toy's run against one with a change.

A toy config states its changes as `ABLATIONS`, name -> the words of a command line:
`"method.gan_weight=0"` is an override, `":random"` a variant. Inner runs (teacher, baseline) whose
configs do not change are those of the toy's own run.
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
    module = importlib.import_module(f"configs.toy.{path.stem}")
    return getattr(module, "ABLATIONS", {})


def toy(
    path: Path, seed: int, data_seed: int, change: Iterable[str] = ()
) -> ConfigDict:
    """The toy's config with these seeds, and with a change. Raises Refused."""
    words = list(change)
    variant = "".join(word for word in words if word.startswith(":"))
    overrides = [f"seed={seed}", f"data.seed={data_seed}"]
    overrides += [word for word in words if not word.startswith(":")]
    argv = [
        f"--config={path}{variant}",
        *(f"--config.{word}" for word in overrides),
    ]
    _, config = arguments(argv, {"config": ""})
    return config


def run(
    toys: Mapping[str, Path], pairs: list[tuple[int, int]], workdir: Path
) -> Path:
    """Makes the missing runs and writes docs/results/ablations.json and .md.

    Args:
        toys: Name of a toy -> its config's file.
        pairs: (seed of the weights, seed of the data).
        workdir: The folder of the runs.

    Returns:
        The page.

    Raises:
        Refused: No toy has ABLATIONS.
    """
    todo = [
        (name, seeds) for name, path in toys.items() if of(path) for seeds in pairs
    ]
    if not todo:
        first = next(iter(toys))
        raise Refused(
            f"--ablations --only={','.join(toys)}: no ABLATIONS in configs/toy/{first}.py"
        )
    for name, (seed, data_seed) in tqdm(todo, desc="ablations", unit="toy"):
        path = toys[name]
        run_name = f"{name}_{seed}_{data_seed}"
        unchanged = toy(path, seed, data_seed)
        known: dict[str, Path] = {}
        models = loop.run(unchanged, workdir / run_name, known=known)["models"]
        for change, words in of(path).items():
            changed = toy(path, seed, data_seed, words)
            folder = workdir / "ablations" / run_name / _slug(change)
            claim = report.claim(
                {**unchanged.claim, "metric": changed.claim.metric}, models
            )
            changed_claim = loop.run(changed, folder, known=known)["claim"]
            row = {
                "method": name,
                "change": change,
                "words": list(words),
                "seed": seed,
                "data_seed": data_seed,
                **{k: claim[k] for k in ("metric", "better", "value", "ratio")},
                "changed_value": changed_claim["value"],
                "changed_ratio": changed_claim["ratio"],
            }
            rows = keep(OUT, [row], "method", "change", "seed", "data_seed")
            OUT.with_suffix(".md").write_text(PAGE + table(rows) + "\n")
    return OUT.with_suffix(".md")


def _slug(change: str) -> str:
    """The name of a change as that of a folder."""
    return "".join(c if c.isalnum() else "_" for c in change)


def table(rows: list[dict]) -> str:
    """A table in Markdown with one line for each change, and the values of all seeds in it."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["change"]), []).append(row)
    head = (
        "method",
        "change",
        "config",
        "metric",
        "as it stands",
        "changed",
        "worse",
    )
    return markdown_table(head, [_line(group) for group in groups.values()])


def _line(rows: list[dict]) -> list[str]:
    """The cells of one change; `rows` are those of its seeds."""
    first = rows[0]
    sign = {"lower": 1, "higher": -1}[first["better"]]
    worse = sum(sign * (row["changed_value"] - row["value"]) > 0 for row in rows)
    return [
        first["method"],
        first["change"],
        f"`{' '.join(first['words'])}`",
        f"{first['metric']} ({first['better']} is better)",
        ", ".join(number(row["value"]) for row in rows),
        ", ".join(number(row["changed_value"]) for row in rows),
        f"{worse} of {len(rows)}",
    ]


if __name__ == "__main__":
    main(no_command, __doc__)
