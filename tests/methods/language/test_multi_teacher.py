import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.core.needs import check_needs
from jaxdistill.core.net import make_net
from jaxdistill.core.step import bind
from jaxdistill.core.types import Ctx, Refused
from jaxdistill.data.domains import Chains
from jaxdistill.data.language import Markov
from jaxdistill.methods.language.gkd import GKD
from jaxdistill.methods.language.kd import KD
from jaxdistill.methods.language.multi_teacher import (
    EnsembleGKD,
    EnsembleKD,
    RoutedGKD,
    RoutedKD,
)
from jaxdistill.models.language.lm import LM
from jaxdistill.objectives.divergence import JensenShannon
from tools.first_steps import first_steps

LARGE = make_net(LM(vocab=5, dim=12, mlp=16, heads=2, depth=2))
SMALL = make_net(LM(vocab=5, dim=8, mlp=8, heads=2, depth=1))
NETS = {"teacher": LARGE, "teacher1": SMALL, "student": SMALL}
RNG = np.random.default_rng(0)
PARAMS = {
    role: jax.tree.map(
        lambda s: jnp.asarray(0.5 * RNG.standard_normal(s.shape), s.dtype),
        net.shapes,
    )
    for role, net in NETS.items()
}
DATA = Chains(vocab=5, length=6, branches=(2, 3), size=40, held_out=8, batch_size=8)
BATCH = {k: jnp.asarray(v) for k, v in DATA.batch(0, slice(None)).items()}


def alone(number):
    """Nets and weights with one of the teachers as the only one."""
    role = ("teacher", "teacher1")[number]
    return {"teacher": NETS[role], "student": SMALL}, {
        "teacher": PARAMS[role],
        "student": PARAMS["student"],
    }


def value(method, nets=NETS, params=PARAMS, batch=BATCH):
    """(Out, gradient in the student's weights)"""

    def loss(student):
        ctx = Ctx(batch, jax.random.key(0), 0, {})
        out = method.loss(bind(nets, {**params, "student": student}), ctx)
        return out.loss, out

    grad, out = jax.jit(jax.grad(loss, has_aux=True))(params["student"])
    return out, grad


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def close(a, b):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), a, b
    )


OPTIONS = dict(divergence=JensenShannon(), temperature=2.0, hard_weight=0.25)


@pytest.mark.parametrize("number", [0, 1])
def test_all_weight_on_one_teacher_is_kd_bit_for_bit(number):
    weights = (1.0, 0.0) if number == 0 else (0.0, 1.0)
    same(
        value(EnsembleKD(weights=weights, **OPTIONS)),
        value(KD(**OPTIONS), *alone(number)),
    )


def test_so_are_the_steps_that_follow():
    def train(method, nets, params):
        states, metrics = first_steps(
            method, nets, optax.adam(1e-2), params, BATCH, 3
        )
        return [row["student/loss"] for row in metrics], states[-1].params

    same(
        train(EnsembleKD(weights=(1.0, 0.0)), NETS, PARAMS), train(KD(), *alone(0))
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_target_is_the_mixture_of_tempered_laws(temperature):
    laws = [
        jax.nn.softmax(NETS[r].apply(PARAMS[r], BATCH["tokens"]) / temperature)
        for r in ("teacher", "teacher1")
    ]
    p = (0.3 * laws[0] + 0.7 * laws[1])[:, :-1]
    log_q = jax.nn.log_softmax(
        SMALL.apply(PARAMS["student"], BATCH["tokens"]) / temperature
    )[:, :-1]
    each = temperature**2 * (p * (jnp.log(p) - log_q)).sum(-1)
    out, _ = value(EnsembleKD(weights=(0.3, 0.7), temperature=temperature))
    np.testing.assert_allclose(
        out.loss, jnp.where(BATCH["mask"][:, 1:] > 0, each, 0).sum(), rtol=1e-5
    )


def test_equal_teachers_are_one():
    nets = {**NETS, "teacher1": LARGE}
    params = {**PARAMS, "teacher1": PARAMS["teacher"]}
    for pool in ("linear", "geometric"):
        close(
            value(EnsembleKD(weights=(0.5, 0.5), pool=pool), nets, params),
            value(KD(), *alone(0)),
        )


def test_gradient_of_forward_kl_is_linear_in_the_teachers():
    _, mixed = value(EnsembleKD(weights=(0.3, 0.7)))
    (_, first), (_, second) = (value(KD(), *alone(i)) for i in (0, 1))
    close(mixed, jax.tree.map(lambda a, b: 0.3 * a + 0.7 * b, first, second))


@pytest.mark.full
@pytest.mark.parametrize("more", [{}, {"chunk": 2}, {"top_k": 2}])
def test_rows_learn_from_the_teacher_of_their_domain(more):
    assert set(BATCH["domain"].tolist()) == {0, 1}
    routed = RoutedKD(routes=(0, 1), **OPTIONS, **more)
    out, grad = value(routed)
    parts = []
    for number in (0, 1):
        rows = {k: v[BATCH["domain"] == number] for k, v in BATCH.items()}
        parts.append(value(KD(**OPTIONS, **more), *alone(number), rows))
    close(
        (out.loss, out.count, out.metrics),
        jax.tree.map(
            lambda a, b: a + b, *[(o.loss, o.count, o.metrics) for o, _ in parts]
        ),
    )
    close(grad, jax.tree.map(lambda a, b: a + b, parts[0][1], parts[1][1]))
    swapped = {**BATCH, "domain": 1 - BATCH["domain"]}
    close(
        value(dataclasses.replace(routed, routes=(1, 0)), batch=swapped),
        (out, grad),
    )
    assert abs(value(routed, batch=swapped)[0].loss - out.loss) > 1e-2


@pytest.mark.parametrize("number", [0, 1])
def test_one_domain_is_kd(number):
    batch = {**BATCH, "domain": jnp.full(8, number)}
    close(value(RoutedKD(), batch=batch), value(KD(), *alone(number), batch))


def test_two_domains_may_share_a_teacher():
    batch = {**BATCH, "domain": jnp.arange(8) % 3}
    first = {**batch, "domain": jnp.asarray([0, 1, 1])[batch["domain"]]}
    close(
        value(RoutedKD(routes=(0, 1, 1)), batch=batch),
        value(RoutedKD(), batch=first),
    )


@pytest.mark.parametrize(
    ("cls", "given"), [(EnsembleGKD, EnsembleKD), (RoutedGKD, RoutedKD)]
)
def test_on_given_text_it_is_the_same_divergence_without_sampling(cls, given):
    method = cls(on_policy=0.0, divergence=JensenShannon(beta=0.3))
    assert not any(method.turns[0].when(step) for step in range(50))
    close(value(method), value(given(divergence=JensenShannon(beta=0.3))))


@pytest.mark.parametrize("cls", [EnsembleGKD, RoutedGKD])
def test_several_teachers_grade_what_the_student_writes(cls):
    """The batch of its own text keeps the prompts' domains, and the loss on it is that on given
    text.
    """
    method = cls(on_policy=1.0, prompt_length=2, sample_temperature=0.0)
    nets = bind(NETS, PARAMS)
    written = jax.jit(
        lambda: method.turns[0].gather(nets, Ctx(BATCH, jax.random.key(0), 0, {}))
    )()
    np.testing.assert_array_equal(written["domain"], BATCH["domain"])
    np.testing.assert_array_equal(written["tokens"][:, :2], BATCH["tokens"][:, :2])
    likeliest = SMALL.apply(PARAMS["student"], written["tokens"]).argmax(-1)
    np.testing.assert_array_equal(written["tokens"][:, 2:], likeliest[:, 1:-1])
    out = method.turns[0].loss(nets, Ctx(written, jax.random.key(0), 0, {}))
    base = EnsembleKD if cls is EnsembleGKD else RoutedKD
    same = {
        k: written[k] for k in ("tokens", "mask", "segments", "positions", "domain")
    }
    close(out, value(base(divergence=JensenShannon(beta=0.5)), batch=same)[0])
    with pytest.raises(Refused, match=r"method\.sample_temperature=-1"):
        cls(sample_temperature=-1.0)


def test_one_teacher_of_several_is_gkd():
    method = EnsembleGKD(weights=(1.0, 0.0), divergence=JensenShannon(beta=0.8))
    gkd = GKD(divergence=JensenShannon(beta=0.8))
    close(value(method), value(gkd, *alone(0)))
    assert [method.is_on_policy(i) for i in range(20)] == [
        gkd.is_on_policy(i) for i in range(20)
    ]


def test_refusals():
    RoutedKD().check(NETS, DATA)
    for bad in ((0.5, 0.6), (1.5, -0.5), ()):
        with pytest.raises(Refused, match=r"method.weights=.*sum to 1"):
            EnsembleKD(weights=bad)
    with pytest.raises(Refused, match="a mixture has no final hidden states"):
        EnsembleKD(chunk=2)
    with pytest.raises(Refused, match="did you mean 'linear'"):
        EnsembleKD(pool="linaer")
    for bad in ((0, 2), (), (1,)):
        with pytest.raises(Refused, match=r"each of 0, 1, ... at least once"):
            RoutedKD(routes=bad)
    check_needs(DATA.spec(), RoutedKD().needs, "RoutedKD", "config.data")
    with pytest.raises(
        Refused, match=r"config.data: RoutedKD needs 'domain' int \[B\]"
    ):
        check_needs(
            Markov(vocab=5).spec(), RoutedKD().needs, "RoutedKD", "config.data"
        )
    with pytest.raises(Refused, match="the data has 2 domains"):
        RoutedKD(routes=(0,)).check({"teacher": LARGE, "student": SMALL}, DATA)
    other = make_net(
        config := LM(vocab=6, dim=8, mlp=8, heads=2, depth=1), config=config
    )
    known = make_net(
        config := LM(vocab=5, dim=8, mlp=8, heads=2, depth=1), config=config
    )
    with pytest.raises(
        Refused,
        match=r"config.roles.teacher1: a vocabulary of 6 tokens, the student's has 5",
    ):
        EnsembleKD().check(
            {"teacher": known, "teacher1": other, "student": known}, DATA
        )
