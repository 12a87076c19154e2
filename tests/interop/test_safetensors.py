import json
import os

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxdistill.core.types import Refused
from jaxdistill.interop.folder import whole_folder
from jaxdistill.interop.safetensors import (
    read_file,
    read_folder,
    read_json,
    write_folder,
)

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
    # 48, 20, 56 and 3 bytes
    arrays = {k: v for k, v in TENSORS.items() if k != "d"}
    write_folder(
        folder,
        "model",
        {k: v.nbytes for k, v in arrays.items()},
        arrays.__getitem__,
        max_shard_bytes,
    )
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
        assert index["weight_map"] == {
            name: found[name].file.name for name in arrays
        }


def test_a_folder_without_weights_is_a_key_error(tmp_path):
    with pytest.raises(KeyError):
        read_folder(tmp_path, "model")


def test_refuses_damaged_files(file, tmp_path):
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for size in (0, 5, header - 3, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(
            Refused, match=f"x.safetensors: truncated.* {size} bytes"
        ) as error:
            read_file(file)
        assert "\n" not in str(error.value)
    file.write_bytes(whole + b"!")
    with pytest.raises(
        Refused,
        match=f"too long, {len(whole) + 1} bytes where the header says {len(whole)}",
    ):
        read_file(file)
    for text in (
        "[]",
        "{",
        '{"a": 1, "a": 1}',
        '{"a": NaN}',
        "[" * 100_000,
        "\ufeff{}",
    ):
        file.write_bytes(len(text).to_bytes(8, "little") + text.encode())
        with pytest.raises(Refused, match="not a safetensors header"):
            read_file(file)
    entry = lambda dtype, end: json.dumps(
        {"a": {"dtype": dtype, "shape": [2], "data_offsets": [0, end]}}
    ).encode()
    for dtype, end, message in (
        ("F32", 4, "takes 4 bytes, expected 8"),
        ("F4", 8, "dtype 'F4'"),
    ):
        head = entry(dtype, end)
        file.write_bytes(len(head).to_bytes(8, "little") + head + bytes(end))
        with pytest.raises(Refused, match=message):
            read_file(file)
    file.write_bytes((10**8 + 1).to_bytes(8, "little"))
    os.truncate(file, 10**8 + 9)  # a hole: takes no room on the disk
    with pytest.raises(
        Refused, match="100000001 bytes long, expected at most 100000000"
    ):
        read_file(file)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
WRONG = {  # an entry's fault -> (the entry, or what is otherwise in it, and what is said)
    "a list": ([1, 2], r"is \[1, 2\] in the safetensors header"),
    "text": ("x", "is 'x' in the safetensors header"),
    "no dtype": ({"dtype": None}, "has dtype None"),
    "dtype a list": ({"dtype": ["F32"]}, r"has dtype \['F32'\]"),
    "dtype a number": ({"dtype": 32}, "has dtype 32"),
    "reversed": ({"data_offsets": [8, 0]}, "takes -8 bytes, expected 8"),
    "negative": (
        {"data_offsets": [-8, 0]},
        "data_offsets .* expected two whole numbers",
    ),
    "fractions": (
        {"data_offsets": [0.0, 8.0]},
        "data_offsets .* expected two whole numbers",
    ),
    "flags": (
        {"data_offsets": [False, True], "dtype": "U8", "shape": [1]},
        "data_offsets .* expected two whole numbers",
    ),
    "one offset": (
        {"data_offsets": [0]},
        "data_offsets .* expected two whole numbers",
    ),
    "offset a number": (
        {"data_offsets": 8},
        "data_offsets 8, expected two whole numbers",
    ),
    "shape negative": (
        {"shape": [-1, -2]},
        "shape .* expected at most 32 whole numbers",
    ),
    "shape text": ({"shape": "2"}, "shape '2', expected at most 32 whole numbers"),
    "shape fractions": (
        {"shape": [2.0]},
        "shape .* expected at most 32 whole numbers",
    ),
    "shape deep": (
        {"shape": [1] * 33 + [2]},
        "shape .* expected at most 32 whole numbers",
    ),
    "shape absurd": (
        {"shape": [10**12, 10**12]},
        "takes 8 bytes, expected 4000000000000000000000000",
    ),
}


def put(file, header, size):
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))


@pytest.mark.parametrize("fault", WRONG)
def test_refuses_a_wrong_entry_by_file_and_name(tmp_path, fault):
    file, (change, message) = tmp_path / "x.safetensors", WRONG[fault]
    put(file, {"a": ENTRY, "b.c": {**ENTRY, "data_offsets": [8, 16]}}, 16)
    assert read_file(file).keys() == {"a", "b.c"}
    sound = {**ENTRY, "data_offsets": [8, 16]}
    put(
        file,
        {
            "a": ENTRY,
            "b.c": {**sound, **change} if isinstance(change, dict) else change,
        },
        16,
    )
    with pytest.raises(
        Refused, match=rf"x\.safetensors: b\.c .*{message}"
    ) as error:
        read_file(file)
    assert str(error.value).isprintable()


def test_refuses_a_tensor_of_no_elements_that_is_too_large(tmp_path):
    put(
        tmp_path / "x",
        {"a": {**ENTRY, "shape": [0, 2**47, 2**47], "data_offsets": [0, 0]}},
        0,
    )
    with pytest.raises(
        Refused, match=r"x: a has shape \[0, 140737488355328, 140737488355328\]"
    ):
        read_file(tmp_path / "x")


@pytest.mark.parametrize("key", ENTRY)
def test_refuses_an_entry_that_lacks_a_part(tmp_path, key):
    put(tmp_path / "x", {"a": {k: v for k, v in ENTRY.items() if k != key}}, 8)
    with pytest.raises(
        Refused, match=f"x: a has no {key} in the safetensors header"
    ):
        read_file(tmp_path / "x")


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([(0, 8), (4, 12)], "b begins at byte 4, expected 8: overlaps"),
        ([(0, 8), (0, 8)], "b begins at byte 0, expected 8: overlaps"),
        ([(0, 8), (12, 20)], "b begins at byte 12, expected 8: leaves a gap"),
        ([(4, 12), (12, 20)], "a begins at byte 4, expected 0: leaves a gap"),
    ],
)
def test_tensors_follow_each_other(tmp_path, ranges, message):
    put(
        tmp_path / "x",
        {name: {**ENTRY, "data_offsets": list(r)} for name, r in zip("ab", ranges)},
        max(r[1] for r in ranges),
    )
    with pytest.raises(Refused, match=f"x: {message}"):
        read_file(tmp_path / "x")


def test_a_header_in_other_bytes_than_utf8_and_names_that_are_no_line(tmp_path):
    raw = json.dumps({"a": ENTRY}).encode("utf-16")
    (tmp_path / "x").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(8))
    with pytest.raises(Refused, match=r"not a safetensors header .*utf-8"):
        read_file(tmp_path / "x")
    for name in ("a\nb", "\ud800", "x" * 10_000):
        put(tmp_path / "x", {name: [1]}, 0)
        with pytest.raises(Refused) as error:
            read_file(tmp_path / "x")
        assert str(error.value).isprintable() and len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "kind", ["F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"]
)
def test_floats_of_eight_bits_are_read_exactly(tmp_path, kind):
    torch = pytest.importorskip("torch")
    header = json.dumps(
        {"a": {"dtype": kind, "shape": [16, 16], "data_offsets": [0, 256]}}
    ).encode()
    (tmp_path / "x").write_bytes(
        len(header).to_bytes(8, "little") + header + bytes(range(256))
    )
    theirs = torch.arange(256, dtype=torch.uint8).view(
        getattr(
            torch,
            {"E4M3": "float8_e4m3fn"}.get(kind[3:], f"float8_{kind[3:].lower()}"),
        )
    )
    for dtype in (np.float32, jnp.bfloat16):  # both hold every value
        ours = (
            read_file(tmp_path / "x")["a"]
            .data.astype(dtype)
            .astype(np.float32)
            .reshape(-1)
        )
        np.testing.assert_array_equal(ours, theirs.float().numpy())


def shards(folder, *files, index=None):
    """Files of float32 [2] by name -> value, and an index that lists them, changed by `index`."""
    for i, tensors in enumerate(files):
        save_file(
            {
                name: np.full(2, value, np.float32)
                for name, value in tensors.items()
            },
            folder / f"m{i}.safetensors",
        )
    weight_map = {
        name: f"m{i}.safetensors"
        for i, tensors in enumerate(files)
        for name in tensors
    } | (index or {})
    (folder / "m.safetensors.index.json").write_text(
        json.dumps({"weight_map": weight_map})
    )


def test_a_tensor_in_two_files_is_equal_in_both_or_refused(tmp_path):
    shards(
        tmp_path, {"a": 1, "b": 2}, {"b": 2, "c": 3}, index={"b": "m0.safetensors"}
    )
    found = read_folder(tmp_path, "m")
    assert {name: w.data[0] for name, w in found.items()} == {
        "a": 1,
        "b": 2,
        "c": 3,
    } and found["b"].file.name == "m0.safetensors"
    shards(
        tmp_path, {"a": 1, "b": 2}, {"b": 0, "c": 3}, index={"b": "m0.safetensors"}
    )
    with pytest.raises(
        Refused,
        match=r"m0.safetensors and .*m1.safetensors: b is stored twice with different values",
    ):
        read_folder(tmp_path, "m")
    shards(tmp_path, {"a": np.nan}, {"a": np.nan})  # equal bits
    assert np.isnan(read_folder(tmp_path, "m")["a"].data).all()


def test_an_index_says_the_truth_and_stays_in_its_folder(tmp_path):
    home = tmp_path / "home"
    outside = tmp_path / "outside.safetensors"
    home.mkdir()
    save_file({"a": np.zeros(2, np.float32)}, outside)
    shards(home, {"a": 1}, index={"b": "m0.safetensors"})
    with pytest.raises(
        Refused,
        match=r"index.json: weight_map puts b into m0.safetensors, which does not hold it",
    ):
        read_folder(home, "m")
    for file in (
        "../outside.safetensors",
        str(outside),
        "..",
        "",
        "sub/x.safetensors",
        5,
        None,
        ["m0.safetensors"],
        "m0.bin",
        "a\nb.safetensors",
        "x\0.safetensors",
        "x" * 300 + ".safetensors",
        "\\\\host\\x.safetensors",
    ):
        shards(home, {"a": 1}, index={"b": file})
        with pytest.raises(
            Refused,
            match=r"weight_map puts b into .* expected the name of a .safetensors file beside it",
        ) as error:
            read_folder(home, "m")
        assert str(error.value).isprintable()
    (home / "m1.safetensors").symlink_to("../outside.safetensors")
    shards(home, {"a": 1}, index={"a": "m1.safetensors"})
    with pytest.raises(
        Refused,
        match=r"m1.safetensors: is a link to .*outside.safetensors, "
        "expected a file inside the folder",
    ):
        read_folder(home, "m")
    for file, text in (
        ("m0.safetensors", "m0.safetensors"),
        ("m.safetensors.index.json", '{"weight_map": {}}'),
    ):
        (home / "m1.safetensors").unlink(missing_ok=True)
        shards(home, {"a": 1})
        (home / file).rename(home / "m1.safetensors")
        (home / file).write_text(text)
        with pytest.raises(Refused):
            read_folder(home, "m")


def test_a_hub_cache_links_to_its_blobs(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "123" / "transformer"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    shards(snapshot, {"a": 1}, {"b": 2})
    for i, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blobs / str(i))
        file.symlink_to(f"../../../blobs/{i}")
    assert read_folder(snapshot, "m").keys() == {"a", "b"}


def test_the_single_file_or_the_index_counts_as_in_the_library_of_the_model(
    tmp_path,
):
    shards(tmp_path, {"a": 1}, {"b": 2})
    save_file({"a": np.full(2, 3, np.float32)}, tmp_path / "m.safetensors")
    assert {name: w.data[0] for name, w in read_folder(tmp_path, "m").items()} == {
        "a": 3
    }
    assert {
        name: w.data[0]
        for name, w in read_folder(tmp_path, "m", index_first=True).items()
    } == {"a": 1, "b": 2}
    (tmp_path / "m.safetensors.index.json").write_text('{"weight_map": {"a": 1}}')
    for index_first in (False, True):  # whose the weights are is not known
        with pytest.raises(Refused, match="weight_map"):
            read_folder(tmp_path, "m", index_first=index_first)


def test_json_with_a_byte_order_mark_and_with_two_values_for_a_key(tmp_path):
    file = tmp_path / "config.json"
    file.write_text('\ufeff{"a": 1, "a": 1}')
    assert read_json(file) == {"a": 1}
    for text, message in (
        ('{"a": 1, "a": 2}', "a stands twice"),
        ("[" * 100_000, "not JSON"),
        ("", "not JSON"),
        ("\0", "not JSON"),
    ):
        file.write_text(text)
        with pytest.raises(Refused, match=rf"config.json: .*{message}") as error:
            read_json(file)
        assert str(error.value).isprintable()
    file.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(Refused, match=r"not JSON .*utf-8"):
        read_json(file)
    with pytest.raises(Refused, match="cannot be read"):
        read_json(tmp_path)


def test_refuses_a_missing_shard_and_a_malformed_index(tmp_path):
    write(tmp_path, 68)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        Refused,
        match=r"model-00002-of-00002\.safetensors: no such file, though the index lists it",
    ):
        read_folder(tmp_path, "model")
    index = tmp_path / "model.safetensors.index.json"
    for text, message in (
        ("{", "not JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "no weight_map"),
    ):
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
    for target, message in (
        (tmp_path, "not a model folder"),
        (tmp_path / "notes.txt", "is a file"),
    ):
        with pytest.raises(Refused, match=message), whole_folder(target):
            pass
    assert (tmp_path / "notes.txt").read_text() == "mine"
