import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxdistill.core.types import Refused
from jaxdistill.interop.folder import whole_folder
from jaxdistill.interop.safetensors import read_file, read_folder, read_json, write_folder

RNG = np.random.default_rng(0)
TENSORS = {
    "a": RNG.standard_normal((3, 4)).astype(np.float32),
    "b": RNG.standard_normal((2, 5)).astype(jnp.bfloat16),
    "c": RNG.integers(-5, 5, (7,)),
    "d": np.array(2.5, np.float16),
    "e": np.array([True, False, True]),
}


@pytest.fixture
def file(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    return tmp_path / "x.safetensors"


def test_reads_every_dtype_bit_for_bit(file):
    found = read_file(file)
    assert found.keys() == TENSORS.keys()
    for name, w in TENSORS.items():
        assert found[name].data.dtype == w.dtype and found[name].file == file
        np.testing.assert_array_equal(found[name].data, w)


def test_reading_maps_the_file(file):
    data = read_file(file)["a"].data
    while data.base is not None and not isinstance(data, np.memmap):
        data = data.base
    assert isinstance(data, np.memmap)


def write(folder, max_shard_bytes):
    arrays = {k: v for k, v in TENSORS.items() if k != "d"}  # 48, 20, 56 and 3 bytes
    write_folder(folder, "model", {k: v.nbytes for k, v in arrays.items()}, arrays.__getitem__, max_shard_bytes)
    return arrays


@pytest.mark.parametrize(("limit", "files"), [(10**9, 1), (68, 2), (67, 3), (1, 4)])
def test_shards_hold_everything_and_stay_below_the_limit(tmp_path, limit, files):
    arrays = write(tmp_path, limit)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) == files
    assert (tmp_path / "model.safetensors.index.json").exists() == (files > 1)
    for shard in shards:
        held = load_file(shard)
        assert len(held) == 1 or sum(w.nbytes for w in held.values()) <= limit
    found = read_folder(tmp_path, "model")
    assert found.keys() == arrays.keys()
    for name, w in arrays.items():
        np.testing.assert_array_equal(found[name].data, w)
    if files > 1:
        index = read_json(tmp_path / "model.safetensors.index.json")
        assert index["metadata"]["total_size"] == 127
        assert index["weight_map"] == {name: found[name].file.name for name in arrays}


def test_a_folder_without_weights_is_a_key_error(tmp_path):
    with pytest.raises(KeyError):
        read_folder(tmp_path, "model")


def test_refuses_damaged_files(file, tmp_path):
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for size in (0, 5, header - 3, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(Refused, match=f"x.safetensors: truncated.* {size} bytes") as error:
            read_file(file)
        assert "\n" not in str(error.value)
    file.write_bytes(whole + b"!")
    with pytest.raises(Refused, match=f"too long, {len(whole) + 1} bytes where the header says {len(whole)}"):
        read_file(file)
    for text in ("[]", "{", '{"a": 1}', '{"a": {"dtype": "F32"}}'):
        file.write_bytes(len(text).to_bytes(8, "little") + text.encode())
        with pytest.raises(Refused, match="not a safetensors header"):
            read_file(file)
    entry = lambda dtype, end: json.dumps({"a": {"dtype": dtype, "shape": [2], "data_offsets": [0, end]}}).encode()
    for dtype, end, message in (("F32", 4, "takes 4 bytes, expected 8"), ("F4", 8, "dtype F4")):
        head = entry(dtype, end)
        file.write_bytes(len(head).to_bytes(8, "little") + head + bytes(end))
        with pytest.raises(Refused, match=message):
            read_file(file)


def test_refuses_a_missing_shard_and_a_malformed_index(tmp_path):
    write(tmp_path, 68)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(Refused, match=r"model-00002-of-00002\.safetensors: no such file, though the index lists it"):
        read_folder(tmp_path, "model")
    index = tmp_path / "model.safetensors.index.json"
    for text, message in (("{", "not JSON"), ("[]", "expected a JSON object"), ("{}", "no weight_map")):
        index.write_text(text)
        with pytest.raises(Refused, match=message):
            read_folder(tmp_path, "model")


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "out" / "model"
    with pytest.raises(ZeroDivisionError), whole_folder(target) as fresh:
        (fresh / "config.json").write_text("{}")
        raise ZeroDivisionError
    assert list(target.parent.iterdir()) == []
    with whole_folder(target) as fresh:
        assert not target.exists()
        (fresh / "config.json").write_text("1")
    with whole_folder(target) as fresh:
        (fresh / "config.json").write_text("2")
    assert [p.name for p in target.parent.iterdir()] == ["model"]
    with pytest.raises(ZeroDivisionError), whole_folder(target) as fresh:
        raise ZeroDivisionError
    assert (target / "config.json").read_text() == "2"


def test_refuses_to_replace_what_is_not_a_model(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for target, message in ((tmp_path, "not a model folder"), (tmp_path / "notes.txt", "is a file")):
        with pytest.raises(Refused, match=message), whole_folder(target):
            pass
    assert (tmp_path / "notes.txt").read_text() == "mine"
