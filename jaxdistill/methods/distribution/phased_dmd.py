"""Phased DMD - Few-step Distribution Matching Distillation via Score Matching within Subintervals
(arXiv:2510.27684).

The sampling trajectory is cut at times 1 = t_0 > t_1 > ... > t_K = 0. Phase k is the consecutive
sampling steps from t_{k-1} to s = t_k; its expert, a network of its own, makes these steps.
Together the experts are the generator (the student).

An expert is trained by distribution matching of its samples x_s at s. Plain few-step DMD instead
matches the x0 that a random step predicts. If that is the first step, it trains a one-step
generator, which loses diversity. To be matched, x_s is renoised to times t between
s and 1 (reverse nested intervals: all reach up to 1). A phase that ends at s > 0 yields no
x_0, so the fake score's target is computed from x_s and the noise added to it, which is unbiased
for every t > s. Of several steps in a phase one is drawn at random: it goes straight to s, and has
the gradient.

A teacher may consist of experts for ranges of noise levels. The times above s are then split into
intervals, one per teacher expert that overlaps them, each with its own fake score. Teacher experts
for less noise than the phase's last step are left out.

Departures: update n of an expert takes the gradient of interval n modulo their number, as in the
released trainer; the paper draws one time from all of them. The released trainer's diversity and
real-data losses are left out.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxdistill.core.fields import Limit
from jaxdistill.core.types import (
    Array,
    Batch,
    Ctx,
    Nets,
    Out,
    Refused,
    Stage,
    Turn,
    lookup,
    stage_lengths,
)
from jaxdistill.diffusion.process import expand
from jaxdistill.diffusion.regression import interval_error
from jaxdistill.diffusion.times import Uniform
from jaxdistill.methods.distribution.diff_instruct import DiffInstruct
from jaxdistill.objectives import score
from jaxdistill.samplers.fewstep import simulate
from jaxdistill.samplers.phases import (
    Interval,
    Phase,
    cut,
    routed,
    sources,
    teacher_roles,
    without_fakes,
)
from jaxdistill.surgery.mix import mix


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhasedDMD(DiffInstruct):
    """The paper's training: one phase after the other, each of them a stage.

    All times are those before the process's shift, which is 5 (Wan) and 3 (Qwen-Image) in the
    paper and 7 in the released configs.
    """

    student_times: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    # Sampling steps of each phase; the paper also has (1, 1, 1, 1).
    phase_steps: tuple[int, ...] = (2, 2)
    # Relative lengths of the stages; empty: equal ones. The paper does not state them.
    shares: tuple[float, ...] = ()
    # Falling times between the teacher's experts; Wan 2.2's .875 is .5 before a shift of 7.
    teacher_bounds: tuple[float, ...] = ()
    # Times of the generator's loss: t in [lower + low, min(upper, high)] for an interval from lower
    # to upper, on a process of length 1 (released code).
    match_times: Uniform = Uniform(low=0.02, high=0.98)
    # the same for the fake scores' loss
    fake_times: Uniform = Uniform(low=0.02, high=0.98)
    # quantity in which the fake scores' error is measured: eps - x0
    fake_target: str = "flow"
    # The weight of that error is min(1, fake_clamp sigma_{t|s}^2); inf: weight 1, as in the
    # released code.
    fake_clamp: Limit = 10.0
    # updates of the fake scores after each update of the generator
    critic_steps: int = 5
    # Which gradient the generator gets. normalised: DMD's, divided by the teacher's error (released
    # code); kl: that of the KL divergence (the paper's weight w).
    weight: str = "normalised"
    # c in fake <- c fake + (1 - c) expert, after an update of the expert on the phase's last
    # interval and for its fake score alone (IDA, implicit distribution alignment). The released
    # code uses .97; the default 1 turns it off.
    coupling: float = 1.0
    # True: intervals reach from s up to 1. False: up to the time at which the phase starts, hence
    # disjoint between phases, which the paper finds worse.
    nested: bool = True
    # index of the trained phase, set by `stages`; -1: before that, all
    phase: int = -1

    ema = ()
    renoises = False

    def __post_init__(self):
        super().__post_init__()
        lookup({"normalised": 0, "kl": 1}, self.weight, "method.weight")
        count = len(self.phases)
        if self.shares and (len(self.shares) != count or min(self.shares) <= 0):
            expected = f"expected {count} positive numbers, one for each phase"
            raise Refused(f"method.shares={self.shares}: {expected}")

    @property
    def phases(self) -> tuple[Phase, ...]:
        """All phases, noisiest first."""
        return cut(
            self.student_times,
            self.phase_steps,
            self.teacher_bounds,
            self.process.t_max,
            self.nested,
        )

    @property
    def current(self) -> Phase:
        """The phase that is trained; only for a method with `phase` set, not -1."""
        return self.phases[self.phase]

    @property
    def by_phase(self):
        """The method of each phase, by itself."""
        return [dataclasses.replace(self, phase=k) for k in range(len(self.phases))]

    @property
    def inits(self):
        """Experts and fake scores start as the teacher expert that serves their noise level."""
        return sources(self.phases if self.phase < 0 else [self.current])

    @property
    def exports(self) -> tuple[str, ...]:
        return tuple(phase.expert for phase in self.phases)

    @property
    def frozen(self) -> tuple[str, ...]:
        """The teacher, and the experts of earlier phases."""
        return (
            teacher_roles(self.teacher_bounds) + self.exports[: max(self.phase, 0)]
        )

    def stages(self, steps: int) -> tuple[Stage, ...]:
        """A stage for each phase, whose fake scores start anew from the teacher."""
        lengths = stage_lengths(steps, self.shares or (1.0,) * len(self.phases))
        stages = []
        for method, length in zip(self.by_phase, lengths):
            surgery = method.drop_earlier_fakes if method.phase else None
            stages.append(Stage(method, length, surgery))
        return tuple(stages)

    def drop_earlier_fakes(self, nets, params, batch):
        """Surgery: without the fake scores of earlier phases."""
        return nets, without_fakes(params, self.phases[: self.phase])

    @property
    def turns(self) -> tuple[Turn, ...]:
        """One turn of the expert per interval, then one turn of all fake scores.

        At most one of the expert's turns is taken at a step.
        """
        if self.phase < 0:
            return tuple(turn for method in self.by_phase for turn in method.turns)
        phase = self.current
        turns = []
        for interval in phase.intervals:
            # Only the last interval's fake score is coupled: it starts, like the expert, from the
            # teacher that serves the noise of the phase's last step.
            is_coupled = self.coupling < 1 and interval == phase.intervals[-1]
            expert = Turn(
                (phase.expert,),
                functools.partial(self.student_loss, interval=interval),
                when=functools.partial(self.expert_moves, interval),
                gather=self.truncated_rollout,
                after=self.couple if is_coupled else None,
            )
            turns.append(expert)
        is_trained = lambda step: self.scheduled(step)[0] == self.phase
        loss = self.critic_loss
        fakes = Turn(phase.fakes, loss, is_trained, self.complete_rollout)
        return (*turns, fakes)

    def scheduled(self, step: int) -> tuple[int, int]:
        """(index of the phase in training, number of its expert's update counted from 0)."""
        return self.phase, step // self.critic_steps

    def expert_moves(self, interval: Interval, step: int) -> bool:
        """True at every `critic_steps`-th step of the phase, for the interval whose turn it is."""
        phase, update = self.scheduled(step)
        intervals = self.current.intervals
        is_in_turn = (
            phase == self.phase and intervals[update % len(intervals)] == interval
        )
        return is_in_turn and step % self.critic_steps == 0

    def couple(self, weights, step):
        """fake <- c fake + (1 - c) expert, c = coupling (IDA)."""
        return mix(
            weights, self.current.fakes[-1], self.current.expert, self.coupling
        )

    def generator(self, net: Nets, null=None):
        return routed(net, self.phases)

    def rollout(self, net: Nets, ctx: Ctx, index) -> tuple[Array, Array]:
        """(x_t, t) at sampling step `index` of the experts' Euler roll-out.

        It starts from pure noise at the first step of all and passes through earlier experts.
        Index `last` of the phase gives x_s, the samples at its end.
        """
        noise = jax.random.normal(ctx.key("noise"), ctx.batch["x"].shape)
        experts = routed(net, self.phases[: self.phase + 1])
        denoise = functools.partial(experts, cond=ctx.batch.get("cond"))
        times = jnp.array(self.current.times)
        return simulate(
            self.process, denoise, noise, times, ctx.key("chain"), index, "ddim"
        )

    def truncated_rollout(self, net: Nets, ctx: Ctx) -> Batch:
        """The expert's input: x_t at a random step of the phase, the same for all samples."""
        index = jax.random.randint(
            ctx.key("index"), (), self.current.first, self.current.last
        )
        xt, t = self.rollout(net, ctx, index)
        return {**ctx.batch, "xt": xt, "t": t}

    def complete_rollout(self, net: Nets, ctx: Ctx) -> Batch:
        """The fake scores' data: x_s after all steps of the phase."""
        xs, _ = self.rollout(net, ctx, self.current.last)
        return {**ctx.batch, "xs": xs}

    def renoise(
        self, xs: Array, interval: Interval, times: Uniform, ctx: Ctx, name: str
    ):
        """(x_t, t, eps): samples at s renoised, each to a time of its own in the interval."""
        inside = times.within(self.process, interval.low, interval.high)
        t, eps = self.draw_noise(xs, inside, ctx, name)
        return (
            self.process.transition(xs, eps, jnp.asarray(self.current.end), t),
            t,
            eps,
        )

    def student_loss(self, net: Nets, ctx: Ctx, interval: Interval) -> Out:
        """Distribution matching at the phase's end s, by the scores of one interval."""
        expert = getattr(net, self.current.expert)
        pred = expert(ctx.batch["xt"], ctx.batch["t"], ctx.batch.get("cond"))
        s = jnp.asarray(self.current.end)
        # Euler's step from t to s
        xs = self.process.add_noise(pred.x0, pred.eps, s)
        xt, t, _ = self.renoise(xs, interval, self.match_times, ctx, "match")
        # its two scores as the roles `teacher` and `fake`
        scores = interval.scores(net)
        real = self.real(scores, xt, t, ctx)
        fake = self.fake(scores, xt, t, ctx)
        if self.weight == "kl":
            t = expand(t, xt)
            alpha, sigma = self.process.alpha_sigma(t)
            alpha_ts, _ = self.process.kernel(s, t)
            # The gradient of the divergence at time t with respect to the samples x_s.
            gradient = score.kl_gradient(real.x0, fake.x0, alpha, sigma, alpha_ts)
            loss = score.gradient_surrogate(xs, gradient)
        else:
            # DMD's gradient compares clean samples, so it is the gradient with respect to pred.x0,
            # as in the released code, from which the normaliser's floor 1e-4 is, too.
            gradient = score.dmd_gradient(pred.x0, real.x0, fake.x0, floor=1e-4)
            loss = score.gradient_surrogate(pred.x0, gradient)
        return Out(loss, {"match": loss})

    def critic_loss(self, net: Nets, ctx: Ctx) -> Out:
        """Score matching within subintervals, summed over the intervals."""
        xs = ctx.batch["xs"]
        s = jnp.asarray(self.current.end)
        loss = 0.0
        for j, interval in enumerate(self.current.intervals):
            name = f"fake{j}" if j else "fake"
            xt, t, eps = self.renoise(xs, interval, self.fake_times, ctx, name)
            # fake_cond: batch["cond"], replaced by the null condition on a share `fake_dropout`.
            pred = getattr(net, interval.fake)(xt, t, self.fake_cond(ctx))
            error = interval_error(
                self.process, pred, xs, eps, s, t, self.fake_target, self.fake_clamp
            )
            loss += jnp.mean(error)
        return Out(loss, {"denoise": loss})


@dataclasses.dataclass(frozen=True, kw_only=True)
class InterleavedPhasedDMD(PhasedDMD):
    """The released trainer: all experts and fake scores side by side, in a single stage.

    Phases alternate, each for one update of its expert and `critic_steps` of its fake scores.
    """

    def stages(self, steps):
        return (Stage(self, steps),)

    def scheduled(self, step):
        update, phase = divmod(step // self.critic_steps, len(self.phases))
        return phase, update
