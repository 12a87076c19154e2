import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core.types import Refused
from jaxdistill.objectives.pooling import anchored, geometric, linear, violated

POOLS = {"linear": linear, "geometric": geometric}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def law(seed, vocab):
    return jnp.log(
        jnp.asarray(
            np.random.default_rng([seed, vocab]).dirichlet(np.ones(vocab)) + 1e-12
        )
    )


def kl(p, q):
    return float(jnp.sum(jnp.exp(p) * (p - q)))


def generations(pool, gamma, base, student, n, history=(1.0,)):
    """S_0, S_1, ... of students that realise their meta-teacher exactly."""
    operator = anchored(pool, gamma, history)
    students = [student]
    for _ in range(n):
        students.insert(0, operator(base, students[: len(history)]))
    return students[::-1]


@pytest.mark.parametrize("vocab", [2, 10, 1000])
@pytest.mark.parametrize("gamma", [0.1, 0.3, 0.7])
def test_contraction(vocab, gamma):
    base = jax.nn.log_softmax(law(0, vocab))
    start = jax.nn.log_softmax(law(1, vocab))
    for name, pool in POOLS.items():
        path = generations(pool, gamma, base, start, 12)
        forward, reverse = (
            [f(base, s) for s in path] for f in (kl, lambda p, q: kl(q, p))
        )
        for before, after in zip(forward, forward[1:]):
            assert after <= (1 - gamma) * before + 1e-14
        for before, after in zip(reverse, reverse[1:]):
            assert after <= (1 - gamma if name == "linear" else 1) * before + 1e-14
        if name == "linear":
            distance = [
                float(jnp.sum(jnp.abs(jnp.exp(s) - jnp.exp(base)))) for s in path
            ]
            np.testing.assert_allclose(
                distance, distance[0] * (1 - gamma) ** np.arange(13), rtol=1e-8
            )
        else:
            centred = lambda s: (s - base) - jnp.mean(s - base)
            for g, s in enumerate(path):
                np.testing.assert_allclose(
                    centred(s), (1 - gamma) ** g * centred(start), atol=1e-10
                )


def test_late_generations_contract_quadratically():
    """Ratios of successive KLs fall towards (1 - gamma)^2 = .49, the slower the more outcomes: the
    specification's figures.
    """
    for vocab, expected, spread in (
        (2, 0.49, 0.02),
        (10, 0.55, 0.06),
        (1000, 0.57, 0.06),
    ):
        path = generations(
            linear,
            0.3,
            jax.nn.log_softmax(law(4, vocab)),
            jax.nn.log_softmax(law(5, vocab)),
            10,
        )
        last = [kl(jax.nn.log_softmax(law(4, vocab)), s) for s in path[-2:]]
        assert last[1] > 1e-10 and abs(last[1] / last[0] - expected) < spread


@pytest.mark.parametrize("pool", POOLS)
def test_limits(pool):
    base, start = (jax.nn.log_softmax(law(i, 10)) for i in range(2))
    np.testing.assert_allclose(
        generations(POOLS[pool], 1.0, base, start, 1)[1], base, atol=1e-12
    )
    np.testing.assert_allclose(
        generations(POOLS[pool], 0.0, base, start, 5)[5], start, atol=1e-12
    )
    np.testing.assert_allclose(
        anchored(POOLS[pool], 0.3)(base, [base]), base, atol=1e-12
    )


def test_students_of_any_start_meet():
    base = law(0, 10)
    a, b = (
        generations(linear, 0.3, base, jax.nn.log_softmax(law(i, 10)), 10)
        for i in (1, 2)
    )
    apart = [float(jnp.sum(jnp.abs(jnp.exp(x) - jnp.exp(y)))) for x, y in zip(a, b)]
    np.testing.assert_allclose(apart, apart[0] * 0.7 ** np.arange(11), rtol=1e-8)


def test_error_floor():
    """Students that miss their target by eps in KL stay within eps / gamma of the base."""
    base = np.random.default_rng(0).dirichlet(np.ones(10))

    def floor(gamma, seed=1):
        rng = np.random.default_rng(seed)
        student = base.copy()
        errors = []
        gaps = []
        for _ in range(300):
            target = gamma * base + (1 - gamma) * student
            student = target * np.exp(0.1 * rng.standard_normal(10))
            student /= student.sum()
            gaps.append(np.sum(base * np.log(base / student)))
            mixed = np.sum(base * np.log(base / target))
            errors.append(gaps[-1] - mixed)  # eps_g: what this generation adds
        return np.mean(gaps[50:]), np.mean(errors[50:]) / gamma

    floors = [floor(g) for g in (0.1, 0.3, 0.5)]
    assert all(gap <= bound for gap, bound in floors)
    assert floors[0][0] > floors[1][0] > floors[2][0]


@pytest.mark.parametrize("window", [1, 2, 3])
def test_window_contracts_by_its_worst(window):
    base, start = (jax.nn.log_softmax(law(i, 10)) for i in range(2))
    path = generations(
        linear, 0.3, base, start, 12, history=tuple(0.5**h for h in range(window))
    )
    gaps = [kl(base, s) for s in path]
    for g in range(1, 13):
        assert gaps[g] <= 0.7 * max(gaps[max(0, g - window) : g]) + 1e-14


def test_axioms_accept_and_reject():
    for pool in POOLS.values():
        for history in ((1.0,), (0.6, 0.4)):
            assert violated(anchored(pool, 0.3, history)) == []
    assert violated(anchored(geometric, 0.3), tempered=True) == []
    assert violated(anchored(linear, 0.3), tempered=True) == ["tempered"]
    assert violated(lambda base, students: linear(students, [0.5, 0.5])) == [
        "anchored"
    ]
    harden = lambda base, students: jnp.log(
        jax.nn.one_hot(jnp.argmax(linear([base, *students], [0.4, 0.3, 0.3])), 6)
    )
    assert "positive" in violated(harden)
    softly = lambda base, students: jnp.log(
        0.97 * jnp.exp(harden(base, students)) + 0.005
    )
    assert {"between"} <= set(violated(softly))
    assert "law" in violated(lambda base, students: base + sum(students))

    def top(base, students):
        out = linear([base, *students], [0.4, 0.3, 0.3])
        return jax.nn.log_softmax(
            jnp.where(out >= jnp.sort(out)[-3], out, -jnp.inf)
        )

    assert "positive" in violated(top)
    first = lambda base, students: jax.nn.log_softmax(
        linear([base, *students], [0.4, 0.3, 0.3]) + jnp.arange(6.0)
    )
    assert "equivariant" in violated(first)


def test_an_aggregate_is_no_farther_than_its_members():
    for seed in range(20):
        q, *teachers = (
            jax.nn.log_softmax(law(10 * seed + i, 10)) for i in range(4)
        )
        weights = np.random.default_rng(seed).dirichlet(np.ones(3))
        assert (
            kl(q, linear(teachers, weights))
            <= sum(w * kl(q, t) for w, t in zip(weights, teachers)) + 1e-12
        )


def test_finite_samples_collapse_without_an_anchor():
    """The specification's recursion: 200 draws a generation, 200 generations, 64 seeds; its figures
    in the comment.
    """

    def last(gamma):
        rng = np.random.default_rng(0)
        base = rng.dirichlet(np.ones(10), 64)
        student = base.copy()
        for _ in range(200):
            target = gamma * base + (1 - gamma) * student
            counts = np.stack([rng.multinomial(200, p / p.sum()) for p in target])
            student = (counts + 0.001) / (200 + 10 * 0.001)
        return np.mean(np.sum(base * np.log(base / student), 1))

    # 6.1, .18, .07, .035
    none, tenth, third, half = (last(g) for g in (0.0, 0.1, 0.3, 0.5))
    assert none > 20 * third and none > tenth > third > half
    assert 4 < none < 8 and 0.1 < tenth < 0.3 and 0.02 < half < 0.06


def test_weights_are_checked():
    with pytest.raises(
        Refused, match="expected 2 that are not negative and sum to 1"
    ):
        linear([law(0, 3), law(1, 3)], [0.5, 0.6])
