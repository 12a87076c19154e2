"""Every field of a method acts: the code that its members reach reads it. A variant that has no use
for one does not take it.
"""

import ast
import dataclasses
import functools
import importlib
import inspect
import textwrap
from pathlib import Path

import pytest

from jaxdistill.core import build
from jaxdistill.core.types import Method, Refused
from jaxdistill.methods.distribution import di_star, sds, sid, sida, sim, swiftbrush

ROOT = Path(__file__).parents[2]
FOLDERS = ("trajectory", "distribution")
# what the engine calls
ENTRIES = {name for name in vars(Method) if not name.startswith("__")} | {
    "__post_init__",
    "process",
}


def methods():
    for folder in FOLDERS:
        for file in sorted((ROOT / "jaxdistill/methods" / folder).glob("*.py")):
            module = importlib.import_module(
                ".".join(file.relative_to(ROOT).with_suffix("").parts)
            )
            own = [
                c
                for c in vars(module).values()
                if isinstance(c, type) and c.__module__ == module.__name__
            ]
            yield from (c for c in own if issubclass(c, Method))


@functools.cache
def members(cls) -> dict[str, ast.AST]:
    """name -> syntax of what a class's body itself defines."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    made = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
    return made | {
        target.id: node
        for node in body
        if isinstance(node, ast.Assign)
        for target in node.targets
    }


def reads(cls) -> set[str]:
    """The names that are read as attributes, or stand in strings, in what `cls` reaches from the
    engine's calls.
    """
    chain = [
        members(c)
        for c in cls.__mro__
        if c is cls or c.__module__.startswith("jaxdistill.methods")
    ]
    of = lambda name: [body[name] for body in chain if name in body]
    todo = [node for name in ENTRIES for node in of(name)[:1]]
    seen = set()
    found = set()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        for part in ast.walk(node):
            if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Load):
                found.add(part.attr)
                above = (
                    isinstance(part.value, ast.Call)
                    and getattr(part.value.func, "id", "") == "super"
                )
                todo += of(part.attr) if above else of(part.attr)[:1]
            elif isinstance(part, ast.Constant):
                found.add(part.value)
    return found


@pytest.mark.parametrize(
    "cls",
    list(methods()),
    ids=lambda c: f"{c.__module__.rpartition('.')[2]}.{c.__name__}",
)
def test_every_field_is_read(cls):
    idle = {field.name for field in dataclasses.fields(cls) if field.init} - reads(
        cls
    )
    if issubclass(cls, sds.ScoreDistillation):
        # taken, so that it may be given its host's guidance
        idle -= {"fake_guidance"}
    assert not idle, (
        f"{cls.__name__} accepts {sorted(idle)} and does nothing with them"
    )


def test_a_field_that_nothing_reaches_is_found():
    class Idle(sid.SiD):
        def identity(self, x0, real, fake):
            return x0

    assert {"alpha", "scale"} <= {
        field.name for field in dataclasses.fields(Idle)
    } - reads(Idle)


@pytest.mark.parametrize(
    "cls, field",
    [
        (sds.SDS, "fake_times"),
        (sds.DDS, "critic_steps"),
        (swiftbrush.SDS, "fake_dropout"),
        (sim.SIM, "alpha"),
        (di_star.DIStar, "alpha"),
        (sida.SiDA, "divergence"),
    ],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_a_variant_does_not_take_what_it_has_no_use_for(cls, field):
    with pytest.raises(Refused, match=f"has no field '{field}'"):
        build.spec(
            f"{cls.__module__.removeprefix('jaxdistill.')}:{cls.__name__}",
            **{field: None},
        )
