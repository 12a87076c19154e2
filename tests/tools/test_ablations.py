"""Ablations: every change builds and changes something; runs that a change does not affect are not
trained again; the table counts seeds.
"""

import json

import pytest

from jaxdistill.core.types import Refused
from jaxdistill.run import loop
from jaxdistill.run.experiment import Experiment
from tools import ablations
from tools.reproduce import TOYS

CHANGES = [
    (name, change) for name, path in TOYS.items() for change in ablations.of(path)
]


@pytest.mark.parametrize("name, change", CHANGES)
def test_every_change_builds(name, change, tmp_path):
    plain, other = (
        ablations.toy(TOYS[name], 1, 2, words)
        for words in ((), ablations.of(TOYS[name])[change])
    )
    assert (
        other.seed == 1
        and other.data.seed == 2
        and other.claim.better == plain.claim.better
    )
    assert other.to_json() != plain.to_json()
    method = Experiment(other, tmp_path).method
    roles = Experiment(other, tmp_path).roles
    assert set(method.inits) <= set(roles)


def report(value: float):
    rows = [
        {"name": "student", "nfe": 1, "energy": value},
        {"name": "teacher", "nfe": 1, "energy": 2.0},
    ]
    return {
        "models": rows,
        "claim": {
            "metric": "energy",
            "better": "lower",
            "value": value,
            "ratio": value / 2.0,
        },
    }


def test_a_run_knows_what_is_finished_and_counts_what_is_worse(
    tmp_path, monkeypatch
):
    """DisBack's toy with a shorter path may link to the finished runs of its own seed, not of
    another. The page states on how many seeds it was worse.
    """
    seen = []

    def run(config, folder, known):
        shorter = config.method.record_every == 20
        seen.append(
            (shorter, config.seed, [path.parent for path in known.values()])
        )
        known[loop.identity(config.runs.teacher)] = folder / "teacher"
        return report(0.3 if shorter and config.seed else 0.1 if shorter else 0.2)

    monkeypatch.setattr(loop, "run", run)
    monkeypatch.setattr(ablations, "OUT", tmp_path / "ablations.json")
    monkeypatch.setattr(
        ablations,
        "of",
        lambda path: {"a shorter path": ("method.record_every=20",)},
    )
    page = ablations.run(
        {"disback": TOYS["disback"]}, [(0, 0), (1, 1)], tmp_path / "runs"
    )
    own = [tmp_path / "runs" / f"disback_{seed}_{seed}" for seed in (0, 1)]
    assert seen == [
        (False, 0, []),
        (True, 0, [own[0]]),
        (False, 1, []),
        (True, 1, [own[1]]),
    ]
    rows = json.loads((tmp_path / "ablations.json").read_text())
    assert [(r["seed"], r["value"], r["changed_value"]) for r in rows] == [
        (0, 0.2, 0.1),
        (1, 0.2, 0.3),
    ]
    line = page.read_text().strip().splitlines()[-1]
    assert (
        "a shorter path" in line
        and "0.2, 0.2" in line
        and "0.1, 0.3" in line
        and line.endswith("| 1 of 2 |")
    )


def test_a_toy_whose_config_names_no_changes_is_refused(tmp_path):
    with pytest.raises(
        Refused, match=r"--only=kd: no ABLATIONS in configs/toy/kd.py"
    ):
        ablations.run({"kd": TOYS["kd"]}, [(0, 0)], tmp_path)
