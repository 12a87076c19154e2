"""Every field of a language method changes what it does, or is refused: none is accepted and left
unread."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core.types import Ctx, Refused
from jaxdistill.methods.architecture.prune_then_distil import PruneThenDistil
from jaxdistill.methods.language import _rollout
from jaxdistill.methods.language.cross_tokenizer_kd import (
    ULD,
    CrossTokenizerKD,
    SpanULD,
)
from jaxdistill.methods.language.ddk import DDK
from jaxdistill.methods.language.gkd import GKD
from jaxdistill.methods.language.grpo import GRPO
from jaxdistill.methods.language.kd import KD, StoredKD
from jaxdistill.methods.language.multi_teacher import (
    EnsembleGKD,
    EnsembleKD,
    RoutedGKD,
    RoutedKD,
)
from jaxdistill.methods.language.paced import Paced, SelfPaced
from jaxdistill.methods.language.recursive_meta import RecursiveMeta
from jaxdistill.methods.language.rlad import KDRL, RLAD
from jaxdistill.methods.language.sequence_kd import SequenceKD
from jaxdistill.methods.language.sft import SFT
from jaxdistill.methods.language.step_by_step import StepByStep
from jaxdistill.methods.language.tsd_kd import TSDKD, Released
from jaxdistill.methods.language.universalner import UniversalNER
from jaxdistill.objectives.divergence import ForwardKL, JensenShannon, ReverseKL
from jaxdistill.objectives.schedule import Cosine, Linear

RNG = np.random.default_rng(0)
VOCAB = 6
ROWS = 3
LENGTH = 8
TABLES = {
    role: RNG.standard_normal((VOCAB, VOCAB))
    for role in ("student", "teacher", "teacher1", "old", "reference")
}
TOKENS = RNG.integers(0, VOCAB, (2, ROWS, LENGTH))
MASK = np.tile(np.float32(np.arange(LENGTH) > 1), (ROWS, 1))
SPAN = np.where(MASK > 0, np.arange(LENGTH), -1)
BATCH = {
    **{
        "tokens": TOKENS[0],
        "mask": MASK,
        "span": SPAN,
        "domain": np.arange(ROWS) % 2,
    },
    **{"teacher_tokens": TOKENS[1], "teacher_mask": MASK, "teacher_span": SPAN},
    **{"explain_tokens": TOKENS[1], "explain_mask": MASK},
    "teacher_ids": np.tile(np.int32([2, 0, 5]), (ROWS, LENGTH, 1)),
    "teacher_log_probs": np.log(np.tile([0.5, 0.2, 0.1], (ROWS, LENGTH, 1))),
    "teacher_log_tail": np.log(np.full((ROWS, LENGTH), 0.2)),
}
BATCH = {k: jnp.asarray(v) for k, v in BATCH.items()}

METHODS = {
    **{
        cls.__name__: cls()
        for cls in (
            KD,
            StoredKD,
            GKD,
            TSDKD,
            Released,
            Paced,
            SelfPaced,
            RecursiveMeta,
            CrossTokenizerKD,
            ULD,
            SpanULD,
        )
    },
    **{
        cls.__name__: cls()
        for cls in (EnsembleKD, EnsembleGKD, RoutedKD, RoutedGKD, PruneThenDistil)
    },
    "DDK": DDK(domains=2, interval=3),
    **{cls.__name__: cls() for cls in (SFT, SequenceKD, StepByStep, UniversalNER)},
    **{cls.__name__: cls(group=3) for cls in (GRPO, RLAD, KDRL)},
}
AWAY = {
    "divergence": ReverseKL(),
    "temperature": 3.0,
    "hard_weight": 0.3,
    "top_k": 2,
    "support": "student",
    "tail": "dropped",
    "chunk": 4,
    "on_policy": 0.25,
    "sample_temperature": 0.6,
    "prompt_length": 3,
    "eos": (1,),
    "pad": 4,
}
NEEDS = {  # what gives a field a meaning
    "support": {"top_k": 2},
    "tail": {"top_k": 2},
}


@pytest.fixture
def seen(monkeypatch):
    """What the networks and the sampler were asked for."""
    asked = []

    def respond(net, batch, key, *, copies=1, **how):
        asked.append(sorted(how.items()))
        rows = {k: jnp.repeat(v, copies, 0) for k, v in batch.items()}
        return {**rows, "answer": rows["tokens"], "answer_mask": rows["mask"]}

    monkeypatch.setattr(_rollout, "respond", respond)
    return asked


def networks(asked):
    """Models that look up their next-token logits by the last token; hidden states are those
    logits.
    """

    def model(role):
        def call(
            tokens=None, *, method="__call__", hidden_only=False, taps=(), **_
        ):
            if method == "unembedding":
                return jnp.eye(VOCAB)
            if hidden_only:
                asked.append("hidden_only")
            return jnp.asarray(TABLES[role], jnp.float32)[tokens]

        return call

    return SimpleNamespace(**{role: model(role) for role in TABLES})


def behaviour(method, seen):
    """The patterns of its turns, their losses, and what was asked for on the way."""
    seen.clear()
    nets = networks(seen)
    out = []
    for turn in method.turns:
        if not turn.moves:
            continue
        ctx = Ctx(BATCH, jax.random.key(0), jnp.int32(0), method.memory())
        batch = turn.gather(nets, ctx) if turn.gather else BATCH
        loss = turn.loss(nets, Ctx(batch, ctx.rng, ctx.step, ctx.memory)).loss
        out.append(([turn.when(step) for step in range(40)], float(loss)))
    return out, list(seen)


@pytest.mark.full
@pytest.mark.parametrize("name", METHODS)
def test_every_inherited_field_acts_or_is_refused(name, seen):
    method = METHODS[name]
    unread = []
    for field in (f.name for f in dataclasses.fields(method) if f.name in AWAY):
        away = AWAY[field] if getattr(method, field) != AWAY[field] else ForwardKL()
        # its store has a top_k
        needs = {} if name == "StoredKD" else NEEDS.get(field, {})
        try:
            before = dataclasses.replace(method, **needs)
            after = dataclasses.replace(before, **{field: away})
        except Refused as error:
            assert "\n" not in str(error) and str(error).startswith("method.")
            continue
        if behaviour(before, seen) == behaviour(after, seen):
            unread.append(field)
    assert not unread


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("TSDKD", "hard_weight"),
        ("Paced", "hard_weight"),
        ("DDK", "hard_weight"),
        ("Paced", "on_policy"),
        ("ULD", "divergence"),
    ],
)
def test_fields_without_a_meaning_are_refused(name, field):
    with pytest.raises(Refused, match=rf"method\.{field}=.*: expected .*, for "):
        dataclasses.replace(METHODS[name], **{field: AWAY[field]})


def test_the_students_own_text_has_no_label(seen):
    """The hard term is on batches of the data alone; on others the divergence keeps its whole
    weight.
    """
    plain = GKD()
    mixed = GKD(hard_weight=0.25)
    (own, given), _ = behaviour(mixed, seen)
    (own_plain, given_plain), _ = behaviour(plain, seen)
    hard = behaviour(KD(hard_weight=1.0), seen)[0][0][1]
    assert own == own_plain
    np.testing.assert_allclose(
        given[1], 0.75 * given_plain[1] + 0.25 * hard, rtol=1e-6
    )
    with pytest.raises(
        Refused,
        match=r"method\.hard_weight=0\.25: expected 0 where method\.on_policy=1",
    ):
        GKD(hard_weight=0.25, on_policy=1.0)


def test_sequence_kd_projects_in_chunks(seen):
    plain, parts = (behaviour(SequenceKD(chunk=chunk), seen) for chunk in (0, 4))
    assert "hidden_only" in parts[1] and "hidden_only" not in plain[1]
    np.testing.assert_allclose(parts[0][0][1], plain[0][0][1], rtol=1e-6)


@pytest.mark.full
def test_schedules_reach_every_loss(seen):
    """Halfway, each of these is the method with the number of that step."""
    ramp = lambda start, end: Linear(start=start, end=end, steps=10)

    def loss(method, step):
        ctx = Ctx(BATCH, jax.random.key(0), jnp.int32(step), {})
        return jax.jit(lambda: method.loss(networks([]), ctx).loss)()

    for cls in (
        KD,
        EnsembleKD,
        RoutedKD,
        RecursiveMeta,
        CrossTokenizerKD,
        ULD,
        PruneThenDistil,
        StoredKD,
    ):
        weighted = cls(hard_weight=ramp(0.0, 1.0))
        np.testing.assert_allclose(
            loss(weighted, 5), loss(cls(hard_weight=0.5), 5), rtol=1e-6
        )
        if cls is not StoredKD:
            np.testing.assert_allclose(
                loss(cls(temperature=ramp(3.0, 1.0)), 5),
                loss(cls(temperature=2.0), 5),
                rtol=1e-5,
            )
    for cls in (GKD, EnsembleGKD, RoutedGKD, TSDKD):
        for step, beta in ((0, 0.0), (5, 0.4), (10, 0.8)):
            np.testing.assert_allclose(
                loss(cls(divergence=JensenShannon(beta=ramp(0.0, 0.8))), step),
                loss(cls(divergence=JensenShannon(beta=beta)), step),
                rtol=1e-5,
            )
    cosine = KD(divergence=JensenShannon(beta=Cosine(start=1.0, end=0.0, steps=8)))
    np.testing.assert_allclose(
        loss(cosine, 2),
        loss(KD(divergence=JensenShannon(beta=0.8535533905932737)), 2),
        rtol=1e-5,
    )


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (
            lambda: KD(temperature=0.0),
            r"method\.temperature=0\.0: expected a number above 0",
        ),
        (
            lambda: KD(temperature=Linear(start=1.0, end=0.0, steps=3)),
            r"method\.temperature=Linear.*above 0",
        ),
        (lambda: KD(hard_weight=1.5), r"method\.hard_weight=1\.5: expected 0 to 1"),
        (
            lambda: KD(hard_weight=float("nan")),
            r"method\.hard_weight=nan: expected 0 to 1",
        ),
        (
            lambda: KD(top_k=2, support="studnet"),
            r"method\.support='studnet': did you mean 'student'\?",
        ),
        (
            lambda: KD(top_k=2, tail="drop"),
            r"method\.tail='drop': did you mean 'dropped'\?",
        ),
        (
            lambda: KD(support="student"),
            r"method\.support='student', method\.tail='bucket': need method\.top_k above 0",
        ),
        (
            lambda: GKD(divergence=JensenShannon(beta=1.5)),
            r"beta=1\.5: expected 0 to 1",
        ),
        (lambda: GKD(on_policy=-0.1), r"method\.on_policy=-0\.1: expected 0 to 1"),
        (
            lambda: GKD(sample_temperature=-1.0),
            r"method\.sample_temperature=-1\.0: expected a number of 0 or more",
        ),
        (
            lambda: StoredKD(temperature=Linear(start=2.0, end=1.0, steps=3)),
            r"method\.temperature: a schedule",
        ),
        (lambda: SFT(chunk=-1), r"method\.chunk=-1: expected 0 or more"),
    ],
)
def test_refusals(made, said):
    with pytest.raises(Refused, match=said) as error:
        made()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("cls", [GRPO, RLAD, KDRL])
@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_policy_gradients_need_samples(cls, temperature):
    with pytest.raises(
        Refused,
        match=r"method\.sample_temperature=.*: expected a number above 0: .* learns from samples",
    ):
        cls(sample_temperature=temperature)
    # greedy text can be learned
    assert SequenceKD(sample_temperature=0.0) and GKD(sample_temperature=0.0)
