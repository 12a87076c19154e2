"""SiDA: SiD's loss and Uni-Instruct's GAN under one weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core.build import resolve
from jaxdistill.methods.distribution.sid import SiD
from jaxdistill.methods.distribution.sida import SharedSiDA, SiDA
from jaxdistill.methods.distribution.uni_instruct import (
    SharedUniInstruct,
    UniInstruct,
)
from jaxdistill.objectives.fdivergence import ReverseKL


@pytest.fixture
def drawn(plain, context):
    """(nets with a student, context of a gathered batch)."""
    net, _, x0 = plain[:3]
    net.student = lambda x, t, cond=None: SiDA().process.from_x0(1.1 * x, x, t)
    return net, context(x0, xt=x0, t=jnp.full(len(x0), 2.5))


def slopes(loss, x):
    """The gradient of loss(x) in each entry, times their number."""
    return jax.grad(loss)(x) * x.size


@pytest.mark.parametrize("alpha", [1.0, 1.2])
def test_without_the_gan_it_is_sid(drawn, alpha):
    """Draw for draw: the same value and the same gradient in the student's output."""
    net, ctx = drawn
    scale = 1.1

    def loss(method):
        def of(shift):
            held = lambda x, t, cond=None: method.process.from_x0(
                scale * x + shift, x, t
            )
            moved = type(net)(**{**vars(net), "student": held})
            return method.student_loss(moved, ctx).loss

        return of

    ours = loss(SiDA(alpha=alpha, gan_weight=0.0))
    host = loss(SiD(alpha=alpha))
    shift = jnp.zeros_like(ctx.batch["x"])
    np.testing.assert_allclose(ours(shift), host(shift), rtol=1e-10)
    np.testing.assert_allclose(slopes(ours, shift), slopes(host, shift), rtol=1e-9)
    assert jnp.abs(slopes(ours, shift)).max() > 0.1


def test_at_alpha_one_it_is_uni_instructs_reverse_kl(drawn):
    """GAN included, once Uni-Instruct's GAN acts."""
    net, ctx = drawn
    schedule = dict(reverse_until=0, critic_only=0)
    ours = SiDA(alpha=1.0, **schedule).student_loss(net, ctx)
    host = UniInstruct(divergence=ReverseKL(), **schedule).student_loss(net, ctx)
    np.testing.assert_allclose(ours.loss, host.loss, rtol=1e-10)
    assert ours.metrics["gan"] > 0


def test_the_gan_has_the_weight_of_the_score_identity(drawn):
    """L = scale L_SiD + gan_weight numel omega softplus(-logit)."""
    net, ctx = drawn
    at = lambda weight: SiDA(gan_weight=weight, reverse_until=0).student_loss(
        net, ctx
    )
    numel = ctx.batch["x"][0].size
    difference = at(0.3).loss - at(0.0).loss
    np.testing.assert_allclose(
        difference, 0.3 * numel * at(0.3).metrics["gan"], rtol=1e-9
    )


def test_both_critics_learn_from_the_first_step():
    critics, student = SiDA().turns
    assert critics.moves == ("fake", "disc") and critics.when(0) and student.when(0)


def test_the_papers_discriminator_has_no_weights(plain):
    """The mean over channels of the encoder's features."""
    method = SharedSiDA()
    assert method.turns[0].moves == ("fake",) and "disc" not in method.inits
    assert issubclass(SharedSiDA, SharedUniInstruct)
    features = (jnp.arange(24.0).reshape(2, 3, 4),)
    logits = method.logits_of(plain[0], features, jnp.ones(2), plain[1])
    np.testing.assert_allclose(logits, np.arange(24.0).reshape(2, 3, 4).mean(-1))


def test_the_name_in_earlier_configs_is_read():
    assert resolve("methods.distribution._family:SiDA") is SiDA
