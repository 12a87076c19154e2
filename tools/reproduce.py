"""Runs the toy configs on several seeds and writes the table of what their claims measured; or a
suite's fair table.

python tools/reproduce.py [--only=dmd2,scm] [--seeds=0,1,2] [--data_seeds=0,1,2] \\
    [--workdir=runs/reproduce]
python tools/reproduce.py --ablations [--only=dmd2,scm] [--seeds=0,1,2] [--data_seeds=0,1,2] \\
    [--workdir=runs/reproduce]
python tools/reproduce.py --suite=digits [--only=dmd2,scm] [--seeds=0,1,2] \\
    [--workdir=runs/digits] [--config.key=value ...]

Run i takes config.seed and config.data.seed from the i-th of each list. Finished runs are read
back, so it may be stopped and run again. The results are runs/reproduce/results.json and
docs/results/toy.md; a suite's (tools/suites.py) are docs/results/<suite>.md, .json and .png, and
those of the toys with parts changed (tools/ablations.py) docs/results/ablations.md and .json.
"""

import sys
from pathlib import Path

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
baseline are the two sides of the claim that the config states.

"""


def suite(values, argv):
    """Every method of one suite."""
    seeds = _seeds(values["seeds"])
    extra = [word for word in argv if word.startswith("--config.")]
    workdir = Path(values["workdir"] or ROOT / "runs" / values["suite"])
    print(
        suites.run(
            values["suite"], [n for n in values["only"].split(",") if n], seeds, workdir, extra
        )
    )


def _seeds(text: str) -> list[int]:
    try:
        return [int(s) for s in text.split(",")]
    except ValueError as error:
        raise Refused(f"seeds={text}: expected a list of integers, as in 0,1,2") from error


def reproduce(argv):
    defaults = {
        "suite": "",
        "ablations": False,
        "only": "",
        "seeds": "0,1,2",
        "data_seeds": "0,1,2",
        "workdir": "",
    }
    values, _ = arguments([word for word in argv if not word.startswith("--config.")], defaults)
    if values["suite"]:
        return suite(values, argv)
    if any(word.startswith("--config.") for word in argv):
        raise Refused("--config.key=value goes with --suite=NAME")
    values["only"], values["workdir"] = (
        values["only"] or ",".join(TOYS),
        values["workdir"] or str(ROOT / "runs/reproduce"),
    )
    names = [n for n in values["only"].split(",") if lookup(TOYS, n, "--only")]
    seeds = _seeds(values["seeds"])
    data_seeds = _seeds(values["data_seeds"])
    if len(seeds) != len(data_seeds):
        raise Refused("--seeds and --data_seeds: expected two lists of one length, as in 0,1,2")
    pairs = list(zip(seeds, data_seeds))
    if values["ablations"]:
        return print(ablations.run({n: TOYS[n] for n in names}, pairs, Path(values["workdir"])))
    from jaxdistill.run import loop

    results = []
    for name, (seed, data_seed) in tqdm(
        [(n, p) for n in names for p in pairs], desc="reproduce", unit="run"
    ):
        report = loop.run(
            ablations.toy(TOYS[name], seed, data_seed),
            Path(values["workdir"]) / f"{name}_{seed}_{data_seed}",
        )
        results.append(
            {
                "method": name,
                "seed": seed,
                "data_seed": data_seed,
                "seconds": report["seconds"],
                **report["claim"],
            }
        )
    write_json(Path(values["workdir"]) / "results.json", results)
    keys = (
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
    every = suites.keep(ROOT / "docs/results/toy.json", results, "method", "seed", "data_seed")
    cell = lambda v: (
        "" if v is None else {True: "yes", False: "**no**"}[v] if isinstance(v, bool) else number(v)
    )
    table = markdown_table(
        [k.replace("_", " ") for k in keys], [[cell(row[k]) for k in keys] for row in every]
    )
    (ROOT / "docs/results/toy.md").write_text(HEAD + table + "\n")
    print(ROOT / "docs/results/toy.md")


if __name__ == "__main__":
    main(reproduce)
