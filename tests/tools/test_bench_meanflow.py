"""MeanFlow in plain JAX against the library's."""

import jax
import numpy as np
import optax

from jaxdistill.core import sharding
from jaxdistill.core.net import path_name
from jaxdistill.core.step import bind
from jaxdistill.core.types import Ctx
from tools import bench_cases, bench_meanflow


def test_loss_and_gradients_are_those_of_the_library():
    """On equal weights, noise and times. All weights are drawn, since a fresh DiT gives zeros."""
    rng = np.random.default_rng(0)
    config = bench_cases.CASES["meanflow_reference"]()
    case = bench_meanflow.Reference(config)
    x = case.batch["x"]
    label = case.batch["cond"]

    def drawn(w):
        fan = w.shape[-2] if w.ndim > 1 else 10
        noise = rng.standard_normal(w.shape) / np.sqrt(fan)
        return np.asarray(w + 0.3 * noise, np.float32)

    stacked = jax.tree.map(drawn, case.state.params["student"])
    ctx = Ctx(case.batch, jax.random.key(3), np.int32(0), {})

    @jax.jit
    def library(params):
        def objective(params):
            nets = bind(case.nets, {"student": params})
            return case.method.loss(nets, ctx).loss

        t, r = case.method.interval(ctx, len(x))
        eps = jax.random.normal(ctx.key("eps"), x.shape, x.dtype)
        return *jax.value_and_grad(objective)(params), eps, t, r

    with sharding.use(case.experiment.mesh, case.experiment.settings.rules):
        value, grads, eps, t, r = library(stacked)

    @jax.jit
    def reference(params):
        differentiate = jax.value_and_grad(bench_meanflow.loss)
        sizes = bench_meanflow.SIZES
        return differentiate(params, x, label, eps, t, r, **sizes)

    found, found_grads = reference(bench_meanflow.separate(stacked))
    assert 0.1 < value < 1
    np.testing.assert_allclose(found, value, rtol=1e-5)
    expected = bench_meanflow.separate(jax.device_get(grads))
    assert jax.tree.structure(expected) == jax.tree.structure(found_grads)
    sizes = {}
    for path, leaf in jax.tree.leaves_with_path(expected):
        sizes[path_name(path)] = np.abs(leaf).max()
    largest = max(sizes.values())
    for size, leaf, other in zip(
        sizes.values(), jax.tree.leaves(expected), jax.tree.leaves(found_grads)
    ):
        np.testing.assert_allclose(
            other, leaf, rtol=0, atol=1e-4 * size + 1e-7 * largest
        )
    # a bias of keys shifts all scores of a query alike, which softmax does not see
    zero = {name for name, size in sizes.items() if size < 1e-6 * largest}
    assert zero == {f"blocks/{layer}/to_k/bias" for layer in range(4)}


def test_the_update_is_adam_and_an_average():
    rng = np.random.default_rng(0)
    params = {"w": np.float32(rng.standard_normal((3, 2)))}
    state = bench_meanflow.start(params)
    adam = optax.adam(bench_meanflow.LR)
    moments = adam.init(params)
    average = params
    for n in range(3):
        grads = {"w": np.float32(rng.standard_normal((3, 2)))}
        state = bench_meanflow.updated(state, grads)
        updates, moments = adam.update(grads, moments)
        params = optax.apply_updates(params, updates)
        decay = bench_meanflow.DECAY
        average = optax.incremental_update(params, average, 1 - decay)
        np.testing.assert_allclose(state.params["w"], params["w"], rtol=1e-6)
        np.testing.assert_allclose(state.average["w"], average["w"], rtol=1e-6)
        assert state.step == n + 1


def test_draws_have_the_papers_share_of_equal_times():
    x = np.zeros((32, 2, 2, 1), np.float32)
    eps, t, r = jax.jit(bench_meanflow.draw)(jax.random.key(0), x)
    assert np.sum(t == r) == 24 and np.all(r <= t) and np.all((r > 0) & (t < 1))
    assert eps.shape == x.shape
