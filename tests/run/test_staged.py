"""Stages that measure, make records, keep running statistics and train a part of a network.

Each can be killed and resumed bit for bit.
"""

import json

import jax
import numpy as np
import pytest

from jaxdistill.core.types import Refused
from jaxdistill.run import calibrate, collect, fit, loop, records
from jaxdistill.run.checkpoint import load_params
from jaxdistill.run.experiment import Experiment
from tests.run import staged


class Killed(BaseException):
    """What a killed process does not survive."""


def run(workdir, variant=""):
    return loop.run(staged.get_config(variant), workdir, progress=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("staged") / "run"
    run(workdir)
    return workdir


def stored(workdir, stage, role="student"):
    """The weights of a role after a stage, as numpy."""
    experiment = Experiment(staged.get_config(), workdir)
    shapes = {role: experiment.abstract(experiment.nets["student"], "student")}
    return jax.tree.map(
        np.asarray, load_params(workdir / "stages" / str(stage), shapes)
    )


def same(a, b) -> bool:
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


def test_a_field_is_measured_once_and_stored(finished, monkeypatch):
    found = json.loads((finished / records.MEASURED).read_text())["scale"]
    data = Experiment(staged.get_config(), finished).data
    batches = data.loader()
    points = np.concatenate([next(batches)["x"] for _ in range(4)])
    np.testing.assert_allclose(found, np.sqrt(np.mean(points**2)), rtol=1e-6)
    monkeypatch.setattr(staged.Staged, "measure", None)
    assert loop.load(finished).experiment.method.scale == found


def test_a_stated_field_is_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate, "DevicePrefetch", None)
    run(tmp_path / "run", "given")
    assert not (tmp_path / "run" / records.MEASURED).exists()


def test_a_damaged_record_of_measured_fields_is_refused(finished, tmp_path):
    (tmp_path / records.MEASURED).write_text('{"scal": 1.0}')
    with pytest.raises(Refused, match="scal"):
        _ = Experiment(staged.get_config(), tmp_path).method


def test_a_pool_holds_all_records_of_all_items(finished):
    files = sorted((finished / "pools" / "1").glob("*.arrayrecord"))
    assert [file.stem for file in files] == [
        f"item{i}" for i in range(staged.ITEMS)
    ]
    data = staged.Staged().read(
        Experiment(staged.get_config(), finished).data, files[0].parent
    )
    number = sum(i + 12 for i in range(staged.ITEMS))
    assert len(data.arrays("train")["x"]) == number


def test_the_last_weights_are_handed_on_beside_the_averaged_ones(finished):
    averaged = stored(finished, 0)["student"]
    last = stored(finished, 0, "last_student")["last_student"]
    assert not same(averaged["up"], last["up"])
    assert same(averaged["norm"]["mean"], last["norm"]["mean"])


def test_only_what_trains_moves(finished):
    before = stored(finished, 0)["student"]
    after = stored(finished, 1)["student"]
    assert same(before["up"], after["up"])
    assert same(before["norm"], after["norm"])
    assert not same(before["down"], after["down"])


def test_running_statistics_move_towards_those_of_the_data(finished):
    norm = stored(finished, 0)["student"]["norm"]
    assert np.abs(norm["mean"]).max() > 0
    assert np.abs(norm["var"] - 1).max() > 0


def killed_in(monkeypatch, module, name, call):
    """Makes the `call`-th call of a function kill the process, once."""
    original = getattr(module, name)
    calls = []

    def maybe(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, maybe)


@pytest.mark.parametrize(
    "module, name, call",
    [
        (staged, "summed", 1),
        (calibrate, "write_json", 1),
        (fit.metrics, "Writer", 1),
        (collect.arrayrecord, "write", 3),
        (fit.Fit, "_take_step", 8),
        (fit.Fit, "_take_step", 17),
    ],
    ids=["measuring", "measured", "before-steps", "pool", "statistics", "part"],
)
def test_killed_and_resumed_bit_for_bit(
    finished, tmp_path, monkeypatch, module, name, call
):
    workdir = tmp_path / "run"
    with monkeypatch.context() as context:
        killed_in(context, module, name, call)
        with pytest.raises(Killed):
            run(workdir)
    run(workdir)
    for stage in (0, 1):
        assert same(stored(finished, stage), stored(workdir, stage)), stage
    ours = (finished / records.MEASURED).read_bytes()
    assert (workdir / records.MEASURED).read_bytes() == ours
    for file in (finished / "pools" / "1").iterdir():
        assert (
            workdir / "pools" / "1" / file.name
        ).read_bytes() == file.read_bytes()
