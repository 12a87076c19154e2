"""Step time of a config against a hand-written step of the same networks and losses, in pairs, in
one process.

python tools/bench.py [--case=digits_dmd2 | meanflow | scm | dmd2 | gkd | kd | divergence | all] \\
    [--config=FILE] [--steps=30]
    [--rounds=7] [--trace=DIR] [--trl] [--alone]

A round runs `steps` steps of each side, in turn; printed are the median over rounds of the engine's
milliseconds a step, of the ratio engine / hand-written, and its range, with the time to compile
apart. `data` is the ratio with batches from the config's loader to the same step on one batch that
stays on the device: near 1 where the input pipeline is hidden. With --trace the engine's last round
is written for TensorBoard's profiler.

--alone times the engine by itself, every pattern of turns apart, and prints what it does with the
machine: model flops, the share of the chip's peak that they are (model-flops utilisation;
run/chips.py), and bytes at the peak, as the compiler plans them and as the device counts them.
JAX_PLATFORMS=cuda python tools/bench.py --alone --config=configs/plans/dit_xl2.py:dmd2

`divergence` compares the chunked divergence at a vocabulary of 152 k to the plain one, all logits
at once: the bytes that value and gradient take beside arguments and results, and how far they
differ. --trl times GKD's steps, on- and off-policy, against TRL's (bench_trl.py).
"""

import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdistill.core import build, sharding
from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Optimizer
from jaxdistill.core.sharding import MeshShape
from jaxdistill.core.types import Ctx, lookup
from jaxdistill.data.prefetch import DevicePrefetch
from jaxdistill.data.synthetic import Synthetic
from jaxdistill.diffusion.denoiser import Denoiser, Velocity
from jaxdistill.methods.distribution.dmd2 import DMD2
from jaxdistill.methods.language.gkd import GKD
from jaxdistill.methods.language.kd import KD
from jaxdistill.methods.trajectory.meanflow import MeanFlow
from jaxdistill.methods.trajectory.scm import SCM
from jaxdistill.models.denoisers.dit import DiT
from jaxdistill.models.heads import Discriminator, TimeWeight
from jaxdistill.models.language.lm import LM
from jaxdistill.objectives import divergence
from jaxdistill.run import chips, loop, plan
from jaxdistill.run.experiment import Experiment
from jaxdistill.run.report import text_table
from launch._command import arguments, load_config, main, output, whole

DIT = dict(size=16, patch=4, channels=4, dim=128, depth=4, heads=4)
LLAMA = dict(dim=128, mlp=384, heads=4, depth=4, max_length=160)


def diffusion(method, **roles):
    """A case on 16 x 16 x 4 samples, batch 32, float32: DiT of depth 4, width 128, 4 heads, patch
    4.
    """
    arrays = dict(x="normal 16 16 4", cond="integers 10", null_cond="constant 10")
    model = DiT(**DIT, second_time="meanflow" in type(method).__module__)
    net = dict(
        model=model,
        denoiser=Denoiser(param=Velocity(time_scale=1000.0)),
        init="fresh",
        optimizer=Optimizer(lr=1e-4),
    )
    every = {
        "student": Role(**net),
        **{k: Role(**net) if v is None else v for k, v in roles.items()},
    }
    return experiment(
        steps=100,
        data=Synthetic(batch_size=32, arrays=arrays),
        method=method,
        roles=every,
    )


def language(method, vocab=512):
    """A case on a Llama of depth 4, width 128: 8 rows of 32 prompt tokens and 128 more."""
    arrays = dict(tokens=f"integers {vocab} 160", mask="constant 1 160")
    net = dict(
        model=LM(vocab=vocab, **LLAMA),
        init="fresh",
        optimizer=Optimizer(lr=1e-4),
    )
    return experiment(
        steps=100,
        data=Synthetic(batch_size=8, arrays=arrays),
        method=method,
        roles=dict(teacher=Role(**net), student=Role(**net)),
    )


def digits():
    config = load_config("configs/digits/dmd2.py")
    with config.unlocked():
        config.roles.teacher.model = build.plain(DiT())
        config.roles.teacher.denoiser = build.plain(Denoiser(param=Velocity(time_scale=1000.0)))
        config.roles.teacher.init = "fresh"
    return config


CASES = {
    "digits_dmd2": digits,
    "meanflow": lambda: diffusion(MeanFlow()),
    "scm": lambda: diffusion(
        SCM(),
        teacher=None,
        weight=Role(model=TimeWeight()),
    ),
    "dmd2": lambda: diffusion(
        DMD2(),
        teacher=None,
        fake=None,
        disc=Role(model=Discriminator(dim=128, classes=10)),
    ),
    "gkd": lambda: language(GKD(on_policy=1.0, prompt_length=32)),
    "kd": lambda: language(KD()),
}


class Case:
    """Two sides of one config: `engine(i)` and `hand(i)` run step i and return something to wait
    for.
    """

    def __init__(self, config):
        with config.unlocked():
            config.mesh = build.plain(MeshShape(data=1, fsdp=1, tensor=1))
        experiment = Experiment(config, Path("unused"))
        self.experiment = experiment
        method = experiment.method
        nets = experiment.nets
        key = jax.random.key(0)
        start = {
            role: nets[role].init(jax.random.fold_in(key, 9 + i))
            for i, role in enumerate(nets)
            if role in method.frozen
        }
        stage = method.stages(experiment.settings.steps)[0]
        self.programs = loop.make_programs(experiment, nets, stage, start, experiment.data.spec())
        self.state = self.programs.init(key, start)
        self.rng = jax.random.key(1)
        self.put = sharding.put_batch(experiment.mesh, experiment.settings.rules)
        self.batch = self.put(experiment.data.batch(0, slice(None)))
        self.method = method
        self.nets = nets

    def prepare_hand(self):
        """The other side's own weights and optimiser states."""
        experiment = self.experiment
        method = self.method
        self.params, self.frozen = jax.tree.map(jnp.copy, (self.state.params, self.state.frozen))
        self.txs = {
            role: experiment.roles[role].optimizer.make(1000, axes=self.nets[role].axes)
            for role in method.inits
        }
        self.opt = {role: self.txs[role].init(p) for role, p in self.params.items()}
        self.ema = {role: jax.tree.map(jnp.copy, self.params[role]) for role in method.ema}
        self.memory = method.memory()
        self.by_hand = jax.jit(self._step, static_argnums=5, donate_argnums=(0, 1, 2))

    def engine(self, i, batch=None):
        self.state, metrics = self.programs.step(
            self.state, self.batch if batch is None else batch, self.rng, self.programs.active_at(i)
        )
        return metrics

    def hand(self, i):
        active = tuple(n for n, turn in enumerate(self.method.turns) if turn.when(i))
        self.params, self.opt, self.ema, loss = self.by_hand(
            self.params, self.opt, self.ema, self.batch, jnp.int32(i), active
        )
        return loss

    def _step(self, params, opt, ema, batch, i, active):
        """The step as one would write it for this method alone: no counts, norms, memory or
        metrics.
        """
        rng = jax.random.fold_in(self.rng, i)
        loss = 0.0
        for n in active:
            turn = self.method.turns[n]
            key = jax.random.fold_in(rng, n)
            every = {**self.frozen, **params, **{f"ema_{role}": w for role, w in ema.items()}}
            seen = (
                batch
                if turn.gather is None
                else turn.gather(loop.bind(self.nets, every), Ctx(batch, key, i, self.memory))
            )

            def objective(moving, every=every, seen=seen, key=key, turn=turn):
                out = turn.loss(
                    loop.bind(self.nets, {**every, **moving}),
                    Ctx(jax.lax.stop_gradient(seen), key, i, self.memory),
                )
                return out.loss / (1 if out.count is None else out.count)

            loss, grads = jax.value_and_grad(objective)({role: params[role] for role in turn.moves})
            params = dict(params)
            opt = dict(opt)
            ema = dict(ema)
            for role in turn.moves:
                updates, opt[role] = self.txs[role].update(grads[role], opt[role], params[role])
                params[role] = optax.apply_updates(params[role], updates)
                if role in ema:
                    ema[role] = optax.incremental_update(params[role], ema[role], 0.01)
        return params, opt, ema, loss


def timed(run, steps: int) -> float:
    """Seconds of a step."""
    started = time.perf_counter()
    for i in range(steps):
        out = run(i)
    jax.block_until_ready(out)
    return (time.perf_counter() - started) / steps


def alone(case: Case, steps: int, rounds: int, trace: str) -> list[dict]:
    """A row for every pattern of turns; bytes are those of one device, and flops of all."""
    mesh = case.experiment.mesh
    programs = case.programs
    device = mesh.devices.flat[0]
    rows = []
    chip = chips.of(device.device_kind)
    counted = lambda: (device.memory_stats() or {}).get("peak_bytes_in_use")
    for active, by_role in programs.patterns.items():
        started = time.perf_counter()
        compiled = programs.step.lower(case.state, case.batch, case.rng, active).compile()
        compiling = time.perf_counter() - started

        def step(i, compiled=compiled):
            case.state, metrics = compiled(case.state, case.batch, case.rng)
            return metrics

        timed(step, 3)
        seconds = [timed(step, steps) for _ in range(rounds)]
        if trace:
            with jax.profiler.trace(trace):
                timed(step, steps)
        middle = statistics.median(seconds)
        work = sum(by_role.values())
        rows.append(
            {
                "turns": "+".join(map(str, active)),
                "ms": 1e3 * middle,
                "lowest": 1e3 * min(seconds),
                "highest": 1e3 * max(seconds),
                "samples/s": case.experiment.data.batch_size / middle,
                "model_Tflop": work / 1e12,
                "Tflop/s": work / middle / 1e12,
                **({"mfu_%": 100 * work / middle / (chip.flops * mesh.size)} if chip else {}),
                "planned_GiB": plan.peak(compiled) / 2**30,
                **({"peak_GiB": counted() / 2**30} if counted() else {}),
                "compile_s": compiling,
            }
        )
    return rows


def measure(case: Case, steps: int, rounds: int, trace: str) -> dict:
    case.prepare_hand()
    compiling = []
    for side in (case.engine, case.hand):
        started = time.perf_counter()
        for i in range(steps):  # meets every pattern of turns
            jax.block_until_ready(side(i))
        compiling.append(time.perf_counter() - started)
    engine = []
    hand = []
    fed = []
    for n in range(rounds):
        order = [(engine, case.engine), (hand, case.hand)]
        for kept, side in order if n % 2 else order[::-1]:
            kept.append(timed(side, steps))
        with DevicePrefetch(case.experiment.data.loader(), case.put) as batches:
            next(batches)
            fed.append(timed(lambda i: case.engine(i, next(batches)[0]), steps))
    if trace:
        with jax.profiler.trace(trace):
            timed(case.engine, steps)
    ratios = [a / b for a, b in zip(engine, hand)]
    data = [a / b for a, b in zip(fed, engine)]
    return {
        "engine_ms": 1e3 * statistics.median(engine),
        "hand_ms": 1e3 * statistics.median(hand),
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "data": statistics.median(data),
        "first_steps_s": compiling[0],
    }


def divergences(
    vocab: int = 152_064,
    dim: int = 64,
    tokens: int = 512,
    chunk: int = 4752,
    kind: str = "forward_kl",
) -> dict:
    """The chunked divergence of `tokens` tokens against the plain one, each as a compiled value and
    gradient in the student's states and head. Temporaries in bytes; differences over the largest of
    the plain ones.
    """
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    teacher, student = ((draw(tokens, dim), draw(dim, vocab) / dim**0.5) for _ in range(2))
    sides = {
        "plain": lambda t, s: divergence.KINDS[kind](
            t[0] @ t[1], s[0] @ s[1]
        ),  # `token_divergence` takes rows by and by on a CPU
        "chunked": lambda t, s: divergence.chunked_divergence(kind, *t, *s, chunk=chunk),
    }
    row = {"case": "divergence", "vocab": vocab, "tokens": tokens}
    found = {}
    for name, side in sides.items():

        def summed(student, teacher, side=side):
            each = side(teacher, student)
            return jnp.sum(each), each

        compiled = (
            jax.jit(jax.value_and_grad(summed, has_aux=True)).lower(student, teacher).compile()
        )
        row[f"{name}_bytes"] = compiled.memory_analysis().temp_size_in_bytes
        (_, each), grads = compiled(student, teacher)
        found[name] = (each, *grads)
    row["memory_ratio"] = row["chunked_bytes"] / row["plain_bytes"]
    apart = [
        float(jnp.abs(a - b).max() / jnp.abs(b).max())
        for a, b in zip(found["chunked"], found["plain"])
    ]
    return {**row, "value_apart": apart[0], "gradient_apart": max(apart[1:])}


def bench(argv):
    known = {
        "case": "digits_dmd2",
        "config": "",
        "steps": "30",
        "rounds": "7",
        "trace": "",
        "trl": False,
        "alone": False,
    }
    values, config = arguments(argv, known)
    steps = whole(values, "steps", 1)
    rounds = whole(values, "rounds", 1)
    output(values, "trace", folder=True)
    if values["trl"]:
        from tools import bench_trl

        return bench_trl.compare(steps, rounds)
    names = [*CASES, "divergence"] if values["case"] == "all" else [values["case"]]
    every = {**CASES, "divergence": None}
    cases = (
        {"config": lambda: config}
        if config is not None
        else {name: lookup(every, name, "--case") for name in names}
    )
    rows = []
    for name, make in cases.items():
        if make is None:
            print(text_table([divergences()]), flush=True)
            continue
        case = Case(make())
        with sharding.use(case.experiment.mesh, case.experiment.settings.rules):
            if values["alone"]:
                print(
                    f"{name} on {case.experiment.mesh.devices.flat[0].device_kind},"
                    f" {case.experiment.data.batch_size} samples a step"
                )
                print(text_table(alone(case, steps, rounds, values["trace"])), flush=True)
                continue
            rows.append({"case": name, **measure(case, steps, rounds, values["trace"])})
        print(text_table(rows[-1:]), flush=True)
    if len(rows) > 1:
        print(f"\n{text_table(rows)}")


if __name__ == "__main__":
    main(bench)
