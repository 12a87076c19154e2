"""Runs the toy configs on several seeds and writes the table of their claims, or a suite's table.

python tools/reproduce.py [--only=dmd2,scm] [--seeds=0,1,2] [--data_seeds=0,1,2] \\
    [--workdir=runs/reproduce]
python tools/reproduce.py --ablations [--only=dmd2,scm] [--seeds=0,1,2] [--data_seeds=0,1,2] \\
    [--workdir=runs/reproduce]
python tools/reproduce.py --suite=digits [--only=dmd2,scm] [--seeds=0,1,2] \\
    [--workdir=runs/digits] [--config.key=value ...]

Run i takes config.seed and config.data.seed from the i-th members of both lists. Finished runs are
not repeated, so that the command may be stopped and run again. Results are written to
runs/reproduce/results.json and docs/results/toy.md; those of a suite (tools/suites.py) to
docs/results/<suite>.md, .json and .png; and ablations (tools/ablations.py) to
docs/results/ablations.md and .json.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tqdm import tqdm

from jaxdistill.core.types import Refused, lookup
from jaxdistill.run.checkpoint import write_json
from jaxdistill.run.table import markdown_table, number
from launch._command import arguments, main
from tools import ablations, suites

ROOT = Path(__file__).parents[1]
TOYS = {p.stem: p for p in sorted((ROOT / "configs/toy").glob("[!_]*.py"))}
HEAD = """# Toy claims, measured

`python tools/reproduce.py` writes this page. Each line is one run: a method's toy config
(`configs/toy`) with this seed of weights and this seed of the mixture or language. Value and
baseline are the two sides of the claim that the config states. A run whose loss stops being finite
has no value, and its claim does not hold.

"""


KEYS = (
    "method",
    "seed",
    "data_seed",
    "metric",
    "value",
    "baseline",
    "teacher",
    "ratio",
    "bound",
    "holds",
    "seconds",
)


def suite(values, argv):
    """Runs every method of one suite and prints the page."""
    seeds = _seeds(values["seeds"])
    only = [name for name in values["only"].split(",") if name]
    extra = [word for word in argv if word.startswith("--config.")]
    workdir = Path(values["workdir"] or ROOT / "runs" / values["suite"])
    print(suites.run(values["suite"], only, seeds, workdir, extra))


def _seeds(text: str) -> list[int]:
    """The integers of a list. Raises Refused."""
    try:
        return [int(s) for s in text.split(",")]
    except ValueError as error:
        raise Refused(
            f"seeds={text}: expected a list of integers, as in 0,1,2"
        ) from error


def reproduce(argv):
    defaults = {
        "suite": "",
        "ablations": False,
        "only": "",
        "seeds": "0,1,2",
        "data_seeds": "0,1,2",
        "workdir": "",
    }
    values, _ = arguments(
        [word for word in argv if not word.startswith("--config.")], defaults
    )
    if values["suite"]:
        return suite(values, argv)
    if any(word.startswith("--config.") for word in argv):
        raise Refused("--config.key=value goes with --suite=NAME")
    workdir = Path(values["workdir"] or ROOT / "runs/reproduce")
    names = values["only"].split(",") if values["only"] else list(TOYS)
    toys = {name: lookup(TOYS, name, "--only") for name in names}
    seeds = _seeds(values["seeds"])
    data_seeds = _seeds(values["data_seeds"])
    if len(seeds) != len(data_seeds):
        raise Refused(
            "--seeds and --data_seeds: expected two lists of one length, as in 0,1,2"
        )
    pairs = list(zip(seeds, data_seeds))
    if values["ablations"]:
        print(ablations.run(toys, pairs, workdir))
        return
    results = _run_toys(toys, pairs, workdir)
    write_json(workdir / "results.json", results)
    kept = suites.keep(
        ROOT / "docs/results/toy.json", results, "method", "seed", "data_seed"
    )
    cells = [[_cell(row[key]) for key in KEYS] for row in kept]
    table = markdown_table([key.replace("_", " ") for key in KEYS], cells)
    page = ROOT / "docs/results/toy.md"
    page.write_text(HEAD + table + "\n")
    print(page)


def _run_toys(
    toys: dict[str, Path], pairs: list[tuple[int, int]], workdir: Path
) -> list[dict[str, Any]]:
    """Runs each toy with each pair of seeds; returns a row of results for each run."""
    from jaxdistill.run import loop, metrics

    todo = [(name, pair) for name in toys for pair in pairs]
    results = []
    for name, (seed, data_seed) in tqdm(todo, desc="reproduce", unit="run"):
        config = ablations.toy(toys[name], seed, data_seed)
        row = {"method": name, "seed": seed, "data_seed": data_seed}
        try:
            report = loop.run(config, workdir / f"{name}_{seed}_{data_seed}")
        except metrics.NonFinite as error:
            tqdm.write(f"{name}, seed {seed}: {error}", file=sys.stderr)
            diverged = dict.fromkeys(KEYS[3:]) | {
                "metric": config.claim.metric,
                "value": f"diverges at step {error.step}",
                "bound": config.claim.ratio,
                "better": config.claim.better,
                "holds": False,
            }
            results.append(row | diverged)
            continue
        row["seconds"] = report["seconds"]
        results.append(row | report["claim"])
    return results


def _cell(value: Any) -> str:
    """A value in the table."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    return number(value)


if __name__ == "__main__":
    main(reproduce)
