"""Distances to the ends of the teacher's paths."""

import dataclasses
import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jaxdistill.core.types import Refused
from jaxdistill.data.mixtures import Mixture
from jaxdistill.diffusion.process import Flow
from jaxdistill.evals.endpoints import EndPointEval
from jaxdistill.methods.trajectory.flow_matching import FlowMatching

DATA = Mixture(labelled=False)
FINE = 8


@dataclasses.dataclass
class Trained:
    experiment: Any
    nets: Any
    params: Any

    def bound(self):
        exact = functools.partial(DATA.denoise, Flow())
        call = lambda x, t, cond=None: exact(x, t)
        return SimpleNamespace(teacher=call, student=call)


def run_in(folder: Path) -> Trained:
    experiment = SimpleNamespace(
        method=FlowMatching(),
        data=DATA,
        conditioned=lambda batch: batch,
        workdir=folder,
    )
    return Trained(experiment, {}, {"teacher": {}, "student": {}})


def evaluation(**changes):
    common = dict(samples=60, batch=40, solver="euler", fine_steps=FINE)
    return EndPointEval(**common | changes)


def test_the_teacher_in_fine_steps_is_at_its_ends_and_others_are_not(tmp_path):
    rows = evaluation(teacher_steps=(FINE, 1), student_steps=(1,)).rows(
        run_in(tmp_path)
    )
    fine, coarse, student = (row["endpoint"] for row in rows)
    assert fine == 0.0
    assert student == coarse > 0.01  # one Euler step each, from the same noise
    assert "energy" in rows[0]


def test_the_distance_is_the_mean_over_samples_and_numbers(tmp_path):
    own = evaluation(teacher_steps=(1,), student_steps=())
    trained = run_in(tmp_path)
    (row,) = own.rows(trained)
    real = DATA.evaluation(60)
    x, _ = own.generate(trained, "teacher", 1, real)
    ends, _ = own.generate(trained, "teacher", FINE, real)
    np.testing.assert_allclose(row["endpoint"], np.mean((x - ends) ** 2), rtol=1e-5)


def test_stored_ends_are_used_again(tmp_path, monkeypatch):
    own = evaluation(teacher_steps=(1,), student_steps=())
    trained = run_in(tmp_path)
    (first,) = own.rows(trained)
    (file,) = (tmp_path / "endpoints").iterdir()
    np.savez(file, ends=np.zeros((60, 2), np.float32))
    (again,) = own.rows(trained)
    assert again["endpoint"] != first["endpoint"]
    evaluation(seed=1, teacher_steps=(1,), student_steps=()).rows(trained)
    assert len(list((tmp_path / "endpoints").iterdir())) == 2
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(Refused, match="is damaged; remove it"):
        own.rows(trained)
    np.savez(file, ends=np.zeros((3, 2), np.float32))
    with pytest.raises(Refused, match=r"\[3, 2\], expected \[60, 2\]"):
        own.rows(trained)


def test_a_run_without_a_teacher_is_refused():
    with pytest.raises(Refused, match="no role 'teacher'"):
        evaluation().table(["student"], DATA)
    assert (
        "endpoint" in evaluation().table(["teacher", "student"], DATA)["student@1"]
    )
