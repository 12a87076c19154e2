"""What a config costs on a machine that is not there: the real train step, compiled for a TPU
slice, and its roofline.

Bytes of weights, optimiser states and averages come from the abstract state and its shardings,
temporaries from the compiler, flops from the step's jaxpr, traffic through memory and between chips
from the compiled program's text.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxdistill.core import build, sharding
from jaxdistill.core.types import Refused
from jaxdistill.run import flops, hlo, loop
from jaxdistill.run.chips import CHIPS, Chip, chip
from jaxdistill.run.experiment import Experiment

PARTS = ("params", "opt", "ema", "frozen")


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A compiled pattern of turns. Each of its seconds is a bound as if the others were free."""

    turns: str
    temporaries: int  # bytes a chip
    peak: int  # bytes a chip: arguments, results that are no donated argument, temporaries
    model_flops: float  # of all chips
    compute: float  # seconds: flops with what is computed again, at the chip's peak
    memory: float  # seconds
    network: float  # seconds
    sent: dict[str, float]  # collective -> bytes a chip
    utilisation: float  # model flops over what the chips could do in the longest of the three
    seconds: float  # of compilation


@dataclasses.dataclass(frozen=True)
class Plan:
    """A config on a topology."""

    topology: str
    chips: int
    mesh: dict[str, int]
    by_role: dict[str, dict[str, int]]  # role -> part of the state -> bytes a chip
    batch: int  # bytes a chip
    host: int  # bytes a chip of frozen weights that rest in host memory
    patterns: tuple[Pattern, ...]
    hbm: float

    @property
    def state(self) -> int:
        """Bytes a chip of everything that lives through the training."""
        return sum(sum(parts.values()) for parts in self.by_role.values())

    @property
    def peak(self) -> int:
        return max((p.peak for p in self.patterns), default=self.state + self.batch)

    @property
    def fits(self) -> bool:
        return self.peak <= self.hbm

    @property
    def seconds(self) -> float:
        """The longest bound of a step, over the patterns."""
        return max(max(p.compute, p.memory, p.network) for p in self.patterns)


def topology(name: str) -> tuple[list[Any], Chip]:
    """Devices of a TPU slice such as "v5p:4x4x4" and their chip. Raises Refused on another name, or
    without libtpu.
    """
    kind, _, shape = name.partition(":")
    if not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3}){1,2}", shape) or chip(kind).node:
        raise Refused(
            f"--topology={name}: expected a TPU slice such as v5e:4x4 or v5p:4x4x8 (or GPUs such"
            " as h100:8x4)"
        )
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except Exception as error:
        raise Refused(
            f"--topology={name}: {str(error).splitlines()[0][:160]} (pip install"
            " 'jaxdistill[tpu]' brings the compiler)"
        ) from error
    return list(found.devices), chip(kind)


def set_effort(effort: float) -> None:
    """How long the compiler may search for quick programs: from -1, hardly, to 1; 0 is its default.

    JAX 0.11 has levels in place of the number, of which these are O1, UNKNOWN (the default) and O3.
    """
    if hasattr(jax.config, "jax_exec_time_optimization_effort"):
        jax.config.update("jax_exec_time_optimization_effort", effort)
    else:
        jax.config.update(
            "jax_optimization_level", "O1" if effort < 0 else "O3" if effort > 0 else "UNKNOWN"
        )


def shorten(config: ConfigDict) -> None:
    """Changes `config` to as few steps as show every pattern of turns."""
    for method in (config.method, config.method.get("host", {})):
        if "critic_only" in method:
            method.critic_only = 0
    config.steps = min(
        config.steps,
        2 * max(1, config.method.get("critic_steps", 1)) + config.method.get("measures", 0),
    )


def compile_for(config: ConfigDict, name: str, whole: bool = True) -> Plan:
    """Compiles every turn pattern of the first stage for the slice called `name`; without `whole`,
    up to the first that does not fit. Raises Refused on bad input.
    """
    devices, kind = topology(name)
    experiment = Experiment(config, Path("unused"), devices)
    with sharding.use(experiment.mesh, experiment.settings.rules):
        programs, nets = loop.abstract_programs(experiment)
        key = jax.eval_shape(lambda: jax.random.key(0))
        patterns = []
        for active in programs.patterns:
            started = time.time()
            traced = programs.step.trace(programs.abstract, programs.batch, key, active)
            compiled = traced.lower().compile()
            work = flops.count(traced.jaxpr.jaxpr, recomputed=True)
            patterns.append(
                _pattern(
                    active,
                    programs.patterns[active],
                    work,
                    compiled,
                    kind,
                    len(devices),
                    time.time() - started,
                )
            )
            if not whole and patterns[-1].peak > kind.hbm:
                break
    shape = {axis: size for axis, size in experiment.mesh.shape.items() if size > 1}
    return Plan(
        name,
        len(devices),
        shape,
        by_role(programs.abstract, nets),
        _bytes(programs.batch),
        _bytes(programs.abstract, "host"),
        tuple(patterns),
        kind.hbm,
    )


def peak(compiled) -> int:
    """Bytes of a device that a compiled program takes: arguments, results that are no donated
    argument, temporaries.
    """
    held = compiled.memory_analysis()
    return (
        held.argument_size_in_bytes
        + held.output_size_in_bytes
        - held.alias_size_in_bytes
        + held.temp_size_in_bytes
    )


def _pattern(
    active, by_role: dict, work: dict, compiled, kind: Chip, chips: int, seconds: float
) -> Pattern:
    moved = hlo.moved(compiled.as_text())
    model = sum(by_role.values())
    bounds = (
        sum(work.values()) / (chips * kind.flops),
        moved.memory / kind.bandwidth,
        sum(moved.sent.values()) / kind.links,
    )
    return Pattern(
        "+".join(map(str, active)),
        compiled.memory_analysis().temp_size_in_bytes,
        peak(compiled),
        model,
        *bounds,
        moved.sent,
        model / (chips * kind.flops) / max(*bounds, 1e-30),
        seconds,
    )


def by_role(state, nets) -> dict[str, dict[str, int]]:
    """role -> part of the state -> bytes in each chip's memory, of an abstract state with its
    shardings.
    """
    return {
        role: {part: _bytes(getattr(state, part).get(role, {})) for part in PARTS} for role in nets
    }


def _bytes(tree, memory: str = "device") -> int:
    shard = lambda s: (
        math.prod(s.sharding.shard_shape(s.shape) if s.sharding else s.shape) * s.dtype.itemsize
    )
    kind = lambda s: "host" if s.sharding and s.sharding.memory_kind == "pinned_host" else "device"
    return sum(shard(leaf) for leaf in jax.tree.leaves(tree) if kind(leaf) == memory)


def gpus(config: ConfigDict, name: str) -> Plan:
    """The same for GPU nodes such as "h100:8x4" (8 a node, 4 nodes), from constants, without
    compiling.

    Temporaries are unknown; traffic between chips is FSDP's: weights gathered for every pass that
    reads them (one for a frozen role, two for a moving one), gradients scattered once.
    """
    kind_name, _, shape = name.partition(":")
    kind = chip(kind_name)
    if not kind.node or not re.fullmatch(r"[1-9]\d{0,3}x[1-9]\d{0,3}", shape):
        raise Refused(f"--topology={name}: expected GPUs a node x nodes, such as h100:8x4")
    node, nodes = (int(n) for n in shape.split("x"))
    devices = [_Described(i, kind.kinds[0]) for i in range(node * nodes)]
    experiment = Experiment(config, Path("unused"), devices)
    with sharding.use(experiment.mesh, experiment.settings.rules):
        programs, nets = loop.abstract_programs(experiment)
        held = by_role(programs.abstract, nets)
        links = kind.links if nodes == 1 else kind.network
        ways = experiment.mesh.shape["fsdp"]
        patterns = []
        for active, model in programs.patterns.items():
            turns = [
                experiment.method.stages(experiment.settings.steps)[0].method.turns[i]
                for i in active
            ]
            moving = {role for turn in turns for role in turn.moves}
            whole = {
                role: (parts["params"] + parts["frozen"]) * ways
                for role, parts in held.items()
                if model.get(role)
            }
            gathered = (
                sum(size * (2 if role in moving else 1) for role, size in whole.items())
                * (ways - 1)
                / ways
            )
            sent = {
                "all-gather": gathered,
                "reduce-scatter": sum(whole.get(role, 0) for role in moving) * (ways - 1) / ways,
            }
            key = jax.eval_shape(lambda: jax.random.key(0))
            traced = programs.step.trace(programs.abstract, programs.batch, key, active)
            work = sum(flops.count(traced.jaxpr.jaxpr, recomputed=True).values())
            bounds = (
                work / (len(devices) * kind.flops),
                sum(whole.values()) * 2 / kind.bandwidth,
                sum(sent.values()) / links,
            )
            use = sum(model.values()) / (len(devices) * kind.flops) / max(*bounds, 1e-30)
            patterns.append(
                Pattern(
                    "+".join(map(str, active)),
                    0,
                    sum(sum(p.values()) for p in held.values()) + _bytes(programs.batch),
                    sum(model.values()),
                    *bounds,
                    sent,
                    use,
                    0.0,
                )
            )
    shape = {axis: size for axis, size in experiment.mesh.shape.items() if size > 1}
    return Plan(
        name, len(devices), shape, held, _bytes(programs.batch), 0, tuple(patterns), kind.hbm
    )


@dataclasses.dataclass(frozen=True)
class _Described:
    """A device for shardings alone."""

    id: int
    device_kind: str
    platform: str = "described"
    process_index: int = 0


def search(config: ConfigDict, name: str, most: int = 12) -> Iterator[Plan | tuple[dict, str]]:
    """Plans of mesh shapes x remat policies x accumulations x places of frozen weights, the
    likeliest first; those refused as (change, reason).

    A candidate whose state alone is too large is not compiled, nor one that splits finer than the
    first that fits, or offloads where that did not: what fits needs neither more tensor parallelism
    nor the host. Where one does not fit, none is tried that accumulates or rematerialises less, nor
    the host where it is short of more than the frozen weights. At most `most` are compiled.
    """
    devices, kind = topology(name)
    done = 0
    enough = None
    hopeless = []
    for change in candidates(config, len(devices)):
        accumulate = change["accumulate"]
        remat = change["remat"]
        rest = {k: change[k] for k in ("mesh", "place")}
        finer = (change["mesh"]["tensor"] * change["mesh"]["sequence"], change["place"])
        refused = any(
            rest == other and accumulate <= n and how in (remat, "full")
            for other, n, how in hopeless
        )
        if done >= most or refused or (enough and (finer[0] > enough[0] or finer[1] > enough[1])):
            continue
        tried = changed(config, change)
        short = 0.0
        try:
            experiment = Experiment(tried, Path("unused"), devices)
            with sharding.use(experiment.mesh, experiment.settings.rules):
                programs, nets = loop.abstract_programs(experiment)
            held = by_role(programs.abstract, nets)
            state = sum(sum(parts.values()) for parts in held.values())
            frozen = sum(parts["frozen"] for parts in held.values())
            if state > 0.9 * kind.hbm:
                found = f"state of {state / 2**30:.1f} GiB a chip"
            else:
                done += 1
                found = compile_for(tried, name, whole=False)
                short = found.peak - found.hbm
        except Refused as error:
            found = str(error)
        except jax.errors.JaxRuntimeError as error:
            found = too_large(error)
            short = _short(error)
        if isinstance(found, Plan) and found.fits:
            enough = enough or finer
        else:
            hopeless.append((rest, accumulate, remat))
        if short > 0 and short > frozen:
            hopeless.append(({**rest, "place": "host"}, accumulate, remat))
        yield change, found


def too_large(error: jax.errors.JaxRuntimeError) -> str:
    """What the compiler says of a program that exceeds HBM: by how much."""
    said = [line.strip() for line in str(error).splitlines()]
    return next((line for line in said if re.search("exceed|used", line, re.I)), str(error)[:160])


def _short(error: jax.errors.JaxRuntimeError) -> float:
    """Bytes by which the temporaries of a program that does not fit exceed HBM; 0 where the
    compiler does not say.
    """
    said = re.search(r"\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", str(error))
    return (float(said[1]) - float(said[2])) * 2**30 if said else 0.0


def candidates(config: ConfigDict, devices: int) -> Iterator[dict[str, Any]]:
    """Config changes to try: FSDP alone, then with growing tensor and sequence parallelism; frozen
    weights on the device before the host, the accumulation and the remat that hold least first.
    """
    frozen = build.build(config.method).frozen
    powers = [2**i for i in range(int(math.log2(devices)) + 1)]
    splits = sorted(
        ((t, s) for t in powers for s in powers if t * s <= min(devices, 64)),
        key=lambda ts: (ts[0] * ts[1], ts[1]),
    )
    has_remat = any("remat" in (role.get("model") or {}) for role in config.roles.values())
    policies = ("full", "dots_no_batch") if has_remat else ("",)
    places = (
        ("device", "host")
        if any(role.get("model") and name in frozen for name, role in config.roles.items())
        else ("device",)
    )
    for (tensor, sequence), place in itertools.product(splits, places):
        rows = devices // (tensor * sequence)
        mesh = dict(data=1, fsdp=rows, sequence=sequence, tensor=tensor)
        whole = [n for n in (16, 8, 4, 2, 1) if config.data.batch_size % (rows * n) == 0] or [
            1
        ]  # refused, with the reason
        for accumulate, remat in itertools.product(whole, policies):
            yield {"mesh": mesh, "accumulate": accumulate, "remat": remat, "place": place}


def changed(config: ConfigDict, change: dict[str, Any]) -> ConfigDict:
    """A copy of `config` with a candidate's values."""
    copy = config.copy_and_resolve_references()
    frozen = build.build(config.method).frozen
    for axis, size in change["mesh"].items():
        copy.mesh[axis] = size
    copy.accumulate = change["accumulate"]
    for name, role in copy.roles.items():
        if change["remat"] and "remat" in (role.get("model") or {}):
            role.model.remat = change["remat"]
        if change["place"] == "host" and name in frozen:
            role.place = "host"
    return copy


def advice(plan: Plan, pattern: Pattern) -> tuple[str, str]:
    """(what binds, which config key moves it)."""
    if pattern.peak > plan.hbm:
        if plan.state > 0.6 * plan.hbm:
            return (
                "HBM: state",
                "mesh.fsdp up, roles.<frozen>.param_dtype=bfloat16, roles.<role>.lora.rank, or a"
                " larger slice",
            )
        return (
            "HBM: temporaries",
            "roles.<role>.model.remat=full, accumulate up, mesh.sequence up, model.dtype=bfloat16",
        )
    longest = max(
        (pattern.compute, "compute"),
        (pattern.memory, "HBM bandwidth"),
        (pattern.network, "interconnect"),
    )[1]
    return longest, {
        "compute": "roles.<role>.model.remat (less is computed again), or a larger slice",
        "HBM bandwidth": "data.batch_size up, model.dtype=bfloat16, roles.<role>.model.remat (less"
        " is stored)",
        "interconnect": "data.batch_size up, mesh.tensor down, mesh.fsdp against mesh.data",
    }[longest]


GPU_KINDS = tuple(name for name, c in CHIPS.items() if c.node)
