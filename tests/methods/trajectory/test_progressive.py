"""Progressive distillation: one DDIM step of the target is two of the teacher, in any process
(00-foundations, section 7).
"""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core.types import Refused
from jaxdistill.diffusion.process import EDM, VP, CosineVP, Flow, Trig, expand
from jaxdistill.methods.trajectory.progressive import Progressive, promote
from jaxdistill.samplers import ode

PROCESSES = {
    "flow": Flow(),
    "shifted": Flow(shift=3.0),
    "trig": Trig(),
    "vp": VP(),
    "cosine": CosineVP(),
}
every = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())


def halver(g, process, steps):
    """A network that answers with the target itself: the x0 from which DDIM goes where the
    teacher's two steps go.
    """
    size = (process.t_max - process.t_min) / steps

    def denoise(x, t, cond=None):
        middle = ode.advance("ddim", process, g.denoise, x, t, t - size / 2)
        end = ode.advance(
            "ddim", process, g.denoise, middle, t - size / 2, t - size
        )
        (a, s), (b, u) = (
            process.alpha_sigma(expand(t, x)),
            process.alpha_sigma(expand(t - size, x)),
        )
        return process.from_x0((end - u / s * x) / (b - u / s * a), x, t)

    return denoise


@every
def test_the_target_makes_two_steps_in_one(x64, gaussian, context, process):
    """A student equal to the target has no loss, and its N DDIM steps end where the teacher's 2 N
    do.
    """
    g = gaussian(process)
    n = 4
    student = halver(g, process, n)
    method = Progressive(process=process, teacher_steps=2 * n, student_steps=n)
    out = method.loss(
        SimpleNamespace(student=student, teacher=g.denoise), context(g.draw(64))
    )
    assert out.loss < 1e-22
    noise = jax.random.normal(jax.random.key(0), (8, 2))
    few = method.sample(student, noise, None, jax.random.key(1), n)
    many = ode.solve("ddim", process, g.denoise, process.start(noise), 2 * n)
    np.testing.assert_allclose(few, many, atol=1e-11)
    assert (
        abs(
            ode.solve("ddim", process, g.denoise, process.start(noise), n) - many
        ).max()
        > 1e-4
    )


@pytest.mark.parametrize("process", [Flow(), EDM()], ids=lambda p: type(p).__name__)
def test_students_are_trained_at_the_times_that_they_sample_at(
    x64, gaussian, context, process
):
    """Every stage asks its student where its own sampler does, and its teacher where that one's
    does; the first teacher is the process's sampler of so many steps.
    """
    g = gaussian(process)
    first = Progressive(process=process, teacher_steps=8)
    before = process.grid(8)
    for stage in first.stages(3):
        method = stage.method
        n = stage.method.student_steps
        seen = {"student": set(), "teacher": set()}

        def asked(role):
            return lambda x, t, cond=None: (
                seen[role].update(np.asarray(t).tolist()),
                g.denoise(x, t),
            )[1]

        method.loss(
            SimpleNamespace(student=asked("student"), teacher=asked("teacher")),
            context(g.draw(64)),
        )
        np.testing.assert_allclose(
            sorted(seen["teacher"], reverse=True), before[:-1], rtol=1e-12
        )
        before = method.grid(n)
        np.testing.assert_allclose(
            sorted(seen["student"], reverse=True), before[:-1], rtol=1e-12
        )
        # the whole method's sampler
        np.testing.assert_array_equal(before, first.grid(n))


def test_on_edms_levels_two_steps_are_made_in_one(x64, gaussian, context):
    """As above on a grid that is not even: a student equal to the target has no loss, and ends
    where the teacher's sampler does.
    """
    g = gaussian(EDM())
    n = 4
    process = EDM()
    method = Progressive(process=process, teacher_steps=2 * n, student_steps=n)
    times = EDM().grid(2 * n)

    def student(x, t, cond=None):
        at = jnp.argmin(jnp.abs(times[:, None] - t), axis=0)
        middle = ode.advance("ddim", process, g.denoise, x, t, times[at + 1])
        end = ode.advance(
            "ddim", process, g.denoise, middle, times[at + 1], times[at + 2]
        )
        ratio = expand(times[at + 2] / t, x)
        return process.from_x0((end - ratio * x) / (1 - ratio), x, t)

    assert (
        method.loss(
            SimpleNamespace(student=student, teacher=g.denoise), context(g.draw(64))
        ).loss
        < 1e-18
    )
    noise = jax.random.normal(jax.random.key(0), (8, 2))
    many = ode.solve("ddim", process, g.denoise, process.start(noise), 2 * n)
    np.testing.assert_allclose(
        method.sample(student, noise, None, jax.random.key(1), n), many, atol=1e-11
    )


def test_steps_that_are_no_part_of_the_grid_are_refused():
    with pytest.raises(
        Refused, match="steps=3: expected a divisor of the first teacher's 8"
    ):
        Progressive(teacher_steps=8).sampling_times(3)


def test_in_flow_the_target_is_the_mean_velocity(x64, gaussian):
    """u = (x_t - x_s) / (t - s), with x0 = x_t - t u."""
    g = gaussian()
    n = 4
    x = g.draw(8)
    t = jnp.full(8, 0.75)
    pred = halver(g, Flow(), n)(x, t)
    end = ode.advance(
        "ddim",
        Flow(),
        g.denoise,
        ode.advance("ddim", Flow(), g.denoise, x, t, t - 0.125),
        t - 0.125,
        t - 0.25,
    )
    np.testing.assert_allclose(pred.v, (x - end) / 0.25, atol=1e-13)
    np.testing.assert_allclose(pred.x0, x - 0.75 * (x - end) / 0.25, atol=1e-13)


@pytest.mark.parametrize("weight", ["truncated_snr", "snr_plus_one"])
def test_weight_and_grid(x64, gaussian, context, weight):
    """A student off by d in x0 pays mean(w(t)) d^2, t on the student's grid; at t = 1 the weight is
    1.
    """
    g = gaussian()
    n = 4
    d = 0.1
    right = halver(g, Flow(), n)

    def wrong(x, t, cond=None):
        return dataclasses.replace(right(x, t), x0=right(x, t).x0 + d)

    method = Progressive(teacher_steps=2 * n, student_steps=n, weight=weight)
    ctx = context(g.draw(64))
    index = jax.random.randint(ctx.key("t"), (64,), 1, n + 1)
    assert set(index.tolist()) == {1, 2, 3, 4}
    snr = ((1 - index / n) / (index / n)) ** 2
    want = (
        jnp.mean(jnp.maximum(snr, 1.0) if weight == "truncated_snr" else snr + 1)
        * d**2
    )
    np.testing.assert_allclose(
        method.loss(SimpleNamespace(student=wrong, teacher=g.denoise), ctx).loss,
        want,
        rtol=1e-9,
    )


def test_no_gradient_reaches_the_target(x64, gaussian, context):
    """The gradient is 2 w (x0 - target) dx0 / dim, though the teacher has the same weight."""
    g = gaussian()
    ctx = context(gaussian().draw(16))
    scaled = lambda w: (
        lambda x, t, cond=None: dataclasses.replace(
            g.denoise(x, t), x0=w * g.denoise(x, t).x0
        )
    )
    both = lambda w: (
        Progressive(teacher_steps=2)
        .loss(SimpleNamespace(student=scaled(w), teacher=scaled(w)), ctx)
        .loss
    )
    one = lambda w: (
        Progressive(teacher_steps=2)
        .loss(SimpleNamespace(student=scaled(w), teacher=scaled(1.3)), ctx)
        .loss
    )
    np.testing.assert_allclose(jax.grad(both)(1.3), jax.grad(one)(1.3), rtol=1e-13)
    assert jax.grad(one)(1.3) != 0


def test_stages():
    stages = Progressive(teacher_steps=16, student_steps=2, guidance=3.0).stages(
        100
    )
    assert [s.steps for s in stages] == [34, 33, 33]
    assert [(s.method.teacher_steps, s.method.student_steps) for s in stages] == [
        (16, 8),
        (8, 4),
        (4, 2),
    ]
    assert [s.method.guidance for s in stages] == [3.0, 1.0, 1.0]
    assert [s.surgery for s in stages] == [None, promote, promote]


def test_promotion():
    nets = {"student": SimpleNamespace(adapts=""), "teacher": "old"}
    after, params = promote(nets, {"student": 1, "teacher": 2, "other": 3}, None)
    assert after == {"student": nets["student"], "teacher": nets["student"]}
    assert params == {"student": 1, "teacher": 1, "other": 3}
    with pytest.raises(Refused, match=r"roles\.student\.lora"):
        promote({"student": SimpleNamespace(adapts="teacher")}, {}, None)


@pytest.mark.parametrize(
    "teacher, student", [(12, 8), (8, 8), (24, 4), (4, 8), (8, 0)]
)
def test_other_numbers_of_steps_are_refused(teacher, student):
    with pytest.raises(Refused, match=f"teacher_steps={teacher}"):
        Progressive(teacher_steps=teacher, student_steps=student)


def test_unknown_weight_is_refused(gaussian, context):
    net = SimpleNamespace(student=gaussian().denoise, teacher=gaussian().denoise)
    with pytest.raises(Refused, match="did you mean 'truncated_snr'"):
        Progressive(weight="truncated").loss(net, context(jnp.zeros((4, 2))))


def test_three_steps(three_steps):
    three_steps(Progressive())
