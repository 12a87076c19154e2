"""A checkpoint gives back what was saved, or says that it is damaged and gives the previous one."""

import errno
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
import orbax.checkpoint as ocp
import pytest

from jaxdistill.core.types import Refused, State
from jaxdistill.run.checkpoint import (
    Checkpoints,
    checksum,
    checksums,
    load_params,
    save_params,
)


@functools.cache
def state(step):
    """Weights of 9 to 83 kB: some share a file and some do not."""
    keys = iter(jax.random.split(jax.random.key(step), 9))
    layer = lambda i: {
        "w": jax.random.normal(next(keys), (48, 48 * 3**i)),
        "b": jax.numpy.full(i + 1, step),
    }
    trees = {
        part: {"student": {f"layer_{i}": layer(i) for i in range(3)}}
        for part in ("params", "opt", "ema")
    }
    return State(
        step=jax.numpy.int32(step),
        count={"student": jax.numpy.int32(step)},
        **trees,
        memory={},
        frozen={},
    )


def restored(folder):
    """(step, whether the warning was given), after a comparison of all that was read with what was
    saved.
    """
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state(0)
    )
    checkpoints = Checkpoints(folder)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always", UserWarning)
        step, read, host = checkpoints.restore(abstract)
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, read, state(step))
    assert host["step"] == step
    return step, any("is damaged and was moved" in str(w.message) for w in given)


def flipped(folder):
    """For each file that holds arrays and the host's record, a bit changed at three places: (step
    that was read, whether warned).
    """
    files = [
        f.relative_to(folder)
        for f in (folder / "step_10").rglob("*")
        if f.is_file() and f.stat().st_size > 7
    ]
    for file in (
        f
        for f in files
        if "/ocdbt.process_0/d/" in str(f) or str(f).endswith("host/metadata")
    ):
        for part in (0.1, 0.5, 0.95):
            copy = folder.parent / "copy" / folder.name
            shutil.copytree(folder, copy)
            data = bytearray((copy / file).read_bytes())
            data[int(part * len(data))] ^= 16
            (copy / file).write_bytes(data)
            yield str(file), f"bit at {part}", *restored(copy)
            shutil.rmtree(copy.parent)


def cut_each(folder):
    """For each file of step 10, in three ways: [file, how, step that was read, whether the warning
    was given].
    """
    checkpoints = Checkpoints(folder)
    for step in (5, 10):
        checkpoints.save(step, state(step), {"step": step})
        checkpoints.wait()
    checkpoints.close()
    assert restored(folder) == (10, False)
    files = [
        f.relative_to(folder)
        for f in (folder / "step_10").rglob("*")
        if f.is_file() and f.stat().st_size > 7
    ]
    for file in files:
        for how, left in {
            "7 bytes": lambda size: size - 7,
            "half": lambda size: size // 2,
            "all": lambda size: 0,
        }.items():
            copy = folder.parent / "copy" / folder.name
            shutil.copytree(folder, copy)
            os.truncate(copy / file, left((copy / file).stat().st_size))
            yield str(file), how, *restored(copy)
            shutil.rmtree(copy.parent)
    yield from flipped(folder)


@pytest.fixture(scope="module")
def cuts(tmp_path_factory):
    """In a process of its own: reads that are still under way when one has failed complain where no
    test can hear them.
    """
    ended = subprocess.run(
        [sys.executable, __file__, tmp_path_factory.mktemp("cuts") / "checkpoints"],
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    return json.loads(ended.stdout)


@pytest.mark.full
def test_whatever_file_is_cut_nothing_wrong_is_read(cuts):
    """A cut that is noticed falls back with a warning; one that is not has cost nothing that is
    read.
    """
    assert len(cuts) > 20
    for *where, step, warned in cuts:
        assert (step, warned) in [(10, False), (5, True)], where


def test_a_changed_bit_is_noticed(cuts):
    """In weights (tensorstore has no checksum of them) and in the host's record, as far as anything
    is read from there.
    """
    noticed = {
        file.split("/")[-1] if "host" in file else "arrays"
        for file, how, _, warned in cuts
        if how.startswith("bit") and warned
    }
    assert noticed == {"metadata", "arrays"}


@pytest.mark.parametrize("how", ["half", "all"])
def test_a_cut_of_what_is_needed_is_noticed(cuts, how):
    noticed = {file for file, what, _, warned in cuts if what == how and warned}
    assert {
        "step_10/host/metadata",
        "step_10/state/manifest.ocdbt",
        "step_10/state/_METADATA",
    } <= noticed
    assert any("/d/" in file for file in noticed)  # the arrays themselves


@pytest.fixture
def two(tmp_path):
    """A folder with two sound checkpoints."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (5, 10):
        checkpoints.save(step, state(step), {"step": step})
        checkpoints.wait()
    checkpoints.close()
    return tmp_path / "checkpoints"


UNKNOWN = ValueError(
    "UNKNOWN: Error reading \"x\": Failed to read: Input/output error [os_error_code='5']\nmore"
)
FAULTS = [  # what reading may raise, which part of the checkpoint is read, what comes of it
    (OSError(errno.EIO, "Input/output error"), "host", OSError),
    (OSError(errno.EIO, "Input/output error"), "state", OSError),
    (PermissionError(errno.EACCES, "Permission denied"), "host", PermissionError),
    (PermissionError(errno.EACCES, "Permission denied"), "state", PermissionError),
    (MemoryError("no 4 GiB"), "state", MemoryError),
    (UNKNOWN, "state", OSError),
    (ValueError("UNAVAILABLE: try again"), "host", OSError),
    (RuntimeError("RESOURCE EXHAUSTED: device memory"), "state", RuntimeError),
    (KeyError("key_type"), "state", Refused),
]


@pytest.mark.parametrize(
    ("fault", "part", "raised"),
    FAULTS,
    ids=[f"{type(f).__name__}-{part}" for f, part, _ in FAULTS],
)
def test_a_fault_of_the_machine_moves_nothing(
    two, monkeypatch, fault, part, raised
):
    real = ocp.CheckpointManager.restore

    def restore(self, step, args=None):
        if part in dict(args):
            raise fault
        return real(self, step, args=args)

    monkeypatch.setattr(ocp.CheckpointManager, "restore", restore)
    with pytest.raises(raised) as found:
        restored(two)
    message = str(found.value)
    assert "\n" not in message
    assert (
        raised in (MemoryError, RuntimeError)
        or f"{two}/step_10: cannot be read" in message
    )
    assert (
        sorted(p.name for p in two.iterdir()) == ["step_10", "step_5"]
        and not (two.parent / "damaged").exists()
    )
    monkeypatch.undo()
    assert restored(two) == (10, False)


PASSING = [  # what looks like damage
    FileNotFoundError(errno.ENOENT, "No such file or directory"),
    ValueError("DATA_LOSS: Error reading x"),
    ValueError("Error decoding x"),
]


@pytest.mark.parametrize("part", ["host", "state"])
@pytest.mark.parametrize("fault", PASSING, ids=["missing", "lost", "undecoded"])
def test_what_is_found_when_read_again_is_sound(two, monkeypatch, fault, part):
    real = ocp.CheckpointManager.restore
    faults = [fault]

    def restore(self, step, args=None):
        if part in dict(args) and faults:
            raise faults.pop()
        return real(self, step, args=args)

    monkeypatch.setattr(ocp.CheckpointManager, "restore", restore)
    assert restored(two) == (10, False)
    assert not faults and not (two.parent / "damaged").exists()


def test_missing_files_are_damage_only_where_the_others_can_be_read(
    two, monkeypatch
):
    """orbax says "not found" of what it has no permission to look at."""
    (two / "step_10/host/metadata").unlink()
    monkeypatch.setattr(
        "builtins.open", functools.partial(_denied, open, "step_10")
    )
    with pytest.raises(PermissionError, match="step_10: cannot be read"):
        restored(two)
    monkeypatch.undo()
    assert restored(two) == (5, True)


def _denied(real, name, file, *args, **rest):
    if name in str(file):
        raise PermissionError(errno.EACCES, "Permission denied", str(file))
    return real(file, *args, **rest)


@pytest.mark.parametrize("key", ["architecture", "checksums", "stamp"])
def test_a_record_of_another_version_is_refused(two, key):
    file = two / "step_10/host/metadata"
    record = json.loads(file.read_text())
    del record[key]
    file.write_text(json.dumps(record))
    with pytest.raises(Refused, match=f"step_10/host/metadata: has no key '{key}'"):
        restored(two)
    assert (two / "step_10").is_dir()


@pytest.mark.parametrize(
    "kind",
    [
        "float32",
        "bfloat16",
        "float16",
        "int8",
        "uint32",
        "bool",
        "complex64",
        "float8_e4m3fn",
    ],
)
def test_checksum_sees_every_element(kind):
    x = jax.numpy.arange(24).reshape(2, 3, 4)
    x = (
        jax.lax.bitcast_convert_type(x.astype("uint8"), kind)
        if kind.startswith("float8")
        else x.astype(kind)
    )
    sums = {int(checksum(x))}
    for i in range(24):
        sums.add(
            int(
                checksum(
                    x.reshape(-1)
                    .at[i]
                    .set(x.reshape(-1)[(i + 1) % 24])
                    .reshape(x.shape)
                )
            )
        )
    assert len(sums) == (25 if kind != "bool" else len(sums)) and len(sums) > 1


def test_checksum_is_that_of_its_definition():
    """sum_i w_i * (i * 0x9E3779B1 | 1) mod 2^32 with Python's integers, however the array is
    sharded.
    """
    x = np.random.default_rng(0).standard_normal((8, 6)).astype("f4")
    words = x.view("u4").reshape(-1)
    wanted = (
        sum(int(w) * ((i * 0x9E3779B1) % 2**32 | 1) for i, w in enumerate(words))
        % 2**32
    )
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    parted = jax.device_put(
        x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    )
    assert checksums({"a": x, "b": parted}) == {"a": wanted, "b": wanted}


@pytest.fixture
def params(tmp_path):
    """The result of a stage, and how it is read."""
    saved = {
        "student": {
            "w": jax.numpy.arange(600.0).reshape(20, 30),
            "b": jax.numpy.ones(3),
        },
        "fake": {"w": jax.numpy.zeros(5)},
    }
    save_params(tmp_path / "0", saved)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    student = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
        {"student": saved["student"]},
    )
    read = functools.partial(load_params, tmp_path / "0", student)
    jax.tree.map(
        np.testing.assert_array_equal, read(), {"student": saved["student"]}
    )
    return tmp_path / "0", read


@pytest.mark.parametrize("how", ["empty", "no metadata", "torn", "changed bit"])
def test_a_damaged_result_is_refused(params, how):
    folder, read = params
    arrays = max(folder.glob("ocdbt.process_0/d/*"), key=lambda p: p.stat().st_size)
    if how == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
    elif how == "no metadata":
        (folder / "_METADATA").write_text("{")
    elif how == "torn":
        os.truncate(arrays, 10)
    else:
        data = bytearray(arrays.read_bytes())
        for i in range(20, len(data), 50):
            data[i] ^= 4
        arrays.write_bytes(data)
    with pytest.raises(Refused) as found:
        read()
    assert (
        str(found.value).startswith(str(folder)) and str(found.value).isprintable()
    )


def test_a_result_that_cannot_be_read_now_is_not_refused(params, monkeypatch):
    read = params[1]
    fault = OSError(errno.EIO, "Input/output error")
    monkeypatch.setattr(
        ocp.PyTreeCheckpointer,
        "restore",
        lambda *a, **k: (_ for _ in ()).throw(fault),
    )
    with pytest.raises(
        OSError,
        match=r"0: cannot be read \(Input/output error\); nothing was changed",
    ):
        read()


def test_a_stored_adapter_is_not_lost(tmp_path):
    """A role that has no adapter on that matrix now would be another network."""
    pair = {"a": np.ones((3, 1), np.float32), "b": np.ones((1, 3), np.float32)}
    save_params(tmp_path / "0", {"student": {"w/kernel": pair, "v/kernel": pair}})
    shapes = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype), pair)
    with pytest.raises(
        Refused, match=r"0: has student/v/kernel/a, expected no adapter"
    ):
        load_params(tmp_path / "0", {"student": {"w/kernel": shapes}})


if __name__ == "__main__":
    print(json.dumps(list(cut_each(Path(sys.argv[1])))))
