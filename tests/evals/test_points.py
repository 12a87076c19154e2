"""Evaluation of points: the state in the middle of a chain, figures of points made under labels."""

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jaxdistill.data.mixtures import Mixture
from jaxdistill.diffusion.process import Flow
from jaxdistill.evals.points import ChainEval, LabelledPointEval, RegretEval
from jaxdistill.methods.distribution.phased_dmd import PhasedDMD


@dataclasses.dataclass
class Trained:
    experiment: Any
    nets: Any
    params: Any
    spread: float

    def bound(self):
        exact = functools.partial(DATA.denoise, Flow())
        call = lambda x, t, cond=None: exact(self.spread * x, t)
        return SimpleNamespace(expert0=call, student=call)


DATA = Mixture(labelled=False)


@pytest.mark.parametrize(
    ("spread", "low", "high"), [(1.0, -2e-3, 4e-3), (1.5, 1e-2, np.inf)]
)
def test_the_state_of_an_exact_chain_has_the_noised_distribution(spread, low, high):
    """64 Euler steps with the exact velocity reach p_.5 to their error of first order; a wrong
    field does not.
    """
    times = tuple(np.linspace(1, 0, 129)[:-1].tolist())
    method = PhasedDMD(student_times=times, phase_steps=(64, 64))
    trained = Trained(
        SimpleNamespace(method=method, data=DATA, conditioned=lambda batch: batch),
        {},
        {},
        spread,
    )
    (row,) = ChainEval(samples=2000, student_steps=(128,)).rows(trained)
    assert low < row["state_energy"] < high and "energy" in row


@pytest.fixture(scope="module")
def table():
    """Scores of points as a function of the points and labels held against the data's."""
    data = Mixture(seed=0)
    real = data.draw(np.random.default_rng(0), 3000)
    other = data.draw(np.random.default_rng(1), 3000)
    return data, real, lambda x: LabelledPointEval().score(x, real, data), other


def centred(data, cond, width):
    """Points of each label's components, `width` times as wide."""
    _, means, stds = data.components
    return means[cond] + width * stds[cond, None] * np.random.default_rng(
        2
    ).standard_normal((len(cond), 2))


def test_the_law_itself_scores_nothing(table):
    data, real, score, _ = table
    row = score(centred(data, real["cond"], 1.0))
    assert row["class_std"] == pytest.approx(1, abs=0.05)
    assert abs(row["class_energy"]) < 0.01


def test_collapse_and_swapped_labels_show(table):
    data, real, score, other = table
    narrow = score(centred(data, real["cond"], 0.05))
    assert (
        narrow["class_std"] == pytest.approx(0.05, rel=0.1)
        and narrow["class_energy"] > 0.02
    )
    # the right distribution overall, under labels of its own
    swapped = score(other["x"])
    assert abs(swapped["energy"]) < 0.01 < 0.3 < swapped["class_energy"]


def test_regret_is_the_lost_reward_and_counts_on_modes_alone():
    """(1 - cosine) / 2 of samples at modes, 1 of the others, whatever their direction."""
    real = DATA.evaluation(500)["x"]
    means = np.asarray(DATA.components[1])
    angle = 0.7
    evaluation = RegretEval(angle=angle)
    cosine = np.cos(np.arctan2(means[:, 1], means[:, 0]) - angle)
    score = lambda x: evaluation.score(x, {"x": real[: len(x)]}, DATA)
    at_modes = score(means)
    np.testing.assert_allclose(
        at_modes["regret"], np.mean((1 - cosine) / 2), rtol=1e-5
    )
    far = 50.0 * np.array([[np.cos(angle), np.sin(angle)]] * len(means), np.float32)
    away = score(far)
    assert away["regret"] == 1.0 and away["reward"] > 0.999
    half = score(np.concatenate([means, far]))["regret"]
    np.testing.assert_allclose(half, (at_modes["regret"] + 1.0) / 2, rtol=1e-5)
