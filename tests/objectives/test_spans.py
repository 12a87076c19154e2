import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.objectives.divergence import (
    ForwardKL,
    JensenShannon,
    ReverseKL,
    TotalVariation,
    sorted_distance,
    token_divergence,
)
from jaxdistill.objectives.spans import event_divergence, span_sum


def test_sums_of_spans():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((4, 9)).astype("f4")
    span = rng.integers(-1, 6, (4, 9))
    # 5 is out of range: left out, as -1 is
    total, there = jax.jit(lambda v, s: span_sum(v, s, 5))(values, span)
    for row in range(4):
        for number in range(5):
            mine = span[row] == number
            np.testing.assert_allclose(
                total[row, number], values[row][mine].sum(), atol=1e-6
            )
            assert there[row, number] == mine.any()


def test_what_no_span_has_may_be_infinite():
    values = jnp.array([[1.0, -jnp.inf, jnp.nan]])
    span = jnp.array([[0, -1, -1]])
    total, grad = jax.value_and_grad(lambda v: span_sum(v, span, 2)[0].sum())(
        values
    )
    assert total == 1 and grad.tolist() == [[1, 0, 0]]


@pytest.mark.parametrize("kind", [ForwardKL(), ReverseKL(), JensenShannon()])
def test_events_are_laws_of_two_outcomes(x64, kind):
    p, q = np.random.default_rng(1).random((2, 20))
    law = lambda p: jnp.log(jnp.stack([p, 1 - p], -1))
    np.testing.assert_allclose(
        event_divergence(kind, jnp.log(p), jnp.log(q)),
        token_divergence(kind, law(p), law(q)),
        rtol=1e-9,
        atol=1e-12,
    )
    grad = jax.grad(
        lambda log: event_divergence(ForwardKL(), jnp.log(p), log).sum()
    )(jnp.log(q))
    np.testing.assert_allclose(grad, (q - p) / (1 - q), rtol=1e-9)
    equal = jax.grad(
        lambda log: event_divergence(kind, jnp.log(p), log, temperature=100.0).sum()
    )(jnp.log(p))
    np.testing.assert_allclose(equal, 0.0, atol=1e-9)


def test_limit_of_high_temperature(x64):
    x, y = 10 * np.random.default_rng(2).random((2, 20))
    wanted = x * np.log(x / y) - x + y
    np.testing.assert_allclose(
        event_divergence(ForwardKL(), -x, -y, temperature=1e5),
        wanted,
        rtol=1e-3,
        atol=1e-4,
    )


def test_certain_events_are_finite():
    logs = jnp.array([0.0, -1e-9, -200.0])
    value, grad = jax.value_and_grad(
        lambda q: event_divergence(
            ForwardKL(), *jnp.broadcast_arrays(logs[:, None], q), temperature=1.0
        ).sum()
    )(logs)
    assert jnp.isfinite(value) and jnp.isfinite(grad).all()


def test_an_event_says_less_than_the_law(x64):
    """Data processing: one token against all others is below the full divergence."""
    teacher, student = np.random.default_rng(3).standard_normal((2, 30, 6))
    log_p = jax.nn.log_softmax(teacher)[:, 0]
    log_q = jax.nn.log_softmax(student)[:, 0]
    assert (
        event_divergence(ForwardKL(), log_p, log_q)
        <= ForwardKL()(teacher, student) + 1e-12
    ).all()


def test_sorted_distance(x64):
    rng = np.random.default_rng(4)
    teacher = jnp.asarray(2 * rng.standard_normal((5, 9)))
    student = jnp.asarray(2 * rng.standard_normal((5, 6)))
    p, q = (
        -np.sort(-np.asarray(jax.nn.softmax(z / 1.5))) for z in (teacher, student)
    )
    wanted = np.abs(p - np.pad(q, [(0, 0), (0, 3)])).sum(-1)
    for a, b in ((teacher, student), (student, teacher)):
        np.testing.assert_allclose(
            sorted_distance(a, b, temperature=1.5), wanted, rtol=1e-12
        )
    renamed = teacher[:, rng.permutation(9)]
    np.testing.assert_allclose(sorted_distance(teacher, renamed), 0.0, atol=1e-15)
    np.testing.assert_allclose(
        sorted_distance(
            teacher, jnp.pad(renamed, [(0, 0), (0, 4)], constant_values=-jnp.inf)
        ),
        0.0,
        atol=1e-15,
    )
    other = teacher + rng.standard_normal((5, 9))
    assert (
        sorted_distance(teacher, other)
        <= 2 * TotalVariation()(teacher, other) + 1e-12
    ).all()  # no renaming is nearer than the sorted one
