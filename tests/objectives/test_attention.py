import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core.types import Refused
from jaxdistill.objectives.attention import (
    KINDS,
    attention_kl,
    attention_mse,
    layer_map,
)

RNG = np.random.default_rng(0)
T, S = (
    jnp.asarray(3 * RNG.standard_normal((2, 3, 5, 5)), jnp.float32)
    for _ in range(2)
)
MASK = jnp.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool)


def test_kl_of_the_rows_over_real_keys():
    a = jax.nn.softmax(T[1, :, :, :3])
    b = jax.nn.softmax(S[1, :, :, :3])
    np.testing.assert_allclose(a.sum(-1), 1, atol=1e-6)
    expected = (a * jnp.log(a / b)).sum(-1).mean(0)
    np.testing.assert_allclose(
        attention_kl(T, S, MASK)[1], expected, rtol=1e-4, atol=1e-6
    )
    assert (attention_kl(T, S, MASK) >= 0).all()
    np.testing.assert_allclose(
        attention_mse(T, S, MASK)[1],
        ((T - S)[1, :, :, :3] ** 2).mean((0, 2)),
        rtol=1e-5,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_equal_maps_and_padding(kind):
    loss = lambda s: KINDS[kind](T, s, MASK).sum()
    value, grad = jax.value_and_grad(loss)(T)
    assert abs(value) <= 1e-5 and jnp.abs(grad).max() <= 1e-6
    assert not jax.grad(lambda t: KINDS[kind](t, S, MASK).sum())(
        T
    ).any()  # no gradient to the teacher
    moved = S.at[1, :, :, 3:].add(7.0)
    np.testing.assert_array_equal(
        KINDS[kind](T, moved, MASK), KINDS[kind](T, S, MASK)
    )
    wide = lambda z: jnp.pad(
        z, ((0, 0), (0, 0), (0, 2), (0, 2)), constant_values=9.0
    )
    padded = KINDS[kind](wide(T), wide(S), jnp.pad(MASK, ((0, 0), (0, 2))))[:, :5]
    np.testing.assert_allclose(
        padded, KINDS[kind](T, S, MASK), rtol=1e-5, atol=1e-6
    )


def test_sharp_teachers_stay_finite():
    value, grad = jax.value_and_grad(
        lambda s: attention_kl(200 * T, s, MASK).sum()
    )(200 * S)
    assert np.isfinite(value) and np.isfinite(grad).all()


def test_layer_map():
    assert (
        layer_map(4, 12) == (2, 5, 8, 11)
        and layer_map(3, 3) == (0, 1, 2)
        and layer_map(3, 4) == (1, 2, 3)
    )
    for m in range(1, 13):
        for n in range(m, 25):
            g = layer_map(m, n)
            assert (
                len(g) == m
                and g[-1] == n - 1
                and (np.diff(g) > 0).all()
                and g[0] >= 0
            )


def test_heads_must_agree():
    with pytest.raises(
        Refused, match="the student has 2 heads, expected the teacher's 3"
    ):
        attention_kl(T, S[:, :2], MASK)
