"""A checkpoint gives back what was saved, or says that it is damaged and gives the one before it."""

import functools
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxdistill.core.checkpoint import Checkpoints
from jaxdistill.core.types import State


@functools.cache
def state(step):
    """Weights of 9 to 83 kB: some share a file and some do not."""
    keys = iter(jax.random.split(jax.random.key(step), 9))
    layer = lambda i: {"w": jax.random.normal(next(keys), (48, 48 * 3**i)), "b": jax.numpy.full(i + 1, step)}
    trees = {part: {"student": {f"layer_{i}": layer(i) for i in range(3)}} for part in ("params", "opt", "ema")}
    return State(step=jax.numpy.int32(step), count={"student": jax.numpy.int32(step)}, **trees, memory={}, frozen={})


def restored(folder):
    """(step, whether the warning was given), after a comparison of all that was read with what was saved."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state(0))
    checkpoints = Checkpoints(folder)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always", UserWarning)
        step, read, host = checkpoints.restore(abstract)
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, read, state(step))
    assert host["step"] == step
    return step, any("is damaged and was moved" in str(w.message) for w in given)


def cut_each(folder):
    """For each file of step 10, in three ways: [file, how, step that was read, whether the warning was given]."""
    checkpoints = Checkpoints(folder)
    for step in (5, 10):
        checkpoints.save(step, state(step), {"step": step})
        checkpoints.wait()
    checkpoints.close()
    assert restored(folder) == (10, False)
    files = [f.relative_to(folder) for f in (folder / "step_10").rglob("*") if f.is_file() and f.stat().st_size > 7]
    for file in files:
        for how, left in {"7 bytes": lambda size: size - 7, "half": lambda size: size // 2, "all": lambda size: 0}.items():
            copy = folder.parent / "copy" / folder.name
            shutil.copytree(folder, copy)
            os.truncate(copy / file, left((copy / file).stat().st_size))
            yield str(file), how, *restored(copy)
            shutil.rmtree(copy.parent)


@pytest.fixture(scope="module")
def cuts(tmp_path_factory):
    """In a process of its own: reads that are still under way when one has failed complain where no test can hear them."""
    ended = subprocess.run([sys.executable, __file__, tmp_path_factory.mktemp("cuts") / "checkpoints"], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return json.loads(ended.stdout)


def test_whatever_file_is_cut_nothing_wrong_is_read(cuts):
    """A cut that is noticed falls back with a warning; one that is not has cost nothing that is read."""
    assert len(cuts) > 20
    for *where, step, warned in cuts:
        assert (step, warned) in [(10, False), (5, True)], where


@pytest.mark.parametrize("how", ["half", "all"])
def test_a_cut_of_what_is_needed_is_noticed(cuts, how):
    noticed = {file for file, what, _, warned in cuts if what == how and warned}
    assert {"step_10/host/metadata", "step_10/state/manifest.ocdbt", "step_10/state/_METADATA"} <= noticed
    assert any("/d/" in file for file in noticed)  # the arrays themselves


if __name__ == "__main__":
    print(json.dumps(list(cut_each(Path(sys.argv[1])))))
