"""Feature losses by their invariances and small closed forms (00-foundations, section 11)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import ortho_group

from jaxdistill.core.types import Refused
from jaxdistill.objectives import features as ft

TOL = 1e-12


pytestmark = pytest.mark.usefixtures("x64")


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def rotation(dim, seed=0):
    return jnp.asarray(ortho_group.rvs(dim, random_state=seed))


def test_hidden_mse_and_cosine_per_position():
    t = draw(2, 3, 4)
    s = draw(2, 3, 4, seed=1)
    np.testing.assert_allclose(
        ft.hidden_mse(t, s),
        np.mean((np.asarray(t) - np.asarray(s)) ** 2, -1),
        rtol=TOL,
    )
    norm = lambda x: np.linalg.norm(x, axis=-1)
    np.testing.assert_allclose(
        ft.cosine_distance(t, s),
        1 - np.sum(t * s, -1) / (norm(t) * norm(s)),
        rtol=TOL,
    )
    np.testing.assert_allclose(
        ft.cosine_distance(3 * t, 0.2 * s), ft.cosine_distance(t, s), rtol=TOL
    )
    np.testing.assert_allclose(ft.cosine_distance(t, -t), 2.0, rtol=TOL)


LOSSES = {
    "hidden_mse": (ft.hidden_mse, (4, 6)),
    "cosine": (ft.cosine_distance, (4, 6)),
    "attention": (ft.attention_transfer, (4, 2, 2, 3)),
    "rkd_distance": (ft.rkd_distance, (4, 6)),
    "rkd_angle": (ft.rkd_angle, (4, 6)),
    "similarity": (ft.similarity_preserving, (4, 2, 3)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_zero_at_equality_with_gradient_to_the_student_only(name):
    loss, shape = LOSSES[name]
    t = draw(*shape)
    s = draw(*shape, seed=1)
    np.testing.assert_allclose(loss(t, t), 0.0, atol=1e-15)
    run = jax.jit(jax.grad(lambda t, s: loss(t, s).sum(), argnums=(0, 1)))
    to_teacher, to_student = run(t, s)
    np.testing.assert_array_equal(to_teacher, 0.0)
    assert jnp.all(jnp.isfinite(to_student)) and jnp.any(to_student != 0)
    np.testing.assert_allclose(run(t, t)[1], 0.0, atol=1e-14)
    assert loss(t.astype(jnp.bfloat16), s.astype(jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize("name", LOSSES)
def test_finite_gradient_at_zero_features(name):
    """Dead or equal features (a zero vector, two samples alike) must not give NaN."""
    loss, shape = LOSSES[name]
    t = draw(*shape)
    s = draw(*shape, seed=1).at[0].set(0.0).at[1].set(0.0)
    assert jnp.all(jnp.isfinite(jax.grad(lambda s: loss(t, s).sum())(s)))


def test_attention_transfer_ignores_channel_order_number_and_scale():
    t = draw(2, 4, 4, 6)
    s = draw(2, 4, 4, 3, seed=1)
    want = ft.attention_transfer(t, s)
    assert want.shape == (2,)
    np.testing.assert_allclose(
        ft.attention_transfer(2 * t[..., ::-1], 0.1 * s[..., [2, 0, 1]]),
        want,
        rtol=TOL,
    )
    q = lambda a: np.sum(np.asarray(a) ** 2, -1).reshape(2, -1)
    unit = lambda v: v / np.linalg.norm(v, axis=-1, keepdims=True)
    np.testing.assert_allclose(
        want, np.mean((unit(q(t)) - unit(q(s))) ** 2, -1), rtol=TOL
    )


def test_attention_transfer_pools_the_larger_map():
    t = draw(2, 2, 4, 3)
    s = draw(2, 2, 4, 5, seed=1)
    large = jnp.repeat(jnp.repeat(s, 3, 1), 2, 2)
    np.testing.assert_allclose(
        ft.attention_transfer(t, large), ft.attention_transfer(t, s), rtol=TOL
    )
    np.testing.assert_allclose(
        ft.attention_transfer(large, t), ft.attention_transfer(s, t), rtol=TOL
    )
    with pytest.raises(Refused, match="map of 3x4: expected a multiple of 2x4"):
        ft.attention_transfer(t, draw(2, 3, 4, 5))


def test_rkd_is_invariant_to_similarity_transforms():
    t = draw(5, 4)
    s = draw(5, 6, seed=1)
    moved = 3.0 * s @ rotation(6) + draw(6, seed=2)
    for loss in (ft.rkd_distance, ft.rkd_angle):
        want = loss(t, s)
        assert want > 1e-3
        np.testing.assert_allclose(loss(t, moved), want, rtol=1e-11)
        np.testing.assert_allclose(
            loss(2 * t @ rotation(4) - 1, s), want, rtol=1e-11
        )
        np.testing.assert_allclose(loss(s, moved), 0.0, atol=1e-20)


def test_rkd_on_a_line_of_three():
    """Points 0, 1, 3: distances 1, 3, 2 of mean 2; cosines at the ends 1, in the middle -1."""
    t = jnp.asarray([[0.0], [1.0], [3.0]])
    s = jnp.asarray([[0.0, 0.0], [1.0, 0.0], [0.5, np.sqrt(0.75)]])
    # the equilateral student: all distances over their mean 1, all cosines between two edges 1/2
    np.testing.assert_allclose(
        ft.rkd_distance(t, s), 2 * (0.5 * 0.25 + 0.5 * 0.25 + 0) / 9, rtol=TOL
    )
    ends = 0.5 * 0.25
    middle = 1.5 - 0.5
    np.testing.assert_allclose(
        ft.rkd_angle(t, s), (2 * ends + 2 * ends + 2 * middle) / 27, rtol=TOL
    )


def test_similarity_preserving_sees_inner_products_only():
    t = draw(5, 2, 2)
    s = draw(5, 6, seed=1)
    want = ft.similarity_preserving(t, s)
    np.testing.assert_allclose(
        ft.similarity_preserving(t, 4 * s @ rotation(6)), want, rtol=1e-11
    )
    gram = lambda f: np.asarray(f).reshape(5, -1) @ np.asarray(f).reshape(5, -1).T
    unit = lambda g: g / np.linalg.norm(g, axis=-1, keepdims=True)
    np.testing.assert_allclose(
        want, np.sum((unit(gram(t)) - unit(gram(s))) ** 2) / 25, rtol=TOL
    )


def test_cka_invariances_and_range():
    x = draw(20, 5)
    y = draw(20, 7, seed=1)
    want = ft.cka(x, y)
    assert 0 < want < 1
    np.testing.assert_allclose(ft.cka(x, x), 1.0, rtol=TOL)
    np.testing.assert_allclose(ft.cka(3 * x @ rotation(5) + 1, y), want, rtol=1e-11)
    np.testing.assert_allclose(ft.cka(y, x), want, rtol=TOL)
    stretched = x * jnp.asarray([100.0, 1, 1, 1, 1])
    assert abs(ft.cka(stretched, y) - want) > 0.01


def test_cka_of_independent_gaussians_vanishes_with_n():
    """E ||Yc^T Xc||^2 = d d' n against n^2 sqrt(d d') in the denominator: about sqrt(d d') / n."""
    x = draw(4000, 4)
    y = draw(4000, 9, seed=1)
    assert ft.cka(x, y) < 3 * 6 / 4000


def naive_hsic(x, y):
    """U-statistic over all ordered quadruples: the definition that the closed form sums up."""
    k = np.asarray(x @ x.T)
    m = np.asarray(y @ y.T)
    n = len(k)
    total = 0.0
    count = 0
    for i in range(n):
        for j in range(n):
            for q in range(n):
                for r in range(n):
                    if len({i, j, q, r}) == 4:
                        total += k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q])
                        count += 1
    return total / count


def test_unbiased_hsic_is_the_u_statistic():
    x = draw(6, 3) + 2
    y = draw(6, 2, seed=1)
    np.testing.assert_allclose(ft.unbiased_hsic(x, y), naive_hsic(x, y), rtol=1e-11)
    np.testing.assert_allclose(
        ft.unbiased_hsic(x + 50, y), ft.unbiased_hsic(x, y), rtol=1e-9
    )


def test_minibatch_cka_does_not_depend_on_the_batch_size():
    """Against the biased one, which 8 samples of 16 dimensions push towards 1; the law's own value
    is 0 and 1 here.
    """
    x = draw(400, 8, 16)
    y = draw(400, 8, 16, seed=1)
    biased = float(jnp.mean(jax.vmap(ft.cka)(x, y)))
    # the mean of 400 unbiased estimates, each with a spread of about 1 / n: 3 sigma = 3 / (8 * 20)
    assert abs(ft.minibatch_cka(x, y)) < 3 / 160 < 0.5 < biased
    np.testing.assert_allclose(
        ft.minibatch_cka(x, 2 * x @ rotation(16)), 1.0, rtol=1e-10
    )
