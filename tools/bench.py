"""Step time of a config against a hand-written step of the same networks and losses, in pairs, in
one process.

python tools/bench.py [--case=digits_dmd2 | meanflow | scm | dmd2 | gkd | kd | divergence | all]
    [--config=FILE] [--steps=30] [--rounds=7] [--trace=DIR] [--trl] [--alone]

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

from jaxdistill.core import sharding
from jaxdistill.core.types import lookup
from jaxdistill.data.prefetch import DevicePrefetch
from jaxdistill.objectives import divergence
from jaxdistill.run import chips, plan
from jaxdistill.run.table import text_table
from launch._command import arguments, main, output, whole
from tools.bench_cases import CASES, Case


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
    between: divergence.Divergence = divergence.ForwardKL(),
) -> dict:
    """The chunked divergence of `tokens` tokens against the plain one, each as a compiled value and
    gradient in the student's states and head. Temporaries in bytes; differences over the largest of
    the plain ones.
    """
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    teacher, student = ((draw(tokens, dim), draw(dim, vocab) / dim**0.5) for _ in range(2))
    sides = {
        # `token_divergence` would take blocks of rows on a CPU
        "plain": lambda t, s: between(t[0] @ t[1], s[0] @ s[1]),
        "chunked": lambda t, s: divergence.chunked_divergence(between, *t, *s, chunk=chunk),
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
        from tools import bench_trl  # reads torch, which is large

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
                kind = case.experiment.mesh.devices.flat[0].device_kind
                print(f"{name} on {kind}, {case.experiment.data.batch_size} samples a step")
                print(text_table(alone(case, steps, rounds, values["trace"])), flush=True)
                continue
            rows.append({"case": name, **measure(case, steps, rounds, values["trace"])})
        print(text_table(rows[-1:]), flush=True)
    if len(rows) > 1:
        print(f"\n{text_table(rows)}")


if __name__ == "__main__":
    main(bench)
