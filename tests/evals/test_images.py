"""Evaluation of pictures: what is refused before anything is trained."""

import pytest

from jaxdistill.core.types import Refused
from jaxdistill.data.digits import Digits
from jaxdistill.evals.images import ImageEval


def test_too_few_samples_are_refused_before_training():
    """Precision and recall need three neighbours."""
    with pytest.raises(
        Refused,
        match=r"evaluation: ImageEval compares at least 4 samples, .* evaluation\.samples=3",
    ):
        ImageEval(samples=3).check(Digits())
