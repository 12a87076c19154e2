"""What holds for every method, checked on its toy config: roles, gradients, compilation, sharding,
checkpoint, TPU.
"""

import dataclasses
import importlib
import tokenize
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxdistill.core import build, sharding
from jaxdistill.core.sharding import MeshShape
from jaxdistill.core.step import bound
from jaxdistill.core.types import Method
from jaxdistill.run import loop
from jaxdistill.run.checkpoint import Checkpoints
from jaxdistill.run.experiment import Experiment

ROOT = Path(__file__).parents[1]
TOYS = sorted(p.stem for p in (ROOT / "configs/toy").glob("[!_]*.py"))
METHODS = sorted(
    p for p in (ROOT / "jaxdistill/methods").rglob("*.py") if not p.name.startswith("_")
)


def toy(name: str):
    return importlib.import_module(f"configs.toy.{name}").get_config()


class Setup:
    """A toy experiment with random weights in place of those it would load."""

    def __init__(self, name: str, shape: sharding.MeshShape, config=None):
        config = config or toy(name)
        config.mesh = build.plain(MeshShape(**dataclasses.asdict(shape)))
        self.experiment = Experiment(config, Path("unused"))
        with self.context():
            stage = self.experiment.method.stages(self.experiment.settings.steps)[0]
            start = {}
            for i, (role, net) in enumerate(self.experiment.nets.items()):
                if role in self.experiment.method.frozen:
                    start[role] = net.init(jax.random.key(10 + i))
                # away from 0, where a loss that compares an adapted network with its base has no
                # gradient
                elif net.adapts:
                    start[role] = jax.tree.map(lambda w: w + 0.01, net.init(jax.random.key(10 + i)))
            self.method = stage.method
            nets = self.experiment.nets
            batch = self.experiment.data.batch(0, slice(None))
            if stage.surgery is not None:
                nets, start = stage.surgery(
                    nets, start, {k: jax.numpy.asarray(v) for k, v in batch.items()}
                )
            if stage.collect is not None:
                make = lambda b: stage.collect.make(
                    loop.bind(nets, start), loop.Ctx(b, jax.random.key(0), jax.numpy.int32(0), {})
                )
                batch = {k: np.asarray(v) for k, v in jax.jit(make)(batch).items()}
            spec = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch.items()}
            self.programs = loop.make_programs(self.experiment, nets, stage, start, spec)
            self.batch = sharding.put_batch(self.experiment.mesh, self.experiment.settings.rules)(
                batch
            )
            self.state = lambda: self.programs.init(jax.random.key(0), start)
            self.stage = stage
            self.nets = nets

    def context(self):
        return sharding.use(self.experiment.mesh, self.experiment.settings.rules)

    def steps(self):
        """(state before, state after, metrics) of one step for each pattern of turns, as numpy."""
        out = []
        with self.context():
            state = self.state()
            for active in self.programs.patterns:
                before = jax.device_get(state)
                state, metrics = self.programs.step(state, self.batch, jax.random.key(1), active)
                out.append((active, before, jax.device_get(state), jax.device_get(metrics)))
        self.last = state
        return out


ONE = sharding.MeshShape(data=1, fsdp=1, tensor=1)
EIGHT = sharding.MeshShape(data=2, fsdp=2, tensor=2)


@pytest.fixture(scope="module", params=TOYS)
def ran(request):
    setup = Setup(request.param, ONE)
    yield setup, setup.steps()
    jax.clear_caches()


def leaves(tree):
    return jax.tree.leaves(tree)


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


def test_exactly_the_declared_roles_move(ran):
    setup, steps = ran
    for active, before, after, _ in steps:
        moving = {role for i in active for role in setup.method.turns[i].moves}
        followers = [setup.method.turns[i].after for i in active if setup.method.turns[i].after]
        written = {
            role
            for follow in followers
            for role in jax.eval_shape(follow, bound(setup.nets, before), before.step)
        }
        for role in before.params.keys() - (written - moving):
            assert same(before.params[role], after.params[role]) == (role not in moving), role
            assert after.count[role] == before.count[role] + sum(
                role in setup.method.turns[i].moves for i in active
            )
        for role in before.frozen:
            assert same(before.frozen[role], after.frozen[role]), role
        assert set(after.ema) == set(setup.method.ema)


def test_everything_is_finite(ran):
    for _, _, after, metrics in ran[1]:
        assert all(np.isfinite(v) for v in metrics.values()), metrics
        assert all(np.isfinite(x).all() for x in leaves(after.params))


def test_every_moving_role_gets_a_gradient(ran):
    setup, steps = ran
    for active, _, _, metrics in steps:
        for i in active:
            for role in setup.method.turns[i].moves:
                assert metrics[f"{role}/grad_norm"] > 0, role


def test_compiles_once_for_each_pattern(ran, compilations):
    setup, _ = ran
    with setup.context():
        for active in setup.programs.patterns:
            setup.last, _ = setup.programs.step(setup.last, setup.batch, jax.random.key(1), active)
    assert compilations["train_step"] == 0


def test_checkpoint_round_trip(ran, tmp_path):
    setup, _ = ran
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, setup.last, {"stage": 0, "data": None})
    checkpoints.wait()
    with setup.context():
        step, state, _ = checkpoints.restore(setup.programs.abstract.replace(frozen={}))
    checkpoints.close()
    assert step == 1
    for part in ("step", "count", "params", "opt", "ema", "memory"):
        assert same(getattr(state, part), getattr(setup.last, part)), part


def test_lowers_for_tpu(ran, lowers_for_tpu):
    with ran[0].context():
        lowers_for_tpu(ran[0].programs)


def test_eight_devices_equal_one(ran):
    """After one step per pattern: every loss, and every weight to what float32 leaves of a step of
    size lr.
    """
    setup, steps = ran
    sharded = Setup(setup.experiment.config.method.name.split(".")[-1].split(":")[0], EIGHT)
    for (_, _, one, metrics), (_, _, eight, others) in zip(steps, sharded.steps(), strict=True):
        for name in metrics:
            np.testing.assert_allclose(
                others[name], metrics[name], rtol=1e-3, atol=1e-5, err_msg=name
            )
        for role, params in one.params.items():
            lr = setup.experiment.roles[role].optimizer.lr
            for a, b in zip(leaves(params), leaves(eight.params[role]), strict=True):
                # Adam turns a gradient that is rounding noise into a step of up to lr: bound the
                # share of such weights
                assert np.mean(np.abs(a - b) > 1e-5 + 0.05 * lr) < 0.01, role


def test_every_method_has_a_toy_config():
    bases = ("flow_matching", "masked_lm", "sft")  # what teachers are trained by
    assert [m.stem for m in METHODS if m.stem not in TOYS and m.stem not in bases] == []


@pytest.mark.parametrize("file", METHODS, ids=lambda p: p.stem)
def test_method_files_are_short(file):
    """About 1,700 tokens of Python, docstrings and comments apart, however they are laid out."""
    apart = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.STRING,
    }
    with file.open("rb") as stream:
        assert sum(token.type not in apart for token in tokenize.tokenize(stream.readline)) <= 1760


@pytest.mark.parametrize("file", METHODS, ids=lambda p: p.stem)
def test_method_files_cite_their_source(file):
    module = importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))
    own = [
        c
        for c in vars(module).values()
        if isinstance(c, type) and issubclass(c, Method) and c.__module__ == module.__name__
    ]
    assert own, "no Method in the file"
    assert "arXiv:" in module.__doc__ or file.stem == "sft"
    assert all(dataclasses.is_dataclass(c) and c.__dataclass_params__.frozen for c in own)
