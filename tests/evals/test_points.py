"""Evaluation of points: the state in the middle of a chain."""

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jaxdistill.data.mixtures import Mixture
from jaxdistill.diffusion.process import Flow
from jaxdistill.evals.points import ChainEval
from jaxdistill.methods.distribution.phased_dmd import PhasedDMD


@dataclasses.dataclass
class Trained:
    experiment: Any
    params: Any
    spread: float

    def bound(self):
        exact = functools.partial(DATA.denoise, Flow())
        call = lambda x, t, cond=None: exact(self.spread * x, t)
        return SimpleNamespace(expert0=call, student=call)


DATA = Mixture(labelled=False)


@pytest.mark.parametrize(("spread", "low", "high"), [(1.0, -2e-3, 4e-3), (1.5, 1e-2, np.inf)])
def test_the_state_of_an_exact_chain_has_the_noised_law(spread, low, high):
    """64 Euler steps with the exact velocity reach p_.5 to their error of first order; a wrong field does not."""
    times = tuple(np.linspace(1, 0, 129)[:-1].tolist())
    method = PhasedDMD(student_times=times, phase_steps=(64, 64))
    trained = Trained(SimpleNamespace(method=method, data=DATA), {}, spread)
    (row,) = ChainEval(samples=2000, student_steps=(128,)).rows(trained)
    assert low < row["state_energy"] < high and "energy" in row
