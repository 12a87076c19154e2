"""What each part of a method is worth on its toy: the toy's own run against one with a part changed, on several seeds.

A toy config states its changes as `ABLATIONS`, name -> the words of a command line: `"method.gan_weight=0"` is an override,
`":random"` a variant. Nested runs (teacher, baseline) that a change leaves alone are taken from the toy's own run.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from ml_collections import ConfigDict
from tqdm import tqdm

from jaxdistill.core import loop, report
from jaxdistill.core.checkpoint import write_json
from launch._command import load_config, override
from tools.suites import kept

OUT = Path(__file__).parents[1] / "docs/results/ablations.json"
PAGE = """# Ablations of the toys, measured

`python tools/reproduce.py --ablations` writes this page. Each line is one change to a toy config (`configs/toy`); value and ratio are
those of the toy's claim, as the config stands and with the change, for each pair of seeds (weights, data) in turn. The papers
have every change for the worse, but where its name says otherwise. Worse is the number of seeds on which it was so here.

"""


def of(path: Path) -> dict[str, tuple[str, ...]]:
    """The changes that a toy config names."""
    return getattr(importlib.import_module(f"configs.toy.{path.stem}"), "ABLATIONS", {})


def changed(path: Path, words: Iterable[str], seed: int, data_seed: int) -> ConfigDict:
    """The toy's config with a change. Raises Refused."""
    variant = "".join(word for word in words if word.startswith(":"))
    config = load_config(f"{path}{variant}")
    for word in words:
        if not word.startswith(":"):
            key, _, value = word.partition("=")
            override(config, key, value)
    config.seed, config.data.seed = seed, data_seed
    return config


def run(toys: Mapping[str, Path], pairs: list[tuple[int, int]], workdir: Path) -> Path:
    """Runs what is missing, writes docs/results/ablations.json and .md; returns the page. Raises Refused."""
    todo = [(name, pair, change, words) for name in toys for pair in pairs for change, words in of(toys[name]).items()]
    rows = []
    for name, (seed, data_seed), change, words in tqdm(todo, desc="ablations", unit="run"):
        plain = changed(toys[name], (), seed, data_seed)
        whole = workdir / f"{name}_{seed}_{data_seed}"
        models = loop.run(plain, whole)["models"]
        other, folder = changed(toys[name], words, seed, data_seed), workdir / "ablations" / f"{name}_{seed}_{data_seed}" / _slug(change)
        claim = report.claim({**plain.claim, "metric": other.claim.metric}, models)
        take(whole, folder, plain, other)
        without = loop.run(other, folder)["claim"]
        rows.append({"method": name, "change": change, "words": list(words), "seed": seed, "data_seed": data_seed,
                     **{k: claim[k] for k in ("metric", "better", "value", "ratio")},
                     "changed_value": without["value"], "changed_ratio": without["ratio"]})  # fmt: skip
        write_json(OUT, kept(OUT, rows, "method", "change", "seed", "data_seed"))
        OUT.with_suffix(".md").write_text(PAGE + table(kept(OUT, [], "method", "change", "seed", "data_seed")) + "\n")
    return OUT.with_suffix(".md")


def take(whole: Path, folder: Path, plain: ConfigDict, other: ConfigDict) -> None:
    """Copies the finished runs inside `whole` that the other config has too."""
    for name, inner in other.runs.items():
        same = name in plain.runs and inner.to_json() == plain.runs[name].to_json()
        if same and (whole / name / "report.json").exists() and not (folder / name).exists():
            shutil.copytree(whole / name, folder / name)


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
        each = lambda key, mine=mine: ", ".join(report.number(row[key]) for row in mine)
        worse = sum(sign * (row["changed_value"] - row["value"]) > 0 for row in mine)
        lines.append([name, change, f"`{' '.join(mine[0]['words'])}`", f"{mine[0]['metric']} ({mine[0]['better']} is better)",
                      each("value"), each("changed_value"), f"{worse} of {len(mine)}"])  # fmt: skip
    head = ("method", "change", "config", "metric", "as it stands", "changed", "worse")
    return report.markdown_table(head, lines)
