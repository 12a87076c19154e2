"""Optimisers, schedules and averages (00-foundations, section 9)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.core.optim import CopyEma, Ema, HalfLifeEma, Optimizer, PowerEma, RampEma, clip_by_member_norm, decayed, power_gamma
from jaxdistill.core.types import Refused


@pytest.mark.parametrize(("width", "gamma"), [(0.05, 16.972), (0.10, 6.937)])
def test_power_gamma(width, gamma):
    """EDM2's table, given to three decimals; and the width formula that it inverts."""
    assert power_gamma(width) == pytest.approx(gamma, abs=6e-4)
    g = power_gamma(width)
    assert (g + 1) ** 0.5 / (g + 2) / (g + 3) ** 0.5 == pytest.approx(width, rel=1e-9)


def run(rule, values):
    average = np.float64(-123.0)
    for k, value in enumerate(values, 1):
        beta = float(rule.decay(jnp.int32(k)))
        average = beta * average + (1 - beta) * value
    return average


def test_power_average_starts_at_the_first_weights_and_weighs_by_a_power():
    rule, gamma, n = PowerEma(sigma_rel=0.10), power_gamma(0.10), 2000
    assert float(rule.decay(1)) == 0
    assert run(rule, np.full(50, 3.0)) == pytest.approx(3.0, rel=1e-5)
    t = np.arange(1, n + 1)
    weights = t**gamma
    expected = np.sum(weights * t) / np.sum(weights)
    assert run(rule, t) == pytest.approx(expected, rel=(gamma + 1) / n)  # the power law holds up to O(gamma / k)


def test_constant_average_lags_a_ramp_by_its_mean_age():
    n, rate = 5000, 0.99
    assert n - run(Ema(rate=rate, warmup=False), np.arange(1, n + 1)) == pytest.approx(rate / (1 - rate), rel=1e-3)


def test_copying_average():
    """SwiftBrush's: beta_1 = 0, then min(rate, k / (9 + k))."""
    rule = CopyEma(rate=0.9)
    assert [float(rule.decay(k)) for k in (1, 2, 9, 81, 82)] == pytest.approx([0, 2 / 11, 0.5, 0.9, 0.9], rel=1e-6)
    assert run(CopyEma(), np.full(20, 3.0)) == pytest.approx(3.0, rel=1e-6)  # nothing of the initial weights is left
    assert float(CopyEma().decay(10**6)) == pytest.approx(0.9999, rel=1e-6)


def test_half_life():
    rule = HalfLifeEma(half_life=1000, batch=100, ramp=0.05)
    assert float(rule.decay(10**6)) == pytest.approx(0.5**0.1, rel=1e-5)
    assert float(rule.decay(1)) == pytest.approx(0.5**20, rel=1e-4)


def test_schedules():
    lr = Optimizer(lr=1.0, schedule="cosine", warmup=10, final=0.1).learning_rate(110)
    assert float(lr(0)) == pytest.approx(0.1)
    assert float(lr(4)) == pytest.approx(0.5)
    assert float(lr(10)) == pytest.approx(1.0)
    assert float(lr(60)) == pytest.approx(0.55)
    assert float(lr(110)) == pytest.approx(0.1)
    assert float(Optimizer(lr=2.0, schedule="linear").learning_rate(10)(5)) == pytest.approx(1.0)


def test_decay_spares_vectors_by_name():
    params = {"blocks": {"norm": {"scale": jnp.ones((2, 3))}, "up": {"kernel": jnp.ones((2, 3, 3)), "bias": jnp.ones((2, 3))}}}
    mask = decayed(params)
    assert mask["blocks"]["up"] == {"kernel": True, "bias": False}
    assert not mask["blocks"]["norm"]["scale"]
    tx = Optimizer(lr=0.1, weight_decay=1.0).make(1)
    updates, _ = tx.update(optax.tree.zeros_like(params), tx.init(params), params)
    assert not updates["blocks"]["norm"]["scale"].any()
    np.testing.assert_allclose(updates["blocks"]["up"]["kernel"], -0.1, rtol=1e-6)


@pytest.mark.parametrize("bad", [{"algorithm": "adamm"}, {"schedule": "cosin"}])
def test_unknown_names_are_refused(bad):
    with pytest.raises(Refused, match="expected"):
        Optimizer(**bad).make(10)


@pytest.mark.parametrize("algorithm", ["adamw", "radam", "sgd", "lion"])
def test_algorithms_build(algorithm):
    tx = Optimizer(algorithm=algorithm, lr=0.1).make(10)
    params = {"kernel": jnp.ones((2, 2))}
    updates, _ = tx.update(params, tx.init(params), params)
    assert (updates["kernel"] < 0).all()


@pytest.mark.parametrize("rate", [0.0, 0.5, 0.99, 0.999])
def test_ramp_follows_its_recursion(rate):
    """d_0 = 0 copies; the average at update k has decay d_k, up to 0.1 % of 1 - rate."""
    decay, rule = 0.0, RampEma(rate=rate)
    for k in range(1, 3000):
        decay += (1 - decay) * (rate - decay) / 2
        if k < 4 or k % 500 == 0:
            assert float(rule.decay(jnp.int32(k))) == pytest.approx(decay, abs=1.1e-3 * (1 - rate) + 1e-7)
    assert float(rule.decay(jnp.int32(10**6))) == pytest.approx(rate, abs=1e-7)


@pytest.mark.parametrize("rate", [1.0, -0.1])
def test_ramp_refuses_rates_that_never_forget(rate):
    with pytest.raises(Refused, match="0 <= rate < 1"):
        RampEma(rate=rate)


def test_entries_are_clipped_before_the_norm():
    grads = {"a": jnp.array([3.0, -0.5]), "b": jnp.array([-7.0])}
    for clip, want in ((0.0, [-1.0, 0.5, 1.0]), (0.75, [-0.5, 0.25, 0.5])):
        tx = Optimizer(algorithm="sgd", lr=1.0, clip=clip, clip_value=1.0).make(1)
        np.testing.assert_allclose(jnp.concatenate(jax.tree.leaves(tx.update(grads, tx.init(grads))[0])), want, rtol=1e-6)


def test_members_of_a_bank_are_clipped_by_their_own_norm():
    grads = {"a": jnp.asarray([[3.0, 0.0], [0.3, 0.0], [0.0, 0.0]]), "b": jnp.asarray([4.0, 0.4, 0.0])}  # norms 5, 0.5, 0
    clipped, _ = clip_by_member_norm(1.0).update(grads, None)
    np.testing.assert_allclose(clipped["a"], [[0.6, 0.0], [0.3, 0.0], [0.0, 0.0]], rtol=1e-6)
    np.testing.assert_allclose(clipped["b"], [0.8, 0.4, 0.0], rtol=1e-6)
    tx = Optimizer(algorithm="sgd", lr=1.0).make(1, bank=True)
    update, _ = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(update["b"], [-0.8, -0.4, 0.0], rtol=1e-6)


def test_a_role_that_never_moves_has_no_moments():
    assert not jax.tree.leaves(Optimizer().make(0).init({"a": jnp.ones(3)}))
