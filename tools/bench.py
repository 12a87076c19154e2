"""Times the steps of a config against hand-written steps of the same networks and losses.

python tools/bench.py [--case=digits_dmd2 | meanflow | meanflow_reference | scm | dmd2 | gkd | kd |
    divergence | all] [--config=FILE] [--steps=30] [--rounds=7] [--trace=DIR] [--trl] [--alone]

All sides run in one process. A round runs --steps steps of each, in turn. Printed are, over the
rounds, the median milliseconds of an engine's step, the median and the range of the ratio engine /
hand-written, and the time to compile. `products_ms` are the matrix products of the step alone
(bench_products.py), `GFLOP/s` their speed, and `x_products` is the ratio of the engine's step to
them. The hand-written side of `meanflow_reference` is the paper's algorithm in plain JAX, without
this library (bench_meanflow.py). `data` is the ratio of the engine's step with batches from
the config's loader to that on one batch that stays on the device; it is near 1 where loading
overlaps with the steps. With --trace the engine's last round is written for TensorBoard's profiler.

--alone times the engine only, each pattern of turns by itself, and prints model flops, their ratio
to the chip's peak (model-flops utilisation; run/chips.py), and bytes at the peak, planned by the
compiler and counted by the device:
JAX_PLATFORMS=cuda python tools/bench.py --alone --config=configs/plans/dit_xl2.py:dmd2

`divergence` compares the chunked divergence at a vocabulary of 152 k to the plain one, which has
all logits at once: temporary bytes of value and gradient, and the differences of both. --trl times
the steps of GKD, on- and off-policy, against TRL's (bench_trl.py).
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
from tools.bench_meanflow import Reference


def timed(run, steps: int) -> float:
    """Seconds of one of `steps` calls run(i)."""
    started = time.perf_counter()
    for i in range(steps):
        out = run(i)
    jax.block_until_ready(out)
    return (time.perf_counter() - started) / steps


def alone(case: Case, steps: int, rounds: int, trace: str) -> list[dict]:
    """A row for each pattern of turns; bytes are those of one device, flops those of all."""
    mesh = case.experiment.mesh
    programs = case.programs
    device = mesh.devices.flat[0]
    rows = []
    chip = chips.of(device.device_kind)
    for active, by_role in programs.patterns.items():
        started = time.perf_counter()
        compiled = programs.step.lower(
            case.state, case.batch, case.rng, active
        ).compile()
        compiling = time.perf_counter() - started

        def step(i, compiled=compiled):
            case.state, metrics = compiled(case.state, case.batch, case.rng)
            return metrics

        timed(step, 3)
        seconds = [timed(step, steps) for _ in range(rounds)]
        if trace:
            with jax.profiler.trace(trace):
                timed(step, steps)
        median = statistics.median(seconds)
        flops = sum(by_role.values())
        row = {
            "turns": "+".join(map(str, active)),
            "ms": 1e3 * median,
            "lowest": 1e3 * min(seconds),
            "highest": 1e3 * max(seconds),
            "samples/s": case.experiment.data.batch_size / median,
            "model_Tflop": flops / 1e12,
            "Tflop/s": flops / median / 1e12,
        }
        if chip:
            row["mfu_%"] = 100 * flops / median / (chip.flops * mesh.size)
        row["planned_GiB"] = plan.peak(compiled) / 2**30
        peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
        if peak:
            row["peak_GiB"] = peak / 2**30
        row["compile_s"] = compiling
        rows.append(row)
    return rows


def measure(case: Case, steps: int, rounds: int, trace: str) -> dict:
    """The row of a case: the engine against the hand-written step and its products alone."""
    case.prepare_hand()
    case.prepare_products()
    sides = {"hand": case.hand, "engine": case.engine, "products": case.products}
    compiling = _compiling_seconds(case.engine, steps)
    _compiling_seconds(case.hand, steps)
    _compiling_seconds(case.products, steps)
    seconds = {name: [] for name in (*sides, "loaded")}
    for n in range(rounds):
        order = reversed(sides) if n % 2 else sides
        for name in order:
            seconds[name].append(timed(sides[name], steps))
        with DevicePrefetch(case.experiment.data.loader(), case.put) as batches:
            next(batches)
            loaded = timed(lambda i: case.engine(i, next(batches)[0]), steps)
            seconds["loaded"].append(loaded)
    if trace:
        with jax.profiler.trace(trace):
            timed(case.engine, steps)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = _ratios(seconds["engine"], seconds["hand"])
    above = _ratios(seconds["engine"], seconds["products"])
    work = sum(case.operations(i) for i in range(steps)) / steps
    return {
        "engine_ms": 1e3 * median["engine"],
        "hand_ms": 1e3 * median["hand"],
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "products_ms": 1e3 * median["products"],
        "GFLOP/s": work / median["products"] / 1e9,
        "x_products": statistics.median(above),
        "x_lowest": min(above),
        "x_highest": max(above),
        "data": statistics.median(_ratios(seconds["loaded"], seconds["engine"])),
        "first_steps_s": compiling,
    }


def _ratios(above: list[float], below: list[float]) -> list[float]:
    """The ratios of two sides' seconds, round by round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def _compiling_seconds(side, steps: int) -> float:
    """Seconds of the first steps of one side, which compile each pattern of turns."""
    started = time.perf_counter()
    for i in range(steps):
        jax.block_until_ready(side(i))
    return time.perf_counter() - started


def divergences(
    vocab: int = 152_064,
    dim: int = 64,
    tokens: int = 512,
    chunk: int = 4752,
    between: divergence.Divergence = divergence.ForwardKL(),
) -> dict:
    """The row of the chunked divergence of `tokens` tokens against the plain one.

    Each is compiled with its gradient in the student's features and output matrix. Differences are
    relative to the largest value of the plain one.
    """
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    teacher, student = (
        (draw(tokens, dim), draw(dim, vocab) / dim**0.5) for _ in range(2)
    )

    def plain(t, s):  # `token_divergence` would take blocks of tokens on a CPU
        return between(t[0] @ t[1], s[0] @ s[1])

    def chunked(t, s):
        return divergence.chunked_divergence(between, *t, *s, chunk=chunk)

    row = {"case": "divergence", "vocab": vocab, "tokens": tokens}
    found = {}
    for name, side in (("plain", plain), ("chunked", chunked)):

        def summed(student, teacher, side=side):
            each = side(teacher, student)
            return jnp.sum(each), each

        gradient = jax.jit(jax.value_and_grad(summed, has_aux=True))
        compiled = gradient.lower(student, teacher).compile()
        row[f"{name}_bytes"] = compiled.memory_analysis().temp_size_in_bytes
        (_, each), grads = compiled(student, teacher)
        found[name] = (each, *grads)
    row["memory_ratio"] = row["chunked_bytes"] / row["plain_bytes"]
    apart = []
    for a, b in zip(found["chunked"], found["plain"]):
        apart.append(float(jnp.abs(a - b).max() / jnp.abs(b).max()))
    return {**row, "value_apart": apart[0], "gradient_apart": max(apart[1:])}


KNOWN = {
    "case": "digits_dmd2",
    "config": "",
    "steps": "30",
    "rounds": "7",
    "trace": "",
    "trl": False,
    "alone": False,
}


def bench(argv):
    values, config = arguments(argv, KNOWN)
    steps = whole(values, "steps", 1)
    rounds = whole(values, "rounds", 1)
    output(values, "trace", folder=True)
    if values["trl"]:
        from tools import bench_trl  # imports torch, which is large

        bench_trl.compare(steps, rounds)
        return
    every = {**CASES, "divergence": None}
    kinds = {"meanflow_reference": Reference}
    if config is not None:
        cases = {"config": lambda: config}
    elif values["case"] == "all":
        cases = every
    else:
        cases = {values["case"]: lookup(every, values["case"], "--case")}
    rows = []
    for name, make in cases.items():
        if make is None:
            print(text_table([divergences()]), flush=True)
            continue
        case = kinds.get(name, Case)(make())
        with sharding.use(case.experiment.mesh, case.experiment.settings.rules):
            if values["alone"]:
                kind = case.experiment.mesh.devices.flat[0].device_kind
                print(
                    f"{name} on {kind}, {case.experiment.data.batch_size} samples a step"
                )
                print(
                    text_table(alone(case, steps, rounds, values["trace"])),
                    flush=True,
                )
                continue
            rows.append(
                {"case": name, **measure(case, steps, rounds, values["trace"])}
            )
        print(text_table(rows[-1:]), flush=True)
    if len(rows) > 1:
        print(f"\n{text_table(rows)}")


if __name__ == "__main__":
    main(bench)
