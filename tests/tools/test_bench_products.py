"""The products of a step, read from its trace and run alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval

from jaxdistill.core import sharding
from jaxdistill.run import flops
from tests.run import tiny
from tools import bench, bench_products
from tools.bench_products import Shape


def shapes(fn, *arrays):
    return bench_products.shapes(jax.make_jaxpr(fn)(*arrays).jaxpr)


def product(rows, inner, columns, batch=1):
    return Shape(batch, rows, inner, columns, "float32")


X = jnp.zeros((6, 4))
W = jnp.zeros((3, 4, 4))


def stack(x, w):
    """Three layers, scanned."""
    return jax.lax.scan(lambda x, layer: (jnp.tanh(x @ layer), None), x, w)[0]


def test_forward_backward_and_forward_mode():
    """A scan's products count as often as it runs; a gradient has one of each more for the inputs
    of all layers but the first, and one for the weights.
    """
    forward = product(6, 4, 4)
    assert shapes(stack, X, W) == {forward: 3}
    tangent = lambda x, w: jax.jvp(lambda x: stack(x, w), (x,), (x,))
    assert shapes(tangent, X, W) == {forward: 6}
    gradient = jax.grad(lambda w, x: jnp.sum(stack(x, w)))
    found = shapes(gradient, W, X)
    assert found[product(4, 6, 4)] == 3
    assert found[forward] == 6


def test_what_no_result_needs_is_left_out():
    def unused(x, w):
        stack(x + 1, w)
        return x @ w[0]

    assert shapes(unused, X, W) == {product(6, 4, 4): 1}


def test_batched_and_transposed():
    a = jnp.zeros((2, 5, 3, 7))  # batch, tokens, heads, channels
    scores = lambda a: jnp.einsum("bqhk,bshk->bhqs", a, a)
    assert shapes(scores, a) == {product(5, 7, 5, batch=6): 1}
    kernels = lambda a, b: jnp.einsum("nd,ne->de", a, b)
    assert shapes(kernels, jnp.zeros((9, 2)), jnp.zeros((9, 3))) == {
        product(2, 9, 3): 1
    }


def test_convolutions_have_the_operations_of_their_patches():
    """Forward, and the gradients in input and kernel, with groups."""
    x = jnp.zeros((2, 8, 8, 4))
    kernel = jnp.zeros((3, 3, 2, 6))

    def convolved(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=2,
        )

    assert shapes(convolved, x, kernel) == {product(128, 18, 3, batch=2): 1}
    gradients = jax.grad(lambda *a: jnp.sum(convolved(*a) ** 2), (0, 1))
    jaxpr = jax.make_jaxpr(gradients)(x, kernel).jaxpr
    found = bench_products.shapes(jaxpr)
    assert sum(found.values()) == 3
    assert bench_products.operations(found) == sum(flops.count(jaxpr).values())


def test_every_product_has_a_pair_of_matrices_of_its_own():
    """The compiled program multiplies as often as it is asked to, and gives the right numbers."""
    found = {product(3, 4, 5): 7, product(2, 3, 2, batch=2): 2}
    pools = bench_products.operands(found)
    expected = []
    for (left, right), count in zip(pools, found.values(), strict=True):
        pairs = [(i % len(left), i // len(left)) for i in range(count)]
        assert len(set(pairs)) == count
        for i, j in pairs:
            expected.append(float(np.ravel(left[i] @ right[j])[0]))
    numbers = bench_products.alone(found)()
    np.testing.assert_allclose(numbers, expected, rtol=1e-5, atol=1e-6)
    assert len({round(value, 6) for value in expected}) == 9


def test_a_case_has_the_products_of_each_pattern_of_turns():
    case = bench.Case(tiny.get_config("bare"))
    with sharding.use(case.experiment.mesh, case.experiment.settings.rules):
        case.prepare_products()
        for step, active in enumerate([(0, 1), (0,)]):
            traced = case.programs.step.trace(
                case.programs.abstract, case.programs.batch, case.rng, active
            )
            jaxpr = traced.jaxpr.jaxpr
            needed, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
            counted = sum(flops.count(needed).values())
            assert case.programs.active_at(step) == active
            assert case.operations(step) == pytest.approx(counted)
            assert np.isfinite(case.products(step)).all()
