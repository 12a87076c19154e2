"""My method: the specification's checks, identities and limits first."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.core.net import make_net
from jaxdistill.core.step import bind
from jaxdistill.core.types import Ctx
from jaxdistill.methods.architecture.my_method import MyMethod
from jaxdistill.models.language.lm import LM

CFG = LM(vocab=7, dim=8, mlp=12, heads=2, depth=3)
NET = make_net(CFG, config=CFG)
RNG = np.random.default_rng(0)
PARAMS = jax.tree.map(
    lambda s: jnp.asarray(0.5 * RNG.standard_normal(s.shape), s.dtype), NET.shapes
)
BATCH = {
    "tokens": jnp.asarray(RNG.integers(0, 7, (3, 6))),
    "mask": jnp.ones((3, 6), jnp.float32),
}


def cut(method):
    (stage,) = method.stages(10)
    return stage.surgery(
        {"teacher": NET, "student": NET}, {"teacher": PARAMS}, BATCH
    )


def loss(method, nets, params):
    return jax.jit(
        lambda params: method.loss(
            bind(nets, params), Ctx(BATCH, jax.random.key(0), 0, {})
        )
    )(params)


def test_surgery_leaves_a_smaller_student_and_the_teacher_alone():
    nets, params = cut(MyMethod(depth=2))
    assert (
        nets["student"].config.depth == 2
        and nets["teacher"] is NET
        and params["teacher"] is PARAMS
    )
    assert jax.tree.map(jnp.shape, params["student"]) == jax.tree.map(
        lambda s: s.shape, nets["student"].shapes
    )


def test_a_student_that_lost_nothing_has_nothing_to_learn():
    assert abs(loss(MyMethod(), *cut(MyMethod())).loss) <= 1e-5
    shorter = MyMethod(depth=1)
    assert loss(shorter, *cut(shorter)).loss > 1e-2
