"""The classifier knows its data: what it was not trained on, it still reads."""

import numpy as np
import pytest

from jaxdistill.data.digits import Digits
from jaxdistill.data.idx import IDX
from jaxdistill.evals import classifier


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXDISTILL_CACHE", str(tmp_path))
    classifier.trained_on.cache_clear()
    yield
    classifier.trained_on.cache_clear()


SAMPLES = 8000  # digits for training


def accuracy(data, samples) -> float:
    held_out = data.evaluation(1000)
    predicted = classifier.trained_on(data, samples).predict(held_out["x"])
    return float(np.mean(predicted == held_out["cond"]))


def test_reads_digits(tmp_path):
    data = Digits()
    assert accuracy(data, SAMPLES) > 0.95  # a linear model reaches it
    before = classifier.trained_on(data, SAMPLES).weights[0]
    classifier.trained_on.cache_clear()
    assert len(list(tmp_path.glob("classifier_*.npz"))) == 1
    assert np.array_equal(classifier.trained_on(data, SAMPLES).weights[0], before)


@pytest.mark.full
def test_reads_mnist(shared_data):
    data = IDX(path=str(shared_data / "mnist"))
    assert accuracy(data, 20_000) > 0.92  # what a linear model reaches
