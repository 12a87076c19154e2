"""What tests of attention share."""

import pytest

from jaxdistill.models import splash as kernel


@pytest.fixture
def interpreted(monkeypatch):
    """The kernel runs without a TPU."""
    monkeypatch.setattr(kernel, "INTERPRET", True)
