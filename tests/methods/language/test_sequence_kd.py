"""Sequence-level distillation: whose words are learnt, and what remains when the teacher writes
what the data has.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core.net import make_net
from jaxdistill.core.types import Ctx
from jaxdistill.methods.language.sequence_kd import SequenceKD
from jaxdistill.methods.language.sft import SFT
from jaxdistill.models.language.lm import LM

SIZES = dict(vocab=8, dim=8, mlp=16, heads=2, depth=1, max_length=6)


@pytest.fixture(scope="module")
def setting():
    net = make_net(LM(**SIZES))
    bind = lambda seed: net.bind(
        "net",
        {"net": jax.tree.map(lambda w: 3 * w, net.init(jax.random.key(seed)))},
    )
    tokens = jax.random.randint(jax.random.key(5), (4, 6), 0, 8)
    batch = {
        "tokens": tokens,
        "mask": jnp.tile(jnp.float32(jnp.arange(6) >= 3), (4, 1)),
    }
    return SimpleNamespace(student=bind(0), teacher=bind(1)), Ctx(
        batch, jax.random.key(2), jnp.int32(0), {}
    )


def test_responses_are_the_teachers_greedy_ones(setting):
    net, ctx = setting
    written = jax.jit(lambda: SequenceKD(prompt_length=3).rollout(net, ctx))()
    np.testing.assert_array_equal(
        written["tokens"][:, :3], ctx.batch["tokens"][:, :3]
    )
    following = net.teacher(written["tokens"])[:, 2:-1].argmax(-1)
    np.testing.assert_array_equal(written["tokens"][:, 3:], following)
    np.testing.assert_array_equal(written["mask"][:, 3:], 1)


def test_loss_is_supervised_training_on_them(setting):
    net, ctx = setting
    method = SequenceKD(prompt_length=3)
    seen = Ctx(
        jax.jit(lambda: method.rollout(net, ctx))(), ctx.rng, ctx.step, ctx.memory
    )
    ours = method.loss(net, seen)
    plain = SFT().loss(net, seen)
    assert ours.loss == plain.loss and ours.count == plain.count == 12
    assert ours.loss != SFT().loss(net, ctx).loss


def test_sampled_responses_are_forward_kl_in_expectation(setting):
    """With one token to write: the mean cross-entropy over the teacher's samples is sum_v p(v)
    (-log q(v)).
    """
    net, ctx = setting
    batch = {
        "tokens": ctx.batch["tokens"][:1, :4],
        "mask": jnp.float32([[0, 0, 0, 1]]),
    }
    method = SequenceKD(prompt_length=3, sample_temperature=1.0)
    n = 4000
    many = Ctx(
        jax.tree.map(lambda v: jnp.tile(v, (n, 1)), batch), ctx.rng, ctx.step, {}
    )
    run = jax.jit(
        lambda: method.loss(
            net, Ctx(method.rollout(net, many), ctx.rng, ctx.step, {})
        )
    )
    out = run()
    p = jax.nn.softmax(net.teacher(batch["tokens"])[0, 2])
    log_q = jax.nn.log_softmax(net.student(batch["tokens"])[0, 2])
    mean = -jnp.sum(p * log_q)
    spread = jnp.sqrt(jnp.sum(p * log_q**2) - jnp.sum(p * log_q) ** 2)
    assert abs(out.loss / out.count - mean) < 4 * spread / n**0.5
