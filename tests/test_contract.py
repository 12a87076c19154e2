"""The contract of every method, checked on its toy config: roles, gradients, compilation, sharding,
checkpoint, TPU. The first stage is checked, and every later one whose program has another
structure.
"""

import dataclasses
import importlib
import re
import tokenize
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxdistill.core.net import paths
from jaxdistill.core.parts import split
from jaxdistill.core.step import all_weights
from jaxdistill.core.types import Method
from jaxdistill.run.checkpoint import Checkpoints
from tests.toys import EIGHT, ROOT, TOYS, every_stage, first_stage, staged

METHODS = sorted(
    p
    for p in (ROOT / "jaxdistill/methods").rglob("*.py")
    if not p.name.startswith("_")
)
# one of each kind: one network, several, roll-outs, an adapted one
QUICK_ON_EIGHT = ("dmd2", "gkd", "kd", "scm")


def stages_of(name: str, later: bool):
    """The first stage of a toy; or, with `later`, the stages after it whose programs have a
    structure that no earlier stage has.
    """
    if not later:
        return [first_stage(name)]
    found = {}
    for run in every_stage(name):
        found.setdefault(run.structure, run)
    return [run for run in found.values() if run.number]


def cases(quick):
    """Parameters of `ran`: toys that are not in `quick`, and later stages, are second tier."""
    full = pytest.mark.full
    first = [
        pytest.param((n, False), id=n, marks=() if n in quick else full)
        for n in TOYS
    ]
    return first + [
        pytest.param((n, True), id=f"{n}-later", marks=full) for n in staged()
    ]


@pytest.fixture(scope="module", params=cases(TOYS))
def ran(request):
    """[(stage, its steps)] of the stages of one toy."""
    runs = stages_of(*request.param)
    assert runs, "no stage of another structure than the first"
    yield [(run, run.steps()) for run in runs]
    jax.clear_caches()


def leaves(tree):
    return jax.tree.leaves(tree)


def same(a, b):
    return all(
        np.array_equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True)
    )


def test_exactly_the_declared_roles_move(ran):
    for run, steps in ran:
        turns = run.method.turns
        for active, before, after, _ in steps:
            moving = {role for i in active for role in turns[i].moves}
            written = set()
            for follow in [turns[i].after for i in active if turns[i].after]:
                written |= set(
                    jax.eval_shape(follow, all_weights(before), before.step)
                )
            for role in before.params.keys() - (written - moving):
                stood_still = same(before.params[role], after.params[role])
                assert stood_still == (role not in moving), (run.number, role)
                updates = sum(role in turns[i].moves for i in active)
                assert after.count[role] == before.count[role] + updates, (
                    run.number,
                    role,
                )
            for role in before.frozen:
                assert same(before.frozen[role], after.frozen[role]), (
                    run.number,
                    role,
                )
            assert set(after.ema) == set(run.method.ema), run.number
            assert same(before.rest, after.rest), run.number
            for role, weights in after.params.items():
                parts = split(run.nets[role], weights, None)
                assert not parts.statistics, (run.number, role)
                pattern = run.method.trains.get(role, ".*")
                for path in paths(weights):
                    assert re.fullmatch(pattern, path), (run.number, role, path)
                for path in paths(after.rest.get(role, {})):
                    assert not re.fullmatch(pattern, path), (run.number, role, path)


def test_everything_is_finite(ran):
    for run, steps in ran:
        for _, _, after, metrics in steps:
            assert all(np.isfinite(v) for v in metrics.values()), (
                run.number,
                metrics,
            )
            assert all(np.isfinite(x).all() for x in leaves(after.params)), (
                run.number
            )


def test_every_moving_role_gets_a_gradient(ran):
    for run, steps in ran:
        for active, _, _, metrics in steps:
            for i in active:
                for role in run.method.turns[i].moves:
                    assert metrics[f"{role}/grad_norm"] > 0, (run.number, role)


def test_compiles_once_for_each_pattern(ran, compilations):
    for run, _ in ran:
        for active in run.programs.patterns:
            run.last, _ = run.step(run.last, active)
    assert compilations["train_step"] == 0


@pytest.mark.full
def test_checkpoint_round_trip(ran, tmp_path):
    for run, _ in ran:
        checkpoints = Checkpoints(tmp_path / f"checkpoints{run.number}")
        checkpoints.save(1, run.last, {"stage": run.number, "data": None})
        checkpoints.wait()
        with run.context():
            step, state, _ = checkpoints.restore(
                run.programs.abstract.replace(frozen={}, rest={})
            )
        checkpoints.close()
        assert step == 1
        for part in (
            "step",
            "count",
            "params",
            "opt",
            "ema",
            "memory",
            "statistics",
        ):
            assert same(getattr(state, part), getattr(run.last, part)), (
                run.number,
                part,
            )


@pytest.mark.full
def test_lowers_for_tpu(ran, lowers_for_tpu):
    for run, _ in ran:
        with run.context():
            lowers_for_tpu(run.programs)


@pytest.mark.full
@pytest.mark.parametrize("ran", cases(QUICK_ON_EIGHT), indirect=True)
def test_eight_devices_equal_one(ran):
    """After one step per pattern, every loss is equal, and every weight to what float32 leaves of a
    step of size lr.
    """
    for run, steps in ran:
        roles = run.experiment.roles
        on_eight = run.on(EIGHT).steps()
        for (_, _, one, metrics), (_, _, eight, others) in zip(
            steps, on_eight, strict=True
        ):
            for name in metrics:
                np.testing.assert_allclose(
                    others[name], metrics[name], rtol=1e-3, atol=1e-5, err_msg=name
                )
            for role, params in one.params.items():
                lr = roles[role].optimizer.lr
                for a, b in zip(
                    leaves(params), leaves(eight.params[role]), strict=True
                ):
                    # Adam turns a gradient that is rounding noise into a step of up to lr: bound
                    # the share of such weights
                    assert np.mean(np.abs(a - b) > 1e-5 + 0.05 * lr) < 0.01, (
                        run.number,
                        role,
                    )


def test_every_method_has_a_toy_config():
    bases = ("flow_matching", "masked_lm", "sft")  # what teachers are trained by
    assert [
        m.stem for m in METHODS if m.stem not in TOYS and m.stem not in bases
    ] == []


LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.STRING,
}


def tokens(file: Path) -> int:
    """Tokens of Python, without docstrings, comments and commas before a closing bracket."""
    with file.open("rb") as stream:
        found = [
            t.string
            for t in tokenize.tokenize(stream.readline)
            if t.type not in LAYOUT
        ]
    trailing = sum(a == "," and b in ")]}" for a, b in zip(found, found[1:]))
    return len(found) - trailing


def helpers(file: Path) -> list[Path]:
    """The `_*.py` in a method's folder that it imports."""
    text = file.read_text()
    beside = file.parent.glob("_[a-z]*.py")
    return [path for path in beside if f".{path.stem} import" in text]


@pytest.mark.parametrize("file", METHODS, ids=lambda p: p.stem)
def test_method_files_are_short(file):
    """A method has about 1,700 tokens, with the helper files beside it that it uses."""
    assert tokens(file) + sum(map(tokens, helpers(file))) <= 1760


@pytest.mark.parametrize("file", METHODS, ids=lambda p: p.stem)
def test_method_files_cite_their_source(file):
    module = importlib.import_module(
        ".".join(file.relative_to(ROOT).with_suffix("").parts)
    )
    own = [
        c
        for c in vars(module).values()
        if isinstance(c, type)
        and issubclass(c, Method)
        and c.__module__ == module.__name__
    ]
    assert own, "no Method in the file"
    assert "arXiv:" in module.__doc__ or file.stem == "sft"
    assert all(
        dataclasses.is_dataclass(c) and c.__dataclass_params__.frozen for c in own
    )
