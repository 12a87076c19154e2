import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.core.net import make_net
from jaxdistill.core.step import bind, init_state, make_train_step
from jaxdistill.core.types import Ctx, Refused
from jaxdistill.data.domains import Chains
from jaxdistill.data.language import Markov
from jaxdistill.methods.language.ddk import DDK
from jaxdistill.methods.language.kd import KD
from jaxdistill.methods.language.sft import SFT
from jaxdistill.models.language.lm import LM
from tools.first_steps import first_steps

NETS = {
    "teacher": make_net(LM(vocab=4, dim=8, mlp=8, heads=2, depth=1)),
    "student": make_net(LM(vocab=4, dim=8, mlp=8, heads=2, depth=1)),
}
PARAMS = {
    role: net.init(jax.random.key(i)) for i, (role, net) in enumerate(NETS.items())
}
DATA = Chains(
    vocab=4,
    length=6,
    branches=(2, 3),
    size=50,
    held_out=20,
    batch_size=8,
    interval=3,
    measures=2,
)
METHOD = DDK(domains=2, interval=3, measures=2)
BATCHES = [DATA.batch(i, slice(None)) for i in range(5)]


def loss(method, params=PARAMS, batch=BATCHES[2]):
    run = lambda params: method.turns[0].loss(
        bind(NETS, params), Ctx(batch, jax.random.key(0), 0, {})
    )
    return jax.jit(run)(params)


def test_turns_are_those_of_the_schedule():
    active = [
        [i for i, t in enumerate(METHOD.turns) if t.when(step)]
        for step in range(10)
    ]
    assert active == [[2], [1], [0], [0], [0], [4], [3], [0], [0], [0]]
    assert [t.moves for t in METHOD.turns] == [("student",), (), (), (), ()]


@pytest.fixture(scope="module")
def ran():
    """Two measurements, three training steps between: [(state before, metrics)], final state."""
    states, metrics = first_steps(
        METHOD,
        NETS,
        optax.adam(1e-2),
        PARAMS,
        [BATCHES[i % 5] for i in range(7)],
        7,
    )
    return list(zip(states, metrics)), states[-1]


def test_micro_batches_measure_the_same(ran):
    states, metrics = first_steps(
        METHOD, NETS, optax.adam(1e-2), PARAMS, BATCHES[:2], 2, accumulate=2
    )
    for i in range(2):
        np.testing.assert_allclose(
            metrics[1][f"measured/ratio{i}"],
            ran[0][1][1][f"measured/ratio{i}"],
            rtol=1e-6,
        )
    np.testing.assert_allclose(
        states[-1].memory["teacher"], ran[1].memory["teacher"], rtol=1e-6
    )


def ratios(student):
    def perplexity(role, params, domain):
        rows = [b["tokens"][b["domain"] == domain] for b in BATCHES[:2]]
        tokens = jnp.asarray(np.concatenate(rows))
        logits = jax.nn.log_softmax(NETS[role].apply(params, tokens)[:, :-1])
        return jnp.exp(
            -jnp.mean(jnp.take_along_axis(logits, tokens[:, 1:, None], -1))
        )

    return [
        float(
            perplexity("student", student, d)
            / perplexity("teacher", PARAMS["teacher"], d)
        )
        for d in range(2)
    ]


def test_measured_ratios_are_those_of_the_whole_validation_sets(ran):
    log, _ = ran
    reported = [
        i for i, (_, metrics) in enumerate(log) if "measured/ratio0" in metrics
    ]
    assert reported == [1, 6]
    for i in reported:
        before, metrics = log[i]
        np.testing.assert_allclose(
            [metrics[f"measured/ratio{d}"] for d in range(2)],
            ratios(before.params["student"]),
            rtol=1e-5,
        )


def test_measuring_moves_nothing_and_remembers_the_teacher(ran):
    log, end = ran
    for i in (0, 1, 5, 6):
        after = log[i + 1][0] if i < 6 else end
        jax.tree.map(np.testing.assert_array_equal, log[i][0].params, after.params)
        jax.tree.map(np.testing.assert_array_equal, log[i][0].opt, after.opt)
    np.testing.assert_array_equal(
        log[2][0].memory["teacher"], end.memory["teacher"]
    )
    assert (
        end.memory["teacher"][1] == 40
    ).all()  # two batches of four rows of five targets
    assert not end.memory["student"].any()


def test_loss_is_cross_entropy_and_a_little_kl():
    out = loss(METHOD)
    kd = loss(KD())
    sft = loss(SFT())
    np.testing.assert_allclose(out.loss, sft.loss + 0.2 * kd.loss, rtol=1e-6)
    assert out.count == kd.count == 40
    warm = loss(DDK(domains=2, temperature=2.0))  # no T^2
    np.testing.assert_allclose(
        warm.loss, sft.loss + 0.2 * loss(KD(temperature=2.0)).loss / 4, rtol=1e-6
    )


def test_without_gamma_it_is_continued_pretraining():
    for method in (DDK(domains=2, gamma=0.0), SFT()):
        state = init_state(
            method, NETS, {"student": optax.adam(1e-2)}, jax.random.key(0), PARAMS
        )
        step, _ = make_train_step(method, NETS, {"student": optax.adam(1e-2)})
        for i in range(5):
            state, metrics = step(
                state, BATCHES[2 + i % 3], jax.random.key(1), (0,)
            )
        if isinstance(method, DDK):
            first = state.params["student"], metrics["student/loss"]
    np.testing.assert_allclose(first[1], metrics["student/loss"], rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        first[0],
        state.params["student"],
    )


def test_an_equal_teacher_has_ratios_of_one():
    params = {"teacher": PARAMS["teacher"], "student": PARAMS["teacher"]}
    assert abs(loss(METHOD, params).metrics["divergence"]) <= 1e-5
    state = init_state(
        METHOD, NETS, {"student": optax.adam(1e-2)}, jax.random.key(0), params
    )
    ctx = lambda memory, i: Ctx(BATCHES[i], jax.random.key(0), 0, memory)

    def measure(i, memory):
        batch = METHOD.add_batch(
            ("student", "teacher"), bind(NETS, params), ctx(memory, i)
        )
        keep = METHOD.report if i == 1 else METHOD.remember
        return keep(bind(NETS, params), Ctx(batch, jax.random.key(0), 0, memory))

    out = measure(1, measure(0, state.memory).memory)
    np.testing.assert_allclose(
        [out.metrics["ratio0"], out.metrics["ratio1"]], 1.0, rtol=1e-6
    )


def test_controller():
    metrics = lambda a, b: {"measured/ratio0": a, "measured/ratio1": b}
    mixture = METHOD.controller()
    assert mixture.update({"student/loss": 1.0}) == {}
    # the first interval stays as the data are
    assert mixture.update(metrics(1.0, 2.0)) == {}
    np.testing.assert_allclose(mixture.weights, np.array([1, np.e]) / (1 + np.e))
    twin = METHOD.controller()
    twin.restore(mixture.state())
    hints = mixture.update(metrics(1.0, 1.0))
    np.testing.assert_allclose(
        hints["weights"], 0.5 * np.array([1, np.e]) / (1 + np.e) + 0.25
    )
    assert (
        twin.update(metrics(1.0, 1.0)) == hints
        and twin.state() == mixture.state()
        and mixture.measured == 2
    )
    eager = DDK(domains=2, use_r0=True).controller().update(metrics(1.0, 2.0))
    np.testing.assert_allclose(eager["weights"], np.array([1, np.e]) / (1 + np.e))


def test_refusals():
    with pytest.raises(Refused, match=r"method.smoothing=1.5: expected 0 to 1"):
        DDK(domains=2, smoothing=1.5)
    with pytest.raises(Refused, match=r"method.interval=0"):
        DDK(domains=2, interval=0)
    with pytest.raises(Refused, match="has every domain held-out rows"):
        METHOD.controller().update(
            {"measured/ratio0": float("nan"), "measured/ratio1": 1.0}
        )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            dict(interval=4),
            r"method.interval=3: the data \(Chains\) has 4, expected the same",
        ),
        (
            dict(interval=0),
            r"method.interval=3: the data \(Chains\) has 0, expected the same",
        ),
        (
            dict(measures=1),
            r"method.measures=2: the data \(Chains\) has 1, expected the same",
        ),
        (
            dict(branches=(2, 2, 3), batch_size=9),
            r"method.domains=2: the data \(Chains\) has 3, expected the same",
        ),
    ],
)
def test_data_of_another_schedule_is_refused(fields, message):
    METHOD.check(NETS, DATA)
    with pytest.raises(Refused, match=message):
        METHOD.check(NETS, dataclasses.replace(DATA, **fields))


def test_no_method_trains_on_held_out_batches():
    """Where the data has held-out batches and the method moves a role at one, they are refused;
    data without them is not.
    """
    given = r"data.interval=3, data.measures=2"
    refused = f"{given}: SFT would train student on the held-out samples of step 0"
    with pytest.raises(Refused, match=refused):
        DATA.check_method(SFT())
    with pytest.raises(
        Refused, match="KD would train student on the held-out samples of step 0"
    ):
        DATA.check_method(KD())
    with pytest.raises(
        Refused, match="DDK would train student on the held-out samples of step 5"
    ):
        DATA.check_method(DDK(domains=2, interval=4, measures=2))
    dataclasses.replace(DATA, interval=0).check_method(SFT())
    DATA.check_method(METHOD)


def test_other_data_is_refused():
    with pytest.raises(
        Refused, match=r"method.interval=3: the data \(Markov\) has 0"
    ):
        METHOD.check(NETS, Markov(vocab=4, branch=2))
