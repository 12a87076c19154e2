import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.core.net import make_net
from jaxdistill.core.step import bind
from jaxdistill.core.types import Ctx, Refused
from jaxdistill.methods.architecture.prune_then_distil import PruneThenDistil
from jaxdistill.methods.language.kd import KD
from jaxdistill.models.language.lm import LM
from tools.first_steps import first_steps

CFG = LM(vocab=7, dim=8, mlp=12, heads=2, depth=3)
NET = make_net(CFG, config=CFG)
RNG = np.random.default_rng(0)
PARAMS = jax.tree.map(
    lambda s: jnp.asarray(0.5 * RNG.standard_normal(s.shape), s.dtype), NET.shapes
)
BATCH = {
    "tokens": jnp.asarray(RNG.integers(0, 7, (3, 6))),
    "mask": jnp.asarray(RNG.integers(0, 2, (3, 6)), jnp.float32).at[0, 1].set(1),
}


def cut(method):
    (stage,) = method.stages(10)
    assert stage.steps == 10 and stage.method is method
    return stage.surgery(
        {"teacher": NET, "student": NET}, {"teacher": PARAMS}, BATCH
    )


def loss(method, nets, params):
    run = lambda params: method.loss(
        bind(nets, params), Ctx(BATCH, jax.random.key(0), 0, {})
    )
    return jax.jit(run)(params)


def test_surgery_leaves_a_smaller_student_and_the_teacher_alone():
    nets, params = cut(PruneThenDistil(depth=2, mlp=8))
    assert (nets["student"].config.depth, nets["student"].config.mlp) == (2, 8)
    assert nets["teacher"] is NET and params["teacher"] is PARAMS
    assert jax.tree.map(jnp.shape, params["student"]) == jax.tree.map(
        lambda s: s.shape, nets["student"].shapes
    )


def test_a_student_that_lost_nothing_has_nothing_to_learn():
    method = PruneThenDistil(student_layers=(0, 2), teacher_layers=(0, 2))
    out = loss(method, *cut(method))
    assert abs(out.loss) <= 1e-5 and out.metrics["hidden"] == 0


def test_without_a_layer_map_it_is_kd():
    method = PruneThenDistil(depth=2, temperature=2.0)
    nets, params = cut(method)
    a = loss(method, nets, params)
    b = loss(KD(temperature=2.0), nets, params)
    assert a.loss == b.loss and a.count == b.count and "hidden" not in a.metrics


def test_hidden_states_are_matched_by_the_map_at_targets():
    method = PruneThenDistil(
        depth=2, hidden_weight=0.5, student_layers=(0, 1), teacher_layers=(1, 2)
    )
    nets, params = cut(method)
    out = loss(method, nets, params)
    states = lambda role, layers: jax.jit(
        lambda p: nets[role].apply(p, BATCH["tokens"], taps=layers)[1]
    )(params[role])
    per_token = (
        sum(
            jnp.mean((t - s) ** 2, -1)
            for t, s in zip(states("teacher", (1, 2)), states("student", (0, 1)))
        )
        / 2
    )
    np.testing.assert_allclose(
        out.metrics["hidden"],
        per_token[:, :-1][BATCH["mask"][:, 1:] > 0].sum(),
        rtol=1e-5,
    )
    # alpha L_is has the size of L_logits
    np.testing.assert_allclose(out.loss, 1.5 * out.metrics["divergence"], rtol=1e-5)


def test_hidden_term_has_the_gradient_of_its_own():
    """alpha is a constant of the step: the gradient is that of both terms, not of their ratio."""
    method = PruneThenDistil(depth=2, student_layers=(1,), teacher_layers=(2,))
    nets, params = cut(method)
    terms = lambda p: loss(method, nets, {**params, "student": p})
    out = terms(params["student"])
    grad = jax.jit(jax.grad(lambda p: terms(p).loss))(params["student"])
    alpha = out.metrics["divergence"] / out.metrics["hidden"]
    parts = jax.jit(
        jax.grad(
            lambda p: (
                terms(p).metrics["divergence"] + alpha * terms(p).metrics["hidden"]
            )
        )
    )(params["student"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        grad,
        parts,
    )


def test_five_steps():
    method = PruneThenDistil(
        depth=2, mlp=8, student_layers=(1,), teacher_layers=(2,)
    )
    nets, params = cut(method)
    states, metrics = first_steps(method, nets, optax.adam(1e-2), params, BATCH)
    jax.tree.map(
        np.testing.assert_array_equal,
        states[0].params["student"],
        params["student"],
    )
    losses = [row["student/divergence"] for row in metrics]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.9 * losses[0]
    jax.tree.map(
        np.testing.assert_array_equal, states[-1].frozen["teacher"], PARAMS
    )


def test_refusals():
    with pytest.raises(
        Refused,
        match=r"student_layers=\(1,\) and teacher_layers=\(\) differ in number",
    ):
        PruneThenDistil(student_layers=(1,))
