"""Writes tests/golden/<recipe>.txt, descriptions of what the recipes make.

python tools/golden.py [--only=dmd2,kd]

A file has the recipe's config, a line for each weight of each role (path, shape, dtype, logical
axes, initialiser; of trained roles also whether weight decay applies and the factor of the learning
rate), and the bytes of the state at the first stage, over all devices. No weights are allocated.
tests/test_golden.py compares the files, so that a changed default shows as a difference.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import operator
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal
from tqdm import tqdm

from jaxdistill.core import sharding
from jaxdistill.core.net import Net, is_spec, paths
from jaxdistill.core.optim import decayed
from jaxdistill.core.parts import like
from jaxdistill.core.rates import Rates, rate_factors
from jaxdistill.core.step import complete, init_state, parts_of
from jaxdistill.core.types import State, lookup
from jaxdistill.run import programs
from jaxdistill.run.experiment import Experiment
from launch._command import arguments, main
from tools import recipes, stand_ins

FOLDER = Path(__file__).parents[1] / "tests/golden"


def golden(argv):
    values, _ = arguments(argv, {"only": ""})
    only = [name for name in values["only"].split(",") if name]
    for name in only:
        lookup(recipes.RECIPES, name, "--only")
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        files = stand_ins.write(Path(folder))
        for name in tqdm(only or recipes.RECIPES, desc="golden", unit="recipe"):
            file_of(name).write_text(text_of(name, files))
    print(FOLDER)


def file_of(recipe: str) -> Path:
    """The golden file of "recipe" or "recipe:variant"."""
    return FOLDER / f"{recipe.replace(':', '.')}.txt"


def text_of(recipe: str, files: Mapping[str, Path]) -> str:
    """The text of the golden file of a recipe; `files` are those of `stand_ins.write`."""
    experiment = Experiment(
        stand_ins.load(f"recipes.{recipe}", files), Path("unused")
    )
    mesh = sharding.make_mesh(
        sharding.MeshShape(data=1, fsdp=1, tensor=1), jax.devices()[:1]
    )
    experiment.__dict__["mesh"] = mesh
    with sharding.use(mesh, experiment.settings.rules):
        nets, state = first_state(experiment)
        lines = [*config_lines(recipe), "", *weight_lines(experiment, nets, state)]
    return "\n".join([*lines, *byte_lines(nets, state)]) + "\n"


def config_lines(recipe: str) -> Iterator[str]:
    """The recipe's config with its own data: lines "dotted.key = value", sorted."""
    config = stand_ins.config_of(f"recipes.{recipe}")
    yield "# config"
    for key, value in sorted(dotted(json.loads(config.to_json()))):
        yield f"{key} = {json.dumps(value)}"


def dotted(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf; an empty group is a leaf."""
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def first_state(experiment: Experiment) -> tuple[dict[str, Net], State]:
    """The networks of the first stage, and its state as shapes: after surgery, before training."""
    method = experiment.method
    roles = experiment.roles
    stage = method.stages(experiment.settings.steps)[0]
    named = [
        role for role in roles if roles[role].init and role not in experiment.inits
    ]
    warm = dict.fromkeys([*method.frozen, *named])
    start = {
        role: experiment.abstract(experiment.nets[role], role) for role in warm
    }
    uncollected = dataclasses.replace(stage, collect=None, pool=None)
    nets, start, _ = programs.abstract_start(
        experiment, uncollected, experiment.nets, start
    )
    updates = {}
    for role in stage.method.inits:
        turns = [turn for turn in stage.method.turns if role in turn.moves]
        updates[role] = int(
            any(turn.when(step) for turn in turns for step in range(stage.steps))
        )
    optimisers = programs.optimizers(experiment, nets, stage, updates)
    inits = experiment.inits_of(stage.method)

    def make(start: Mapping[str, Any]) -> State:
        key = jax.random.key(0)
        return init_state(stage.method, nets, optimisers, key, start, inits)

    return nets, jax.eval_shape(make, start)


def weight_lines(
    experiment: Experiment, nets: Mapping[str, Net], state: State
) -> Iterator[str]:
    """A block for each role; where an earlier role has the same lines, its name instead."""
    written = {}
    for role, net in nets.items():
        trained = role in state.params
        frozen = (
            experiment.abstract(net, role)
            if role not in state.frozen
            else state.frozen[role]
        )
        kind = "trained" if trained else "frozen"
        if role not in {**state.params, **state.frozen}:
            kind = "of another stage"
        yield f"# {role}: {kind}, from {experiment.source(role)}, {net.size:,} weights"
        if trained:
            rates = experiment.roles[role].optimizer.rates
            lines = tuple(lines_of(net, state.params[role], True, rates))
            resting = complete(state, role, {})
            lines += tuple(lines_of(net, resting, False))
        else:
            lines = tuple(lines_of(net, frozen, False))
        if lines in written:
            yield f"as {written[lines]}"
        elif lines:
            written[lines] = role
            yield from lines
        yield ""


def lines_of(
    net: Net, weights: Any, trained: bool, rates: Rates = ()
) -> Iterator[str]:
    """A line for each weight of one role, with the factors that `rates` gives a trained one."""
    names = paths(net.axes, is_leaf=is_spec)
    drawn = paths(initialisers(net))
    decay = paths(decayed(weights, like(net.axes, weights))) if trained else {}
    factors = rate_factors(rates, weights)
    for path, weight in sorted(paths(weights).items()):
        shape = list(weight.shape)
        axes = ", ".join(str(name) for name in names.get(path) or ())
        line = (
            f"{path}  {shape} {weight.dtype} ({axes})  {drawn.get(path, 'derived')}"
        )
        if trained:
            word = "decay" if decay[path] else "no decay"
            line += f"  {word}  lr * {factors[path]:g}"
        yield line


def byte_lines(nets: Mapping[str, Net], state: State) -> Iterator[str]:
    """A line for each role: the bytes of its weights, optimiser state and average."""
    yield "# bytes of the state"
    for role in nets:
        sizes = []
        for part, tree in parts_of(state, role).items():
            leaves = jax.tree.leaves(tree)
            size = sum(
                math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves
            )
            sizes.append(f"{part} {size:,}")
        yield f"{role}: {', '.join(sizes)}"


# Initialisers are found in the traced program of `net.init`. A value in it is known as a constant
# or as a draw from a distribution times a constant plus a constant; None stands for all others.


@dataclasses.dataclass(frozen=True)
class Draw:
    """scale * (a draw from `distribution`) + shift; no distribution: the constant `shift`."""

    distribution: str = ""
    scale: float = 0.0
    shift: float = 0.0

    def __str__(self) -> str:
        if not self.distribution:
            return {0.0: "zeros", 1.0: "ones"}.get(
                self.shift, f"constant {self.shift:.4g}"
            )
        scaled = f"{self.distribution} * {self.scale:.4g}"
        return f"{scaled} + {self.shift:.4g}" if self.shift else scaled


CONSTANTS = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "pow": operator.pow,
    "max": max,
    "min": min,
    "neg": operator.neg,
    "sqrt": math.sqrt,
    "rsqrt": lambda x: 1 / math.sqrt(x),
    "exp": math.exp,
    "log": math.log,
    "square": lambda x: x * x,
}
# Operations that change the place or the storage of values only.
SAME = {
    "broadcast_in_dim",
    "concatenate",
    "convert_element_type",
    "copy",
    "copy_p",
    "expand_dims",
    "reshape",
    "rev",
    "sharding_constraint",
    "slice",
    "squeeze",
    "stop_gradient",
    "transpose",
}
DISTRIBUTIONS = ("_truncated_normal", "_normal", "_uniform", "_orthogonal")


def initialisers(net: Net) -> Any:
    """The initialisers in the structure of the weights, such as "truncated_normal * 0.0361"."""
    try:
        return _initialisers(net)
    except TypeError:  # not hashable
        return _initialisers.__wrapped__(net)


@functools.lru_cache(64)
def _initialisers(net: Net) -> Any:
    key = jax.eval_shape(lambda: jax.random.key(0))
    traced, shapes = jax.make_jaxpr(net.init, return_shape=True)(key)
    found = followed(traced, [None])
    texts = ["computed" if draw is None else str(draw) for draw in found]
    return jax.tree.unflatten(jax.tree.structure(shapes), texts)


def followed(
    closed: ClosedJaxpr, inputs: Sequence[Draw | None]
) -> list[Draw | None]:
    """The outputs of a traced program as draws or constants, from its inputs."""
    jaxpr = closed.jaxpr
    known = dict(zip(jaxpr.invars, inputs))
    known |= zip(jaxpr.constvars, map(table, closed.consts))

    def read(variable: Any) -> Draw | None:
        return (
            table(variable.val)
            if isinstance(variable, Literal)
            else known.get(variable)
        )

    for equation in jaxpr.eqns:
        given = [read(v) for v in equation.invars]
        known |= zip(equation.outvars, results(equation, given))
    return [read(v) for v in jaxpr.outvars]


def table(value: Any) -> Draw | None:
    """An array in the program: a constant where all entries are equal, else its mean and spread."""
    array = (
        np.asarray(value)
        if np.ndim(value) == 0 or hasattr(value, "shape")
        else None
    )
    if array is None or array.dtype.kind not in "biuf" or not array.size:
        return None
    if (array == array.flat[0]).all():
        return Draw(shift=float(array.flat[0]))
    return Draw(
        f"table of mean {array.mean():.4g} and deviation {array.std():.4g}", 1.0
    )


def results(equation: Any, given: list[Draw | None]) -> list[Draw | None]:
    """The outputs of one equation as draws or constants, from its inputs."""
    name = equation.primitive.name
    if name in SAME and None not in given and len(set(given)) == 1:
        return [given[0]]
    inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
    if isinstance(inner, ClosedJaxpr):
        called = equation.params.get("name", "")
        if called in DISTRIBUTIONS:
            return [distribution(called.removeprefix("_"), given[1:])]
        return followed(inner, given)
    if name in CONSTANTS and None not in given:
        return [combined(name, *given)]
    if name == "erf_inv" and given == [Draw("uniform(-1, 1)", 1.0)]:
        return [Draw("normal", math.sqrt(0.5))]  # as newer versions of JAX write it
    if name == "integer_pow" and given[0] is not None and not given[0].distribution:
        return [Draw(shift=given[0].shift ** equation.params["y"])]
    return [None] * len(equation.outvars)


def distribution(name: str, limits: Sequence[Draw | None]) -> Draw:
    """A draw from a distribution; the names of uniform and truncated ones have their limits."""
    bounds = ", ".join(
        "?" if limit is None else f"{limit.shift:.4g}" for limit in limits
    )
    return Draw(f"{name}({bounds})" if bounds else name, 1.0)


def combined(name: str, *given: Draw) -> Draw | None:
    """An elementwise operation on constants, or on a draw and a constant."""
    drawn = [draw for draw in given if draw.distribution]
    if not drawn:
        return Draw(shift=float(CONSTANTS[name](*(draw.shift for draw in given))))
    if len(drawn) > 1 or name not in ("add", "sub", "mul", "div", "neg"):
        return None
    draw = drawn[0]
    if name == "neg":
        return Draw(draw.distribution, -draw.scale, -draw.shift)
    first, second = given
    if name in ("mul", "div"):
        if name == "div" and second.distribution:
            return None
        factor = (second if first.distribution else first).shift
        factor = 1 / factor if name == "div" else factor
        return Draw(draw.distribution, draw.scale * factor, draw.shift * factor)
    sign = -1 if name == "sub" else 1
    if first.distribution:
        return Draw(draw.distribution, draw.scale, draw.shift + sign * second.shift)
    return Draw(
        draw.distribution, sign * draw.scale, first.shift + sign * draw.shift
    )


if __name__ == "__main__":
    main(golden)
