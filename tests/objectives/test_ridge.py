import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.objectives import ridge

# the toy of the paper's code: 11 noisy points of a sine, RBF kernel, and its printed losses against
# the sine on 101 points
Y = [
    0.38476636465198066,
    1.2333967683416893,
    1.33232242218057,
    0.6920159488889518,
    -0.29756145531871736,
    -0.24189291901377769,
    -0.7964485769175675,
    -0.9616480167034174,
    -0.49672509509916934,
    -0.3469066003991437,
    0.5589512650600734,
]
TABLE = {
    0.0: [0.16477, 0.15076, 0.14915, 0.15561, 0.16735, 0.18251, 0.49505],
    0.25: [0.16477, 0.15309, 0.14958, 0.14903, 0.14946, 0.15011, 0.15250],
    0.35: [0.16477, 0.15424, 0.15089, 0.14983, 0.14954, 0.14948, 0.14959],
}
LAM = 0.2


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def toy():
    x = jnp.linspace(0, 1, 11)
    grid = jnp.linspace(0, 1, 101)
    return (
        ridge.rbf(grid, x, 80.0),
        ridge.rbf(x, x, 80.0),
        jnp.array(Y),
        jnp.sin(2 * jnp.pi * grid),
    )


def problem(seed=0, n=9, columns=2):
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((n, n))
    return (
        jnp.asarray(rng.standard_normal((4, n)) @ a.T),
        jnp.asarray(a @ a.T),
        jnp.asarray(rng.standard_normal((n, columns))),
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_unrolled_powers_are_the_steps(seed):
    cross, kernel, y = problem(seed)
    alphas = np.random.default_rng(seed).uniform(size=6)
    for tau in range(1, 7):
        one_by_one = ridge.steps(cross, kernel, y, 0.7, alphas[:tau])[-1]
        np.testing.assert_allclose(
            ridge.unrolled(cross, kernel, y, 0.7, alphas[:tau]),
            one_by_one,
            atol=1e-10,
        )
        same = ridge.steps(kernel, kernel, y, 0.7, [0.4] * tau)[-1]
        np.testing.assert_allclose(
            ridge.constant(kernel, y, 0.7, 0.4, tau), same, atol=1e-10
        )


def test_limit_and_its_rate():
    cross, kernel, y = problem()
    path = ridge.steps(kernel, kernel, y, 0.7, [0.35] * 200)
    end = ridge.limit(kernel, kernel, y, 0.7, 0.35)
    np.testing.assert_allclose(path[-1], end, atol=1e-8)
    np.testing.assert_allclose(
        ridge.steps(cross, kernel, y, 0.7, [0.35] * 200)[-1],
        ridge.limit(cross, kernel, y, 0.7, 0.35),
        atol=1e-8,
    )
    top = float(jnp.linalg.eigvalsh(kernel)[-1])
    errors = [float(jnp.linalg.norm(step - end)) for step in path[:30]]
    assert all(
        after <= 0.65 * top / (top + 0.7) * before + 1e-12
        for before, after in zip(errors, errors[1:])
    )


def test_limits_of_alpha():
    cross, kernel, y = problem()
    ones = ridge.steps(kernel, kernel, y, 0.7, [1.0] * 4)
    for step in ones[1:]:
        np.testing.assert_allclose(step, ones[0], atol=1e-12)
    zeros = ridge.steps(kernel, kernel, y, 0.7, [0.0] * 300)
    smoother = ridge.fit(kernel, kernel, jnp.eye(9), 0.7)
    np.testing.assert_allclose(
        zeros[2], smoother @ smoother @ smoother @ y, atol=1e-10
    )
    norms = [float(jnp.linalg.norm(step)) for step in zeros]
    assert (np.diff(norms) < 0).all() and norms[-1] < 0.5 * norms[0]
    assert not ridge.limit(cross, kernel, y, 0.7, 0.0).any()


@pytest.mark.parametrize("alpha", TABLE)
def test_table_of_the_paper(alpha):
    cross, kernel, y, sine = toy()
    losses = [
        float(jnp.mean((f - sine) ** 2))
        for f in ridge.steps(cross, kernel, y, LAM, [alpha] * 6)
    ]
    losses.append(
        float(jnp.mean((ridge.limit(cross, kernel, y, LAM, alpha) - sine) ** 2))
    )
    np.testing.assert_allclose(losses, TABLE[alpha], atol=5.001e-6)


def test_filters_are_the_coordinates():
    _, kernel, y = problem(columns=1)
    d, v = jnp.linalg.eigh(kernel)
    for alphas in ([0.0] * 5, [0.3] * 5, [0.5, 0.1, 0.9, 0.0, 0.4]):
        found = ridge.filters(d, 0.7, alphas)
        path = ridge.steps(kernel, kernel, y, 0.7, alphas)
        for b, step in zip(found, path):
            np.testing.assert_allclose(
                (v.T @ step)[:, 0], b * (v.T @ y)[:, 0], atol=1e-10
            )
    bound = ridge.filters(d, 0.7, [0.3] * 400)
    np.testing.assert_allclose(bound[-1], 0.3 * d / (0.3 * d + 0.7), rtol=1e-9)
    for b, after in zip(bound[:20], bound[1:21]):
        assert (after <= b + 1e-15).all()


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_the_basis_is_sparsified(alpha):
    d = jnp.array([0.05, 0.4, 2.0])
    ratio = [b[1:] / b[:-1] for b in ridge.filters(d, 0.7, [alpha] * 60)]
    first = d[1:] / d[:-1] * (d[:-1] + 0.7) / (d[1:] + 0.7)
    assert all((r >= first - 1e-12).all() for r in ratio)
    if alpha:
        np.testing.assert_allclose(
            ratio[-1],
            d[1:] / d[:-1] * (alpha * d[:-1] + 0.7) / (alpha * d[1:] + 0.7),
            rtol=1e-9,
        )
    else:
        assert all((b > a).all() for a, b in zip(ratio, ratio[1:]))
        np.testing.assert_allclose(ratio[9], first**10, rtol=1e-9)


def test_best_alpha_is_the_minimum():
    rng = np.random.default_rng(0)
    u, labels, pure = (jnp.asarray(rng.standard_normal((7, 3))) for _ in range(3))
    best = float(ridge.best_alpha(u, labels, pure))
    grid = np.linspace(best - 1, best + 1, 2001)
    losses = [float(jnp.sum((a * labels + (1 - a) * pure - u) ** 2)) for a in grid]
    assert abs(grid[int(np.argmin(losses))] - best) <= 1e-9
    np.testing.assert_allclose(
        best,
        1
        - float(
            jnp.sum((labels - pure) * (labels - u)) / jnp.sum((labels - pure) ** 2)
        ),
        atol=1e-12,
    )


def test_best_alphas_of_the_toy():
    cross, kernel, y, sine = toy()
    fit = lambda target: (
        ridge.fit(cross, kernel, target, LAM),
        ridge.fit(kernel, kernel, target, LAM),
    )
    (labels, last), chosen, losses = fit(y), [], []
    for tau in range(2, 7):
        alpha = float(ridge.best_alpha(sine, labels, fit(last)[0]))
        if tau == 2:
            assert round(alpha, 5) == -0.62184
        chosen.append(min(max(alpha, 0.0), 1.0))
        shown, last = fit(chosen[-1] * y + (1 - chosen[-1]) * last)
        losses.append(float(jnp.mean((shown - sine) ** 2)))
    np.testing.assert_allclose(
        chosen, [0, 0.1351, 0.3341, 0.3356, 0.3360], atol=5.1e-5
    )
    np.testing.assert_allclose(
        losses, [0.15076, 0.14876, 0.14916, 0.14937, 0.14948], atol=5.1e-6
    )


def test_two_targets_are_one():
    rng = np.random.default_rng(0)
    f, y, last = (jnp.asarray(rng.standard_normal(8)) for _ in range(3))
    two = lambda f: 0.15 * jnp.sum((f - y) ** 2) + 0.35 * jnp.sum((f - last) ** 2)
    one = lambda f: 0.5 * jnp.sum((f - (0.3 * y + 0.7 * last)) ** 2)
    np.testing.assert_allclose(jax.grad(two)(f), jax.grad(one)(f), atol=1e-14)
