"""Phased DMD - Few-step Distribution Matching Distillation via Score Matching within Subintervals
(arXiv:2510.27684).

The trajectory is cut at noise levels 1 > s_1 > ... > s_K = 0, and an expert of its own carries
samples to each: expert k is trained by distribution matching at s_k, not at x0, so that no phase
collapses to a one-step generator. Times of matching reach from s_k to 1 (reverse nested intervals);
the fake score there learns from samples at s_k alone, through targets that are unbiased above it.
In a phase of several steps a random one gets the gradient, from a deterministic roll-out.

Departures: the noise ranges of a teacher of several experts take turns at the generator's gradient,
as in the released trainer, where the paper draws one time from all; that trainer's diversity and
real-data losses are left out.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxdistill.core.fields import Limit
from jaxdistill.core.types import Array, Batch, Ctx, Nets, Out, Stage, Turn, lookup
from jaxdistill.diffusion.process import expand
from jaxdistill.diffusion.regression import interval_error
from jaxdistill.diffusion.times import Uniform
from jaxdistill.methods.distribution._phases import Part, Phases, couple
from jaxdistill.methods.distribution.diff_instruct import DiffInstruct
from jaxdistill.objectives import score
from jaxdistill.samplers.fewstep import simulate


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhasedDMD(DiffInstruct):
    # all times are those before the process's shift: 5 (Wan) and 3 (Qwen-Image) in the paper, 7 in
    # the released configs
    student_times: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    phase_steps: tuple[int, ...] = (
        2,
        2,
    )  # how many of student_times each phase owns; also the paper's: (1, 1, 1, 1)
    shares: tuple[
        float, ...
    ] = ()  # of the run's steps, by phase; empty: equal (the paper does not state them)
    teacher_bounds: tuple[
        float, ...
    ] = ()  # falling times between the teacher's experts; Wan 2.2's .875 is .5 before a shift of 7
    match_times: Uniform = Uniform(
        low=0.02, high=0.98
    )  # within a phase's times; low: kept above the lower end (released code)
    fake_times: Uniform = Uniform(low=0.02, high=0.98)
    fake_target: str = "flow"  # what the fake score's error is measured in: eps - x0
    # that error's weight is min(1, clamp sigma_{t|s}^2); inf: plain mean square (released code)
    fake_clamp: Limit = 10.0
    critic_steps: int = 5  # updates of the fake scores after each of the generator
    # normalised: DMD's (released code) | kl: the gradient of the KL at s_k (the paper's w)
    weight: str = "normalised"
    # d of fake <- d fake + (1 - d) expert after the expert's update (IDA); released code .97, 1:
    # none
    coupling: float = 1.0
    # matching reaches from s_k to 1; False: to where the phase begins (disjoint intervals, the
    # paper's worse ones)
    nested: bool = True
    phase: int = -1  # in training; `stages` sets it. -1: all

    ema = ()

    plan = property(
        lambda self: Phases(
            self.student_times,
            self.phase_steps,
            self.teacher_bounds,
            self.process.t_max,
            self.nested,
        )
    )
    inits = property(lambda self: self.plan.roles(self.phase))
    frozen = property(lambda self: self.plan.teachers + self.plan.experts[: max(self.phase, 0)])
    renoises = False
    exports = property(lambda self: self.plan.experts)
    generator = lambda self, net: self.plan.generator(net)
    turns = property(
        lambda self: tuple(
            turn for k in self.plan.trained(self.phase) for turn in self.phase_turns(k)
        )
    )

    def __post_init__(self):
        super().__post_init__()
        lookup(dict.fromkeys(("normalised", "kl")), self.weight, "method.weight")
        self.plan.lengths(len(self.phase_steps), self.shares)

    def stages(self, steps: int) -> tuple[Stage, ...]:
        """A stage for each phase, its fake scores fresh from the teacher; earlier experts stay as
        they are, earlier fakes go.
        """
        method = lambda k: dataclasses.replace(self, phase=k)
        lengths = self.plan.lengths(steps, self.shares)
        return tuple(
            Stage(method(k), n, surgery=functools.partial(self.plan.retire, k) if k else None)
            for k, n in enumerate(lengths)
        )

    def now(self, step: int) -> tuple[int, int]:
        """(phase in training, number of its generator update)."""
        return self.phase, step // self.critic_steps

    def phase_turns(self, k: int) -> list[Turn]:
        """The expert, by one of the noise ranges in turn; then all fake scores of the phase."""
        parts = self.plan.parts(k)
        use = functools.partial
        expert = self.plan.experts[k]
        mine = lambda step, j: (
            step % self.critic_steps == 0
            and self.now(step)[0] == k
            and self.now(step)[1] % len(parts) == j
        )
        after = lambda part: (
            use(couple, self.coupling, expert, part.fake)
            if self.coupling < 1 and part == parts[-1]
            else None
        )
        generator = [
            Turn(
                (expert,),
                use(self.student_loss, k=k, part=part),
                use(mine, j=j),
                use(self.truncated, k=k),
                after(part),
            )
            for j, part in enumerate(parts)
        ]
        fakes = tuple(part.fake for part in parts)
        return [
            *generator,
            Turn(
                fakes,
                use(self.critic_loss, k=k),
                lambda step: self.now(step)[0] == k,
                use(self.complete, k=k),
            ),
        ]

    def chain(self, net: Nets, ctx: Ctx, k: int, index: Array | int) -> tuple[Array, Array]:
        """Euler roll-out of the experts to step `index`; the last time is the end of phase k."""
        _, last, s = self.plan.span(k)
        noise = jax.random.normal(ctx.key("noise"), ctx.batch["x"].shape)
        denoise = functools.partial(self.plan.generator(net, k + 1), cond=ctx.batch.get("cond"))
        return simulate(
            self.process,
            denoise,
            noise,
            jnp.array((*self.student_times[:last], s)),
            ctx.key("chain"),
            index,
            "ddim",
        )

    def truncated(self, net: Nets, ctx: Ctx, k: int) -> Batch:
        """The generator's input, at a step of the phase that the whole batch shares."""
        xt, t = self.chain(
            net, ctx, k, jax.random.randint(ctx.key("index"), (), *self.plan.span(k)[:2])
        )
        return {**ctx.batch, "xt": xt, "t": t}

    def complete(self, net: Nets, ctx: Ctx, k: int) -> Batch:
        """The fake scores' data: x_s after all steps of experts 1..k."""
        return {**ctx.batch, "xs": self.chain(net, ctx, k, self.plan.span(k)[1])[0]}

    def lift(
        self, xs: Array, s: Array, part: Part, times: Uniform, ctx: Ctx, name: str
    ) -> tuple[Array, Array, Array]:
        """(x_t, t, eps) re-noised from x_s, to a time of each sample's own in a range above s."""
        t = times.within(self.process, part.low, part.high).draw(
            self.process, ctx.key(name + "_t"), xs.shape[0]
        )
        eps = jax.random.normal(ctx.key(name + "_eps"), xs.shape)
        return self.process.transition(xs, eps, s, t), t, eps

    def student_loss(self, net: Nets, ctx: Ctx, k: int, part: Part) -> Out:
        mine = Nets(teacher=getattr(net, part.teacher), fake=getattr(net, part.fake))
        pred = getattr(net, self.plan.experts[k])(
            ctx.batch["xt"], ctx.batch["t"], ctx.batch.get("cond")
        )  # the only call with a gradient
        s = jnp.asarray(self.plan.span(k)[2])
        xs = self.process.add_noise(pred.x0, pred.eps, s)  # Euler's jump
        xt, t, _ = self.lift(xs, s, part, self.match_times, ctx, "match")
        real = self.real(mine, xt, t, ctx)
        fake = self.fake(mine, xt, t, ctx)
        if self.weight == "kl":
            (a, sigma), (ratio, _) = (
                self.process.alpha_sigma(expand(t, xt)),
                self.process.kernel(s, expand(t, xt)),
            )
            loss = score.gradient_surrogate(
                xs, score.kl_gradient(real.x0, fake.x0, a, sigma, ratio)
            )
        else:
            loss = score.gradient_surrogate(
                pred.x0, score.dmd_gradient(pred.x0, real.x0, fake.x0, floor=1e-4)
            )
        return Out(loss, {"match": loss})

    def critic_loss(self, net: Nets, ctx: Ctx, k: int) -> Out:
        """Score matching within subintervals, for each range."""
        loss = 0.0
        s = jnp.asarray(self.plan.span(k)[2])
        for j, part in enumerate(self.plan.parts(k)):
            xt, t, eps = self.lift(ctx.batch["xs"], s, part, self.fake_times, ctx, f"fake{j or ''}")
            pred = getattr(net, part.fake)(xt, t, self.fake_cond(ctx))
            loss += jnp.mean(
                interval_error(
                    self.process,
                    pred,
                    ctx.batch["xs"],
                    eps,
                    s,
                    t,
                    self.fake_target,
                    self.fake_clamp,
                )
            )
        return Out(loss, {"denoise": loss})

    def sample(self, net, noise, cond, key, steps):
        denoise = functools.partial(net, cond=cond)
        times = self.sampling_times(steps)
        xt, t = simulate(self.process, denoise, noise, times, key, steps - 1, "ddim")
        return denoise(xt, t).x0


@dataclasses.dataclass(frozen=True, kw_only=True)
class InterleavedPhasedDMD(PhasedDMD):
    """The released trainer: phases take turns, a generator update each, and all experts and fake
    scores live side by side.
    """

    def stages(self, steps):
        return (Stage(self, steps),)

    def now(self, step):
        return divmod(step // self.critic_steps, len(self.phase_steps))[::-1]
