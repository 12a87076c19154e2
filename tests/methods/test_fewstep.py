"""Methods whose students have times of their own: the first one is that of the state that sampling
starts from.
"""

import dataclasses
import importlib
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core.types import Method, Refused
from jaxdistill.diffusion.process import EDM, VP, Flow, Trig
from jaxdistill.methods._fewstep import FewStep
from jaxdistill.methods.distribution.diff_instruct import DiffInstruct, FromLevel

ROOT = Path(__file__).parents[2]
FILES = [
    p
    for folder in ("trajectory", "distribution")
    for p in sorted((ROOT / "jaxdistill/methods" / folder).glob("*.py"))
]
MODULES = [
    importlib.import_module(".".join(p.relative_to(ROOT).with_suffix("").parts))
    for p in FILES
]
METHODS = {
    c.__name__: c
    for m in MODULES
    for c in vars(m).values()
    if isinstance(c, type) and issubclass(c, Method)
}
TIMED = [
    c
    for c in METHODS.values()
    if any(f.name == "student_times" for f in dataclasses.fields(c))
]
FROM_MAX = [
    c for c in TIMED if not issubclass(c, FromLevel) and c.__name__ != "FromLevel"
]
DEFAULT = [
    c
    for c in FROM_MAX
    if next(f for f in dataclasses.fields(c) if f.name == "student_times").default
    == ()
]


def test_all_with_times_share_the_check():
    assert {
        "Consistency",
        "CT",
        "ECT",
        "DiffInstruct",
        "DMD",
        "DMD2",
        "SwiftBrush",
        "DisBack",
    } <= {c.__name__ for c in DEFAULT}
    assert all(issubclass(c, FewStep) for c in TIMED)


@pytest.mark.parametrize(
    "process", [Flow(), VP(), Trig(), EDM()], ids=lambda p: type(p).__name__
)
@pytest.mark.parametrize("make", DEFAULT, ids=lambda c: c.__name__)
def test_without_times_a_student_starts_at_t_max(make, process):
    assert make(process=process).student_times == (process.t_max,)


@pytest.mark.parametrize("make", FROM_MAX, ids=lambda c: c.__name__)
def test_a_network_is_not_told_that_pure_noise_is_nearly_clean(make):
    """On EDM a state at t_max has size 80: t = 1 is none of its times, given or by default."""
    times = dict(student_times=(1.0,)) if make in DEFAULT else {}
    with pytest.raises(Refused, match=r"student_times=.*: EDM\(.* starts at t=80"):
        make(process=EDM(), **times)


@pytest.mark.parametrize(
    "times", [(2.5,), (0.5, 0.7), (0.0,), (1.0, -0.5)], ids=str
)
def test_times_fall_within_the_process(times):
    with pytest.raises(
        Refused, match=r"expected falling times, at most 1\.0 and above 0"
    ):
        DiffInstruct(student_times=times)


def test_the_network_is_told_the_time_of_the_state(context):
    """In training and in sampling: a state of standard deviation 80, at t = 80."""
    seen = []

    def student(x, t, cond=None):
        seen.append((x, t))
        return EDM().from_x0(x, x, t)

    method = DiffInstruct(process=EDM())
    noise = jax.random.normal(jax.random.key(0), (4096, 2))
    batch = method.simulate(
        SimpleNamespace(student=lambda x, t, cond=None: EDM().from_x0(x, x, t)),
        context(jnp.zeros((4096, 2))),
    )
    method.sample(student, noise, None, jax.random.key(1), 1)
    np.testing.assert_array_equal(batch["t"], 80.0)
    np.testing.assert_array_equal(seen[-1][1], 80.0)
    np.testing.assert_allclose(
        [batch["xt"].std(), seen[-1][0].std()], 80.0, rtol=5 / (2 * 8192) ** 0.5
    )
