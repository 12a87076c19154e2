"""Tables of config.json's keys: what is written is read again, and refusals name file and key."""

import dataclasses
import json
from pathlib import Path

import pytest

from jaxdistill import interop
from jaxdistill.core.types import Refused
from jaxdistill.interop.keys import (
    OMITTED,
    Field,
    Fixed,
    Implied,
    Read,
    Written,
    check_implied,
    listed,
    named,
    one_of,
    optional,
    read_keys,
    same,
    token,
    tokens,
    write_keys,
)

FILE = Path("config.json")


@dataclasses.dataclass
class Sizes:
    dim: int = 8
    heads: int = 2
    widths: tuple[int, ...] = (1, 2)
    shift: float = 0.0
    gated: bool = False
    eos: tuple[int, ...] = ()
    pad: int = -1


KEYS = (
    same("heads", "num_heads"),
    Field(
        field="dim",
        key="head_dim",
        read=lambda size, config: size * config["num_heads"],
        write=lambda ours: ours.dim // ours.heads,
    ),
    listed("widths", "widths", missing=[3]),
    optional("shift", "shift", none=0.0),
    named("gated", "mlp", {"relu": False, "glu": True}, missing="relu"),
    tokens("eos", "eos", missing=1),
    token("pad", "pad", missing=0),
    Fixed("act", "silu"),
    Implied("total", lambda ours: sum(ours.widths)),
    Written("use_cache", True),
    Written("optional", lambda ours: OMITTED),
)


@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(),
        Sizes(dim=12, heads=3, widths=(), shift=0.5, gated=True, eos=(4,), pad=0),
        Sizes(eos=(4, 5)),
    ],
)
def test_what_is_written_is_read(sizes):
    written = write_keys(KEYS, sizes)
    assert list(written) == [key.key for key in KEYS if key.key != "optional"]
    found = Sizes(**read_keys(KEYS, json.loads(json.dumps(written)), FILE))
    assert found == sizes
    check_implied(KEYS, found, written, FILE)


def test_missing_keys_and_null():
    found = read_keys(KEYS, {"num_heads": 2, "head_dim": 4}, FILE)
    assert Sizes(**found) == Sizes(widths=(3,), eos=(1,), pad=0)
    nulls = {"num_heads": 2, "head_dim": 4, "shift": None, "eos": None, "pad": None}
    assert Sizes(**read_keys(KEYS, nulls, FILE)) == Sizes(widths=(3,))
    for values, message in (
        ({"head_dim": 4}, "config.json: num_heads is missing"),
        ({"num_heads": None, "head_dim": 4}, "config.json: num_heads is null"),
        (
            {"num_heads": 2, "head_dim": 4, "widths": None},
            "config.json: widths is null",
        ),
    ):
        with pytest.raises(Refused, match=message):
            read_keys(KEYS, values, FILE)


def test_values_that_are_not_supported():
    given = {"num_heads": 2, "head_dim": 4}
    for values, message in (
        (
            {"act": "gelu"},
            "config.json: act='gelu' is not supported, expected 'silu'",
        ),
        ({"mlp": "gl"}, "config.json: mlp='gl': did you mean 'glu'"),
    ):
        with pytest.raises(Refused, match=message):
            read_keys(KEYS, given | values, FILE)
    with pytest.raises(
        Refused, match=r"config.json: total=4 is not supported, expected 3"
    ):
        check_implied(KEYS, Sizes(), {"total": 4}, FILE)
    norms = (one_of("gated", "norm", {None: False, "rms": True}, missing=None),)
    assert [
        read_keys(norms, v, FILE) for v in ({}, {"norm": None}, {"norm": "rms"})
    ] == [
        {"gated": False},
        {"gated": False},
        {"gated": True},
    ]
    with pytest.raises(
        Refused, match=r"norm='layer' is not supported, expected None or 'rms'"
    ):
        read_keys(norms, {"norm": "layer"}, FILE)


@pytest.mark.parametrize("family", interop.FAMILIES, ids=lambda family: family.name)
def test_every_key_stands_once_and_every_field_exists(family):
    keys = [key.key for key in family.keys if not isinstance(key, Read)]
    fields = [
        key.field
        for key in family.keys
        if isinstance(key, Field | Read) and key.field
    ]
    assert len(set(keys)) == len(keys)
    assert len(set(fields)) == len(fields)
    assert set(fields) <= {
        field.name for field in dataclasses.fields(family.config)
    }
