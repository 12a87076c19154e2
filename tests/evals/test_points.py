"""Figures of points made under labels."""

import numpy as np
import pytest

from jaxdistill.data.mixtures import Mixture
from jaxdistill.evals.points import LabelledPointEval


@pytest.fixture(scope="module")
def table():
    """Scores of points as a function of the points and labels held against the data's."""
    data = Mixture(seed=0)
    real, other = data.draw(np.random.default_rng(0), 3000), data.draw(np.random.default_rng(1), 3000)
    return data, real, lambda x: LabelledPointEval().score(x, real, data), other


def centred(data, cond, width):
    """Points of each label's law, `width` times as wide."""
    _, means, stds = data.law
    return means[cond] + width * stds[cond, None] * np.random.default_rng(2).standard_normal((len(cond), 2))


def test_the_law_itself_scores_nothing(table):
    data, real, score, _ = table
    row = score(centred(data, real["cond"], 1.0))
    assert row["class_std"] == pytest.approx(1, abs=0.05)
    assert abs(row["class_energy"]) < 0.01


def test_collapse_and_swapped_labels_show(table):
    data, real, score, other = table
    narrow = score(centred(data, real["cond"], 0.05))
    assert narrow["class_std"] == pytest.approx(0.05, rel=0.1) and narrow["class_energy"] > 0.02
    swapped = score(other["x"])  # the right law as a whole, under labels of its own
    assert abs(swapped["energy"]) < 0.01 < 0.3 < swapped["class_energy"]
