"""The text evaluation: its metrics are those of teacher and student, computed by hand."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxdistill.core.net import make_net
from jaxdistill.data.language import Markov
from jaxdistill.evals.text import TextEval
from jaxdistill.models.language.lm import LM
from jaxdistill.run.experiment import Trained


@pytest.fixture(scope="module")
def trained():
    data = Markov(vocab=7, length=12, batch_size=8)
    small = LM(vocab=7, dim=16, mlp=32, heads=2, depth=2)
    nets = {"teacher": data.net(), "student": make_net(small, config=small)}
    params = {role: net.init(jax.random.key(0)) for role, net in nets.items()}
    return Trained(SimpleNamespace(data=data), nets, params)


def by_hand(trained, role, held):
    """(log-probabilities [B T-1 V] of teacher and role at every target, the targets [B T-1])."""
    logits = lambda role: np.asarray(
        trained.nets[role].apply(trained.params[role], held["tokens"]), np.float64
    )[:, :-1]
    laws = [
        z - np.log(np.exp(z).sum(-1, keepdims=True))
        for z in map(logits, ("teacher", role))
    ]
    return *laws, held["tokens"][:, 1:]


@pytest.mark.full
def test_rows_of_a_live_teacher_and_a_student(trained):
    evaluation = TextEval(samples=24, batch=16, prompt_length=4)
    teacher, student = evaluation.rows(trained)
    assert (teacher["name"], student["name"]) == ("teacher", "student")
    held = trained.experiment.data.evaluation(24)
    for row in (teacher, student):
        p, q, labels = by_hand(trained, row["name"], held)
        nll = -np.take_along_axis(q, labels[..., None], -1)
        expected = {
            "perplexity": np.exp(nll.mean()),
            "kl": (np.exp(p) * (p - q)).sum(-1).mean(),
            "reverse_kl": (np.exp(q) * (q - p)).sum(-1).mean(),
            "agreement": (p.argmax(-1) == q.argmax(-1)).mean(),
        }
        # float32 sums of 24 x 11 tokens
        assert {k: row[k] for k in expected} == pytest.approx(
            expected, rel=1e-5, abs=1e-6
        )
    assert teacher["kl"] == pytest.approx(0, abs=1e-6) and teacher["agreement"] == 1
    # an exact teacher has no cache to write with
    assert "rollout_kl" not in teacher


def test_what_the_student_goes_on_with_is_scored_on_those_tokens_alone(trained):
    evaluation = TextEval(samples=24, batch=24, prompt_length=4)
    held = trained.experiment.data.evaluation(24)
    own, _ = evaluation.write(trained, "student", held)
    assert (own["tokens"][:, :4] == held["tokens"][:, :4]).all() and own[
        "mask"
    ].sum(1).tolist() == [8.0] * 24
    p, q, _ = by_hand(trained, "student", own)
    row = evaluation.rows(trained)[1]
    expected = [
        (np.exp(a) * (a - b)).sum(-1)[:, 3:].mean() for a, b in ((p, q), (q, p))
    ]
    assert [row["rollout_kl"], row["rollout_reverse_kl"]] == pytest.approx(
        expected, rel=1e-5
    )
