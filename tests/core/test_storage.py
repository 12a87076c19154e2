"""Frozen roles stored in eight bits or in host memory: values, bytes, memory spaces, a complete
run.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core import sharding
from jaxdistill.core.build import Role, experiment
from jaxdistill.core.lora import adapt
from jaxdistill.core.net import is_quantized, make_net, materialise, paths
from jaxdistill.core.optim import Optimizer
from jaxdistill.core.sharding import MeshShape
from jaxdistill.core.storage import quantized
from jaxdistill.core.types import Refused
from jaxdistill.data.digits import Digits
from jaxdistill.diffusion.denoiser import Denoiser, Velocity
from jaxdistill.evals.images import ImageEval
from jaxdistill.methods.distribution.diff_instruct import DiffInstruct
from jaxdistill.methods.trajectory.flow_matching import FlowMatching
from jaxdistill.models.denoisers.dit import DiT
from jaxdistill.run import loop
from jaxdistill.run.experiment import Experiment

pytest.importorskip("qwix", reason="no qwix: pip install 'jaxdistill[int8]'")
MODEL = DiT(size=8, patch=2, dim=32, depth=3, heads=4)


@pytest.fixture(scope="module")
def nets():
    plain = make_net(MODEL)
    params = jax.jit(plain.init)(jax.random.key(0))
    noise = iter(jax.random.split(jax.random.key(1), 100))
    # no layer is zero
    params = jax.tree.map(
        lambda w: w + 0.02 * jax.random.normal(next(noise), w.shape), params
    )
    packed = quantized(plain, "int8")
    return plain, params, packed, packed.from_source(params)


@pytest.fixture(scope="module")
def inputs():
    return (
        jax.random.normal(jax.random.key(2), (4, 8, 8, 1)),
        jnp.linspace(0.1, 0.9, 4),
        jnp.arange(4),
    )


@pytest.mark.full
def test_every_weight_is_within_half_a_step(nets):
    """Symmetric rounding to 127 levels: |w - w'| <= max |w| / 254, the maximum over a channel of
    one layer.
    """
    _, params, _, held = nets
    for (path, w), packed in zip(
        paths(params).items(),
        jax.tree.leaves(held, is_leaf=is_quantized),
        strict=True,
    ):
        if not is_quantized(packed):
            np.testing.assert_array_equal(w, packed)
            continue
        assert packed.qvalue.dtype == jnp.int8 and packed.qvalue.shape == w.shape
        axis = (
            tuple(range(1, w.ndim - 1))
            if path.startswith("blocks")
            else tuple(range(w.ndim - 1))
        )
        bound = jnp.max(jnp.abs(w), axis, keepdims=True) / 254
        assert np.all(np.abs(w - materialise(packed)) <= bound * (1 + 1e-4))


def test_matrices_are_packed_and_vectors_are_not(nets):
    for path, w in paths(nets[1]).items():
        vector = w.ndim - path.startswith("blocks") < 2
        leaf = functools.reduce(
            lambda tree, key: tree[key], path.split("/"), nets[3]
        )
        assert is_quantized(leaf) != vector, path


def test_shapes_and_axes_are_those_of_what_is_held(nets):
    _, _, packed, held = nets
    assert jax.tree.map(lambda w: (w.shape, w.dtype), held) == jax.tree.map(
        lambda s: (s.shape, s.dtype), packed.shapes
    )
    ranks = jax.tree.map(
        lambda w, names: w.ndim >= len(names),
        held,
        jax.tree.map(tuple, packed.axes, is_leaf=lambda x: isinstance(x, tuple)),
    )
    assert all(jax.tree.leaves(ranks))


def test_output_is_that_of_the_rounded_weights(nets, inputs):
    """Rounding is the only difference: dequantising a layer at a time equals dequantising
    beforehand.
    """
    plain, params, packed, held = nets
    rounded = jax.jit(plain.apply)(materialise(held), *inputs)
    np.testing.assert_allclose(
        jax.jit(packed.apply)(held, *inputs), rounded, rtol=1e-5, atol=1e-5
    )
    exact = jax.jit(plain.apply)(params, *inputs)
    assert 0 < np.abs(rounded - exact).max() < 0.05 * np.std(exact)


def test_gradient_reaches_the_input(nets, inputs):
    _, _, packed, held = nets
    x, t, cond = inputs
    grad = jax.jit(jax.grad(lambda x: packed.apply(held, x, t, cond).sum()))(x)
    plain = jax.jit(
        jax.grad(lambda x: nets[0].apply(materialise(held), x, t, cond).sum())
    )(x)
    np.testing.assert_allclose(grad, plain, rtol=1e-4, atol=1e-5)


def test_adapters_on_a_packed_base(nets, inputs):
    plain, _, _, held = nets
    net = adapt(plain, base="teacher", rank=2)
    adapter = jax.tree.map(lambda w: w + 0.1, net.init(jax.random.key(3)))
    out = [
        jax.jit(net.apply)({"base": base, "adapter": adapter}, *inputs)
        for base in (held, materialise(held))
    ]
    np.testing.assert_allclose(*out, rtol=1e-5, atol=1e-5)


def test_adapters_of_a_packed_network(nets):
    """The patterns match the paths of the weights, packed or not."""
    plain, _, packed, held = nets
    net = adapt(packed, base="teacher", rank=2, full=".*bias")
    assert net.shapes == adapt(plain, base="teacher", rank=2, full=".*bias").shapes
    params = {"teacher": held, "student": net.init(jax.random.key(3))}
    merged = net.whole_weights("student", params)
    assert jax.tree.structure(materialise(merged)) == jax.tree.structure(
        plain.shapes
    )


def test_host_weights_are_fetched_layer_by_layer(nets, inputs):
    """The traced program sees the blocks in host memory and copies one layer at a time."""
    plain, params, _, _ = nets
    mesh = sharding.make_mesh(sharding.MeshShape(fsdp=1))
    where = sharding.in_memory(
        "host",
        sharding.fits(
            sharding.param_shardings(mesh, sharding.Rules(), plain.axes),
            plain.shapes,
        ),
        plain.axes,
    )
    away = jax.device_put(params, where)
    for path, w in paths(away).items():
        vector = w.ndim - path.startswith("blocks") < 2
        assert (w.sharding.memory_kind == "pinned_host") != vector, path
    np.testing.assert_allclose(
        jax.jit(plain.apply)(away, *inputs),
        jax.jit(plain.apply)(params, *inputs),
        rtol=1e-6,
        atol=1e-6,
    )
    text = str(jax.make_jaxpr(plain.apply)(away, *inputs))
    copied = [line for line in text.splitlines() if "device_put" in line]
    # never the stack of three layers
    assert copied and not any("[3,32" in line.split("=")[0] for line in copied)


def config(**teacher):
    model = dict(
        model=DiT(size=8, patch=4, dim=16, depth=2, heads=2),
        denoiser=Denoiser(param=Velocity(time_scale=1000.0)),
    )
    flow = experiment(
        steps=3,
        data=Digits(batch_size=8),
        method=FlowMatching(),
        roles=dict(student=Role(**model, init="fresh")),
        checkpoint_every=3,
        tensorboard=False,
    )
    return experiment(
        steps=4,
        runs=dict(teacher=flow),
        data=Digits(batch_size=8),
        method=DiffInstruct(),
        roles=dict(
            teacher=Role(init="@teacher", **teacher),
            student=Role(optimizer=Optimizer(lr=1e-3)),
        ),
        evaluation=ImageEval(
            samples=20, batch=20, student_steps=(1,), teacher_steps=(2,)
        ),
        checkpoint_every=2,
        tensorboard=False,
        mesh=MeshShape(fsdp=1),
    )


@pytest.mark.full
@pytest.mark.parametrize(
    "teacher",
    [
        dict(quantize="int8"),
        dict(place="host"),
        dict(quantize="int8", place="host"),
    ],
    ids=str,
)
def test_a_run_with_such_a_teacher(teacher, tmp_path):
    report = loop.run(config(**teacher), tmp_path / "run", progress=False)
    assert {row["name"] for row in report["models"]} == {"teacher", "student"}
    trained = loop.load(tmp_path / "run")
    assert (
        trained.params["student"]["blocks"]["to_q"]["kernel"].dtype == jnp.float32
    )


WRONG = [
    (dict(quantize="int4"), "did you mean 'int8'"),
    (dict(place="disk"), "expected 'device' or 'host'"),
]


@pytest.mark.parametrize("role, message", WRONG)
def test_unknown_names_are_refused(role, message):
    with pytest.raises(Refused, match=message):
        _ = Experiment(config(**role), Path("unused")).nets


def test_only_frozen_roles_rest():
    other = config()
    other.roles.student.quantize = "int8"
    with pytest.raises(Refused, match="frozen roles"):
        _ = Experiment(other, Path("unused")).nets
