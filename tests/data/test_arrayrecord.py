import jax.numpy as jnp
import numpy as np
import pytest
from flax.serialization import msgpack_serialize

from jaxdistill.core.types import Refused
from jaxdistill.data.arrayrecord import (
    ArrayRecords,
    ArrayRecordWriter,
    GroupedRecords,
    LoadedRecords,
    WeightedRecords,
    write,
)


def examples(n: int, start: int = 0):
    for i in range(start, start + n):
        yield {
            "x": np.full((2, 3), i, np.float32),
            "index": np.int32(i),
            "logits": np.full(4, i / 7, jnp.bfloat16),
        }


def rewrite(file, change):
    file.write_bytes(bytes(change(bytearray(file.read_bytes()))))


def flip_bytes(data: bytearray) -> bytearray:
    data[len(data) // 4 : 3 * len(data) // 4] = bytes(
        b ^ 255 for b in data[len(data) // 4 : 3 * len(data) // 4]
    )
    return data


@pytest.mark.parametrize(
    "dtype",
    [
        "float32",
        "float64",
        "float16",
        "bfloat16",
        "int32",
        "uint8",
        "int64",
        "bool",
        "complex64",
    ],
)
@pytest.mark.parametrize("shape", [(), (0,), (3, 2)])
def test_round_trip(tmp_path, dtype, shape):
    value = np.asarray(
        np.random.default_rng(0).integers(0, 2, shape), jnp.dtype(dtype)
    )
    file = tmp_path / "new folder" / "a.arrayrecord"
    assert write(file, [{"a": value, "nested name/b": jnp.ones(2)}]) == 1
    data = ArrayRecords(path=str(file))
    got = data.example(data.source("train")[0])
    assert (
        got["a"].dtype == value.dtype
        and got["a"].shape == shape
        and (got["a"] == value).all()
    )
    assert got["nested name/b"].tolist() == [1, 1]


def test_stream_over_several_files(tmp_path, check_stream, check_epochs):
    write(tmp_path / "train-0.arrayrecord", examples(7))
    write(tmp_path / "train-1.arrayrecord", examples(5, 7))
    write(tmp_path / "test-0.arrayrecord", examples(3, 100))
    data = ArrayRecords(path=str(tmp_path), batch_size=4)
    check_stream(data)
    check_epochs(data, 12)
    assert data.evaluation(10)["index"].tolist() == [100, 101, 102]
    assert data.spec()["logits"].dtype == jnp.bfloat16 and data.spec()[
        "x"
    ].shape == (
        4,
        2,
        3,
    )


def test_share_held_out(tmp_path):
    file = tmp_path / "all.arrayrecord"
    write(file, examples(20))
    for path in (file, tmp_path):
        data = ArrayRecords(path=str(path), heldout=0.25, batch_size=15)
        test = data.evaluation(100)["index"]
        train = next(data.loader())["index"]
        assert len(test) == 5 and sorted([*test, *train]) == list(range(20))


def broken(n: int):
    yield from examples(n)
    raise KeyError("the teacher failed")


def test_a_failed_write_leaves_what_was_there(tmp_path):
    file = tmp_path / "a.arrayrecord"
    write(file, examples(2))
    with pytest.raises(KeyError, match="the teacher failed"):
        write(file, broken(3))
    assert [f.name for f in tmp_path.iterdir()] == ["a.arrayrecord"]
    assert len(ArrayRecords(path=str(file), heldout=0).source("train")) == 2
    assert write(file, examples(3)) == 3
    assert len(ArrayRecords(path=str(file), heldout=0).source("train")) == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "no examples to write"),
        ([{"a": np.zeros(2)}, {"a": np.zeros(3)}], "example 1 is"),
        ([{"a": np.zeros(2)}, {"b": np.zeros(2)}], "example 1 is"),
        ([{"a": np.zeros(2)}, {"a": np.zeros(2, np.float32)}], "example 1 is"),
        ([{"a": "text"}], "expected arrays of numbers"),
        ([{"a": object()}], "expected arrays of numbers"),
    ],
)
def test_write_refused(tmp_path, given, message):
    with pytest.raises(Refused, match=message):
        write(tmp_path / "a.arrayrecord", given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[: len(b) // 2],
        lambda b: b[:100],
        lambda b: b"",
        lambda b: b"junk" * 40_000,
    ],
)
def test_truncated_or_other_file(tmp_path, damage):
    file = tmp_path / "a.arrayrecord"
    write(file, examples(10))
    rewrite(file, damage)
    with pytest.raises(
        Refused,
        match=r"a.arrayrecord: damaged or no ArrayRecord file \(\d+ bytes\)",
    ):
        ArrayRecords(path=str(file)).loader()


def test_damaged_record_is_named(tmp_path):
    file = tmp_path / "a.arrayrecord"
    rng = np.random.default_rng(0)
    write(file, ({"x": rng.standard_normal(2000)} for _ in range(40)))
    rewrite(file, flip_bytes)
    data = ArrayRecords(path=str(file), shuffle=False, batch_size=1)
    with pytest.raises(Refused, match=r"a.arrayrecord record \d+: damaged"):
        for _ in zip(range(40), data.loader()):
            pass


def test_records_of_others(tmp_path):
    writer = ArrayRecordWriter(str(tmp_path / "a.arrayrecord"), "group_size:1")
    writer.write(b"\xc1not msgpack")
    writer.close()
    with pytest.raises(
        Refused,
        match=r"a.arrayrecord record 0: expected what jaxdistill.data.arrayrecord.write stores",
    ):
        next(ArrayRecords(path=str(tmp_path), heldout=0).loader())


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            msgpack_serialize({"x": np.zeros(3, np.float32)}),
            r"record 1: 'x' is float32 \[3\], and float32 \[2\] in .*a.arrayrecord record 0",
        ),
        (
            msgpack_serialize({"x": np.zeros(2, np.int32)}),
            r"record 1: 'x' is int32 \[2\], and float32 \[2\] in",
        ),
        (
            msgpack_serialize({"y": np.zeros(2, np.float32)}),
            r"record 1: 'x' is missing, and float32 \[2\] in",
        ),
        (
            msgpack_serialize({"x": np.zeros(2, np.float32), "y": np.zeros(2)}),
            r"record 1: 'y' is float64 \[2\], and missing in",
        ),
        (
            msgpack_serialize({"x": {"y": np.zeros(2)}}),
            r"record 1: expected what .* stores \('x' is dict, no array of numbers\)",
        ),
        (
            msgpack_serialize({"x": "text"}),
            r"record 1: expected what .* stores \('x' is str",
        ),
        (
            msgpack_serialize({1: np.zeros(2)}),
            r"record 1: expected what .* stores \('1' is ndarray",
        ),
        (
            msgpack_serialize([np.zeros(2)]),
            r"record 1: expected what .* stores \('list' object",
        ),
        (b"\x01", r"record 1: expected what .* stores \('int' object"),
        (b"", r"record 1: expected what .* stores"),
        (b"\xdf\xff\xff\xff\xff", r"record 1: expected what .* stores"),
        (b"\x91" * 100_000, r"record 1: expected what .* stores"),
    ],
)
def test_a_record_unlike_the_first_is_named(tmp_path, record, message):
    writer = ArrayRecordWriter(str(tmp_path / "a.arrayrecord"), "group_size:1")
    for data in (msgpack_serialize({"x": np.zeros(2, np.float32)}), record):
        writer.write(data)
    writer.close()
    with pytest.raises(Refused, match=message) as refused:
        next(ArrayRecords(path=str(tmp_path), heldout=0, batch_size=2).loader())
    assert str(refused.value).isprintable()
    with pytest.raises(Refused, match=message):
        LoadedRecords(path=str(tmp_path), heldout=0).check(test=False)


def test_a_share_that_leaves_no_record_is_refused_at_the_start(tmp_path):
    write(tmp_path / "a.arrayrecord", examples(9))
    for kind in (ArrayRecords, LoadedRecords):
        kind(path=str(tmp_path), heldout=0.2).check()
        with pytest.raises(
            Refused,
            match=r"ArrayRecords has no test samples; data.heldout=0.0",
        ):
            kind(path=str(tmp_path), heldout=0.0).check()
    with pytest.raises(Refused, match="has no train samples"):
        ArrayRecords(path=str(tmp_path), heldout=0.99).check()


@pytest.mark.parametrize("worth", [None, np.zeros(2), np.float32(np.nan)])
def test_records_without_worth(tmp_path, worth):
    write(
        tmp_path / "a.arrayrecord",
        [{"x": np.zeros(2), **({} if worth is None else {"worth": worth})}] * 3,
    )
    with pytest.raises(
        Refused,
        match=r"a.arrayrecord record 0: 'worth' is .*, expected a finite number",
    ):
        WeightedRecords(path=str(tmp_path), heldout=0).check(test=False)


def test_a_name_that_is_array_and_group(tmp_path):
    write(
        tmp_path / "a.arrayrecord",
        [{"cond": np.zeros(2), "cond/text": np.zeros(2)}] * 3,
    )
    with pytest.raises(
        Refused, match=r"record \d: 'cond' is an array, and a group in 'cond/text'"
    ):
        GroupedRecords(path=str(tmp_path), heldout=0).spec()


def test_files_that_are_none(tmp_path):
    (tmp_path / "a.arrayrecord").mkdir()
    with pytest.raises(Refused, match=r"a.arrayrecord: not a regular file"):
        ArrayRecords(path=str(tmp_path)).check()


def test_empty_folder(tmp_path):
    with pytest.raises(Refused, match=r"no \*.arrayrecord to train on"):
        ArrayRecords(path=str(tmp_path)).loader()


def test_groups_and_pixels(tmp_path):
    """A stroke makes a group in training, evaluation and spec alike; bytes are pixels."""
    levels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3) * 23

    def captioned(i):
        cond = {
            "cond/text": np.full((4, 2), i, np.float16),
            "cond/size": np.arange(6),
        }
        return {
            "x": np.full(3, i, np.float32),
            "image": levels + np.uint8(i),
            **cond,
        }

    write(tmp_path / "train.arrayrecord", [captioned(i) for i in range(6)])
    write(tmp_path / "test.arrayrecord", [captioned(9)])
    data = GroupedRecords(path=str(tmp_path), batch_size=2)
    batch = next(data.loader())
    held = data.evaluation(5)
    spec = data.spec()
    for got, n in ((batch, 2), (held, 1), (spec, 2)):
        assert (
            got["cond"]["text"].shape == (n, 4, 2)
            and got["cond"]["text"].dtype == np.float16
        )
        assert (
            got["image"].shape == (n, 2, 2, 3) and got["image"].dtype == np.float32
        )
    assert np.array_equal(batch["cond"]["text"][:, 0, 0], batch["x"][:, 0])
    np.testing.assert_allclose(
        held["image"][0], (levels + 9) / 127.5 - 1, rtol=1e-6, atol=1e-6
    )
