"""Types and ranges of config fields, and that every class of the library annotates its fields."""

import dataclasses
import importlib
import pkgutil
from typing import Annotated, Literal

import pytest

import jaxdistill
from jaxdistill.core import build, fields
from jaxdistill.core.types import Refused


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    size: int = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whole:
    """A field of each kind."""

    count: int = 3
    offset: int = 0
    index: int = -1
    rate: float = 0.5
    share: fields.Share = 0.5
    scale: fields.Positive = 1.0
    limit: fields.Limit = 1.0
    flag: bool = False
    text: str = "a"
    kind: Literal["near", "far"] = "near"
    times: tuple[float, ...] = (1.0,)
    pair: tuple[int, int] = (1, 2)
    steps: tuple[fields.Count, ...] = (1,)
    part: Part = Part()
    either: float | Part = 1.0
    layers: Annotated[int, fields.Range(1, 8)] = 2


NAN = float("nan")
INF = float("inf")
GOOD = {
    "count": (1, 10**6),
    "offset": (0, 7),
    "index": (-1, 0, 5),
    "rate": (-1.0, 0, 1e30),
    "share": (0, 1, 0.3),
    "scale": (1e-9,),
    "limit": (0.0, INF),
    "flag": (True,),
    "text": ("",),
    "kind": ("far",),
    "times": ((), [1, 2.5]),
    "pair": ((3, 4),),
    "steps": ((4, 2),),
    "part": (Part(size=9),),
    "either": (2, Part()),
    "layers": (8,),
}
BAD = {
    "count": (0, -1, 1.5, "3", True, None, 10**12, [1]),
    "offset": (-1, NAN),
    "index": (-2,),
    "rate": (NAN, INF, "x", False, None),
    "share": (1.5, -0.1, NAN),
    "scale": (0, -1.0, INF),
    "limit": (-1.0, NAN),
    "flag": (1, "true"),
    "text": (1, None, ["a"]),
    "kind": ("nearr", 3, None),
    "times": (1.0, ("a",), (NAN,), None),
    "pair": ((1,), (1, 2, 3), (1.0, 2)),
    "steps": ((0,),),
    "part": (4, None, "x"),
    "either": ("x",),
    "layers": (9, 0),
}


@pytest.mark.parametrize(
    ("field", "value"), [(k, v) for k, values in GOOD.items() for v in values]
)
def test_takes(field, value):
    assert fields.problem(Whole, field, value) == ""


@pytest.mark.parametrize(
    ("field", "value"), [(k, v) for k, values in BAD.items() for v in values]
)
def test_refuses_in_one_line(field, value):
    text = fields.problem(Whole, field, value)
    assert text.startswith("expected ")
    assert "\n" not in text


def test_a_misspelt_choice_names_the_nearest():
    assert "did you mean 'near'?" in fields.problem(Whole, "kind", "nearr")


def test_an_integer_for_a_number_becomes_one():
    made = build.made(
        Whole, "Whole", {"rate": 2, "share": 1, "count": 2}, "config.whole"
    )
    assert [type(v) for v in (made.rate, made.share, made.count)] == [
        float,
        float,
        int,
    ]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"rate": "x"}, r"^config\.whole\.rate='x': expected a number$"),
        ({"part": 3}, r"^config\.whole\.part=3: expected a Part$"),
        (
            {"raet": 1},
            r"^config\.whole: Whole has no field 'raet'; did you mean 'rate'\?$",
        ),
    ],
)
def test_messages_name_the_place_in_the_config(values, text):
    with pytest.raises(Refused, match=text):
        build.made(Whole, "Whole", values, "config.whole")


def test_what_a_class_says_itself_is_located_too():
    """A refusal by `__post_init__` starts with the field, or with the name of the part."""
    for text, wanted in (
        (
            "ema.rate=2: expected less",
            "config.roles.student.ema.rate=2: expected less",
        ),
        ("rate=2: expected less", "config.roles.student.ema.rate=2: expected less"),
        ("two of them", "config.roles.student.ema: two of them"),
        ("config.x: there", "config.x: there"),
    ):
        assert (
            str(build.located("config.roles.student.ema", Refused(text))) == wanted
        )


def test_every_dataclass_of_the_library_has_annotations_that_can_be_read():
    """Fields without a readable annotation would not be checked. Every default fits its own
    annotation.
    """
    count = 0
    for info in pkgutil.walk_packages(jaxdistill.__path__, "jaxdistill."):
        module = importlib.import_module(info.name)
        for cls in vars(module).values():
            if (
                dataclasses.is_dataclass(cls)
                and isinstance(cls, type)
                and cls.__module__ == module.__name__
            ):
                hints = fields.hints(cls)
                for field in dataclasses.fields(cls):
                    if field.default is not dataclasses.MISSING:
                        text = fields._problem(hints[field.name], field.default)
                        assert not text or cls is fields.Range, (
                            cls,
                            field.name,
                            text,
                        )
                        count += 1
    assert count > 500
