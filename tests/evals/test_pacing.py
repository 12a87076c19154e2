"""The monitors of PACED: what is forgotten since the first weights, and the problems' signal to
noise.
"""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxdistill.core.build import spec
from jaxdistill.core.net import make_net
from jaxdistill.core.types import Refused
from jaxdistill.data.language import Carry, Markov
from jaxdistill.evals.pacing import PacedEval
from jaxdistill.evals.text import TextEval
from jaxdistill.methods.language.paced import Paced, SelfPaced
from jaxdistill.methods.language.sft import SFT
from jaxdistill.models.language.lm import LM
from jaxdistill.run.experiment import Trained

SMALL = LM(vocab=14, dim=8, mlp=8, heads=2, depth=1)
NET = make_net(SMALL, config=SMALL)
WEIGHTS = {
    name: NET.init(jax.random.key(i))
    for i, name in enumerate(("teacher", "student"))
}
GENERAL = Markov(vocab=14, length=6, batch_size=8)


def trained(method, first, source="fresh"):
    """A run whose student began with the weights `first`[student], if any."""
    experiment = SimpleNamespace(
        data=Carry(digits=1, batch_size=8),
        method=method,
        settings=SimpleNamespace(steps=2),
        warm_starts=lambda: first,
        source=lambda _: source,
    )
    nets = dict.fromkeys(WEIGHTS, NET)
    return Trained(experiment, nets, WEIGHTS)


def student(evaluation, run):
    return next(row for row in evaluation.rows(run) if row["name"] == "student")


def perplexity(params, data):
    """Of the data's held-out samples, by hand."""
    held = data.evaluation(16)
    law = jax.nn.log_softmax(NET.apply(params, held["tokens"]))[:, :-1]
    nll = -np.take_along_axis(np.asarray(law), held["tokens"][:, 1:, None], -1)[
        ..., 0
    ]
    return np.exp((nll * held["mask"][:, 1:]).sum() / held["mask"][:, 1:].sum())


def test_what_is_forgotten_is_the_general_datas_loss_since_the_start():
    evaluation = PacedEval(samples=16, batch=16, general=GENERAL)
    row = student(evaluation, trained(Paced(), {"student": WEIGHTS["teacher"]}))
    now, before = (
        perplexity(WEIGHTS[name], GENERAL) for name in ("student", "teacher")
    )
    assert row["general_perplexity"] == pytest.approx(now, rel=1e-5)
    assert row["forgetting"] == pytest.approx(np.log(now / before), abs=1e-5)
    assert "accuracy_lost" not in row  # nobody can tell what is right there
    same = student(evaluation, trained(Paced(), {"student": WEIGHTS["student"]}))
    assert same["forgetting"] == 0


def test_a_student_that_began_as_its_teacher_is_held_against_it():
    copied = student(
        PacedEval(samples=16, general=GENERAL),
        trained(SelfPaced(), {"teacher": WEIGHTS["teacher"]}, "teacher"),
    )
    assert copied["forgetting"] != 0
    random = student(
        PacedEval(samples=16, general=GENERAL),
        trained(Paced(), {"teacher": WEIGHTS["teacher"]}),
    )
    assert "general_perplexity" in random and "forgetting" not in random


def test_lost_accuracy_where_answers_can_be_checked(monkeypatch):
    """Right answers are those that begin with the digit most written by the first weights."""
    general = Carry(digits=1, batch_size=8, seed=3)
    run = trained(Paced(), {"student": WEIGHTS["teacher"]})
    firsts = np.concatenate(
        [
            TextEval(samples=6).write(run, who, general.evaluation(6))[0]["tokens"][
                :, 4
            ]
            for who in WEIGHTS
        ]
    )
    monkeypatch.setattr(
        Carry, "correct", lambda self, tokens: tokens[:, 4] == firsts[0]
    )
    row = student(PacedEval(samples=6, general=general), run)
    before = np.mean(firsts[:6] == firsts[0])
    now = np.mean(firsts[6:] == firsts[0])
    assert row["general_accuracy"] == pytest.approx(now) and row[
        "accuracy_lost"
    ] == pytest.approx(before - now)


@pytest.mark.full
@pytest.mark.parametrize(
    "method", [Paced(attempts=2, success=-1.0), SelfPaced(attempts=2, success=-1.0)]
)
def test_the_probe_runs_on_training_problems(method):
    """Every attempt passes, so that all problems are in the last part."""
    evaluation = PacedEval(samples=6, problems=12, bins=4)
    row = student(evaluation, trained(method, {}))
    assert [name for name in row if name.startswith("snr")] == [
        "snr_3"
    ] and -1 / 12 <= row["snr_3"] < np.inf


def test_nothing_asked_is_the_plain_evaluation():
    run = trained(Paced(), {})
    strip = lambda rows: [
        {k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows
    ]
    assert strip(PacedEval(samples=6).rows(run)) == strip(
        TextEval(samples=6).rows(run)
    )
    assert PacedEval().table(("student",), None) == TextEval().table(
        ("student",), None
    )
    table = PacedEval(general=GENERAL, problems=4).table(
        ("teacher", "student"), None
    )
    assert {"forgetting", "snr_*"} <= set(table["student@1"]) and table[
        "teacher@1"
    ] == TextEval.metrics


def test_refusals():
    with pytest.raises(
        Refused, match=r"evaluation\.problems=-1: expected an integer of at least 0"
    ):
        PacedEval(problems=-1)
    with pytest.raises(Refused, match=r"general='text': expected a Dataset"):
        spec("evals.pacing:PacedEval", general="text")
    with pytest.raises(
        Refused, match=r"evaluation\.general: 20 tokens, the training data has 14"
    ):
        PacedEval(general=Markov(vocab=20)).check(Carry())
    with pytest.raises(Refused, match="SFT has no pass rates"):
        PacedEval(samples=6, problems=4).rows(trained(SFT(), {}))
