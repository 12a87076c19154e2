import builtins
from pathlib import Path

import pytest

from configs.plans import dit_xl2
from jaxdistill.core import sharding
from jaxdistill.core.types import Refused
from jaxdistill.run import loop
from jaxdistill.run.experiment import Experiment
from tests.run import tiny
from tools import bench


def test_chunked_divergence_takes_a_quarter_of_the_memory_and_gives_the_same():
    """At a vocabulary of 152 k. Memory is what the compiler states of the programs, not a
    measurement.
    """
    row = bench.divergences(dim=16, tokens=64)
    assert row["vocab"] == 152_064 and row["memory_ratio"] <= 1 / 4, row
    assert row["value_apart"] <= 1e-5 and row["gradient_apart"] <= 1e-5, row


def test_without_trl_it_says_so(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "trl":
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(Refused, match="--trl: needs torch, transformers and trl"):
        bench.bench(["--trl"])


def test_unknown_case():
    with pytest.raises(Refused, match="did you mean 'divergence'"):
        bench.bench(["--case=divergense"])


@pytest.mark.full
def test_alone_has_a_row_for_every_pattern_of_turns(monkeypatch):
    """Utilisation is flops over seconds and the chip's peak, where the chip is in the table."""
    case = bench.Case(tiny.get_config("bare"))
    chip = bench.chips.chip("h100")
    for known in (None, chip):
        monkeypatch.setattr(bench.chips, "of", lambda kind, known=known: known)
        with sharding.use(case.experiment.mesh, case.experiment.settings.rules):
            rows = bench.alone(case, steps=2, rounds=3, trace="")
        assert [row["turns"] for row in rows] == ["0+1", "0"]
        for row, by_role in zip(rows, case.programs.patterns.values(), strict=True):
            assert (
                row["lowest"] <= row["ms"] <= row["highest"]
                and row["planned_GiB"] > 0
            )
            assert row["model_Tflop"] == sum(by_role.values()) / 1e12 > 0
            if known:
                assert row["mfu_%"] == pytest.approx(
                    100 * row["model_Tflop"] * 1e12 / (row["ms"] / 1e3) / chip.flops
                )
        assert ("mfu_%" in rows[0]) == (known is not None)
    # warmed up and timed, every step on the state of the one before
    assert int(case.state.step) == 2 * 2 * (3 + 2 * 3)


def test_the_plan_of_xl2_is_the_published_network():
    """DiT-XL/2 has 675 M weights and 118.6 billion multiply-adds a sample (arXiv:2212.09748, table
    1). In a step of sCM the teacher runs forward once on a batch of 32.
    """
    config = dit_xl2.get_config("scm")
    experiment = Experiment(config, Path("unused"))
    with sharding.use(experiment.mesh, experiment.settings.rules):
        programs, nets = loop.abstract_programs(experiment)
    assert nets["teacher"].size == pytest.approx(675e6, rel=0.01)
    (by_role,) = programs.patterns.values()
    # with its guidance: twice
    assert by_role["teacher"] == pytest.approx(32 * 2 * 118.6e9 * 2, rel=0.02)
