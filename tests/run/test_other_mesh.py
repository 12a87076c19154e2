"""A run saved on one number of devices goes on with another: state, controller, and every sample
once an epoch.
"""

import json
import shutil

import jax
import numpy as np
import pytest

from jaxdistill.core import build
from jaxdistill.core.sharding import MeshShape
from jaxdistill.run import loop, metrics
from jaxdistill.run.checkpoint import Checkpoints
from tests.run.tiny import get_config

STEPS = 20
SHAPES = {1: dict(data=1, fsdp=1, tensor=1), 8: dict(data=2, fsdp=2, tensor=2)}


def config(devices: int):
    made = get_config("counted")
    made.steps = STEPS
    made.log_every = 1
    made.mesh = build.plain(MeshShape(**SHAPES[devices]))
    return made


def seen(workdir):
    """(sum, sum of squares) of the sample numbers at every step."""
    return [
        (r["fake/numbers"], r["fake/squares"])
        for r in metrics.read(workdir / "metrics.jsonl")
        if "fake/numbers" in r
    ]


def saved(workdir):
    """The last checkpoint: (state, host record)."""
    made = config(1)
    experiment = loop.Experiment(made, workdir)
    with loop.sharding.use(experiment.mesh, experiment.settings.rules):
        abstract = loop.abstract_programs(experiment)[0].abstract
        checkpoints = Checkpoints(workdir / "checkpoints", 3)
        step, state, host = checkpoints.restore(abstract.replace(frozen={}))
        checkpoints.close()
    assert step == STEPS
    return jax.device_get(state), host


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One device, never interrupted."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    loop.run(config(1), workdir, progress=False)
    return workdir


def test_an_epoch_is_every_sample_once(alone):
    """40 samples, 16 a step: five steps are two epochs, whatever the order within them."""
    sums = seen(alone)
    assert len(sums) == STEPS
    for start in range(0, STEPS, 5):
        total = np.sum(sums[start : start + 5], axis=0)
        assert total[0] == 2 * sum(range(40)) and total[1] == 2 * sum(
            n**2 for n in range(40)
        )


@pytest.mark.full
@pytest.mark.parametrize("before, after", [(8, 1), (1, 8)])
def test_goes_on_with_another_number_of_devices(alone, before, after, tmp_path):
    workdir = tmp_path / "run"
    loop.run(config(before), workdir, progress=False)
    for step in (15, 20):  # as if it had been killed after step 10
        shutil.rmtree(workdir / "checkpoints" / f"step_{step}")
    shutil.rmtree(workdir / "stages")
    (workdir / "report.json").unlink()
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    (workdir / "metrics.jsonl").write_text(
        "".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= 10)
    )
    loop.run(config(after), workdir, progress=False)
    assert seen(workdir) == seen(alone)  # no sample repeated or skipped
    (state, host), (whole, other) = saved(workdir), saved(alone)
    assert (
        host["controller"] == other["controller"]
        and host["controller"]["calls"] == STEPS
    )
    assert host["data"] == other["data"]
    for part in ("params", "opt", "ema", "count", "memory"):
        for a, b in zip(
            jax.tree.leaves(getattr(state, part)),
            jax.tree.leaves(getattr(whole, part)),
            strict=True,
        ):
            np.testing.assert_allclose(a, b, atol=1e-5, err_msg=part)
