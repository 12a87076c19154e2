"""Sampling steps cut into phases: their ends, their intervals, and who serves a step."""

from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from jaxdistill.core.types import Refused
from jaxdistill.diffusion.process import Flow
from jaxdistill.samplers.phases import (
    cut,
    routed,
    sources,
    teacher_roles,
    without_fakes,
)

TIMES = (1.0, 0.75, 0.5, 0.25)


def test_phases_share_the_steps_and_end_where_the_next_begins():
    first, second = cut(TIMES, (1, 3), (), 1.0, True)
    assert (first.first, first.last, first.end, first.times) == (
        0,
        1,
        0.75,
        (1.0, 0.75),
    )
    assert (second.first, second.last, second.end) == (1, 4, 0.0)
    assert second.times == (*TIMES, 0.0) and first.boundary == 0.875
    assert (first.expert, second.expert) == ("expert0", "student")


@pytest.mark.parametrize(("nested", "top"), [(True, 1.0), (False, 0.5)])
def test_intervals_reach_to_the_top_or_to_the_first_step(nested, top):
    _, phase = cut(TIMES, (2, 2), (), 1.0, nested)
    (interval,) = phase.intervals
    assert (interval.low, interval.high) == (0.0, top)


def test_a_range_for_each_expert_of_the_teacher():
    assert teacher_roles((0.6, 0.3)) == ("teacher0", "teacher1", "teacher")
    _, phase = cut(TIMES, (2, 2), (0.6, 0.3), 1.0, True)
    assert (
        phase.fakes == ("fake1_0", "fake1_1", "fake1_2")
        and phase.teacher == "teacher"
    )
    assert [(n.low, n.high) for n in phase.intervals] == [
        (0.6, 1.0),
        (0.3, 0.6),
        (0.0, 0.3),
    ]


def test_experts_and_fake_scores_start_from_the_teacher_of_their_noise():
    phases = cut(TIMES, (2, 2), (0.5,), 1.0, True)
    assert sources(phases) == {
        "expert0": "teacher0",
        "fake0": "teacher0",
        "student": "teacher",
        "fake1_0": "teacher0",
        "fake1_1": "teacher",
    }
    params = {role: {} for role in ("expert0", "fake0", "fake1_0")}
    assert set(without_fakes(params, phases[:1])) == {"expert0", "fake1_0"}


def test_each_step_goes_to_its_expert():
    says = lambda value: (
        lambda x, t, cond=None: Flow().from_x0(jnp.full_like(x, value), x, t)
    )
    net = SimpleNamespace(teacher=says(0.0), expert0=says(1.0))
    denoise = routed(net, cut(TIMES, (2, 2), (), 1.0, True))
    x = jnp.zeros((2, 1))
    assert [float(denoise(x, jnp.full(2, t)).x0[0, 0]) for t in TIMES] == [
        1.0,
        1.0,
        0.0,
        0.0,
    ]


@pytest.mark.parametrize(
    ("sizes", "bounds", "message"),
    [
        ((2, 3), (), "sum is 4"),
        ((4, 0), (), "positive"),
        ((4,), (0.3, 0.6), "falling times"),
    ],
)
def test_what_does_not_fit_is_refused(sizes, bounds, message):
    with pytest.raises(Refused, match=message):
        cut(TIMES, sizes, bounds, 1.0, True)
