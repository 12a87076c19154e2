import builtins

import pytest

from jaxdistill.core.types import Refused
from tools import bench


def test_chunked_divergence_takes_a_quarter_of_the_memory_and_gives_the_same():
    """At a vocabulary of 152 k; what it takes is what the compiler says of the programs, not a measurement of time."""
    row = bench.divergences(dim=16, tokens=64)
    assert row["vocab"] == 152_064 and row["memory_ratio"] <= 1 / 4, row
    assert row["value_apart"] <= 1e-5 and row["gradient_apart"] <= 1e-5, row


def test_without_trl_it_says_so(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "trl":
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(Refused, match="--trl: needs torch, transformers and trl"):
        bench.bench(["--trl"])


def test_unknown_case():
    with pytest.raises(Refused, match="did you mean 'divergence'"):
        bench.bench(["--case=divergense"])
