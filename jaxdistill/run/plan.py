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
from typing import Any, Literal

import jax
from ml_collections import ConfigDict

from jaxdistill.core import build, sharding
from jaxdistill.core.step import parts_of
from jaxdistill.core.types import Refused
from jaxdistill.run import flops, hlo
from jaxdistill.run.chips import CHIPS, Chip, chip
from jaxdistill.run.experiment import Experiment
from jaxdistill.run.programs import Programs, abstract_programs

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
    if (
        not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3}){1,2}", shape)
        or chip(kind).node
    ):
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
            "jax_optimization_level",
            "O1" if effort < 0 else "O3" if effort > 0 else "UNKNOWN",
        )


def shorten(config: ConfigDict, stage: int = 0) -> None:
    """Changes `config` to two cycles of a stage's turns, without those of the first phase alone.

    Raises Refused where the method has no such stage.
    """
    method = build.build(config.method, "config.method").settled()
    config.method = build.plain(method)
    stages = method.stages(config.steps)
    if stage >= len(stages):
        raise Refused(
            f"--stage={stage}: {type(method).__name__} has {len(stages)} of them, from 0"
        )
    one = stages[stage]
    wanted = 2 * (one.method.cycle if stage else method.cycle)
    if stage and one.steps:
        wanted = math.ceil(wanted * config.steps / one.steps)
    config.steps = min(config.steps, wanted)


def compile_for(
    config: ConfigDict, name: str, every: bool = True, stage: int = 0
) -> Plan:
    """Compiles the turn patterns of a stage for the slice called `name`.

    Without `every` it ends at the first pattern that does not fit. Raises Refused on bad input.
    """
    devices, kind = topology(name)
    experiment = Experiment(config, Path("unused"), devices)
    with sharding.use(experiment.mesh, experiment.settings.rules):
        programs, nets = abstract_programs(experiment, stage)
        patterns = []
        for active in programs.patterns:
            patterns.append(_compiled(programs, active, kind, len(devices)))
            if not every and patterns[-1].peak > kind.hbm:
                break
    return Plan(
        topology=name,
        chips=len(devices),
        mesh=_split_axes(experiment.mesh),
        by_role=by_role(programs.abstract, nets),
        batch=_bytes(programs.batch),
        host=_bytes(programs.abstract, "host"),
        patterns=tuple(patterns),
        hbm=kind.hbm,
    )


def peak(compiled: Any) -> int:
    """Bytes of a device that a compiled program needs.

    These are its arguments, the results that take the place of no donated argument, and its
    temporaries.
    """
    sizes = compiled.memory_analysis()
    results = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return sizes.argument_size_in_bytes + results + sizes.temp_size_in_bytes


def _compiled(
    programs: Programs, active: tuple[int, ...], kind: Chip, chips: int
) -> Pattern:
    """A pattern of turns, compiled."""
    started = time.time()
    traced = _traced(programs, active)
    compiled = traced.lower().compile()
    seconds = time.time() - started
    moved = hlo.moved(compiled.as_text())
    return _pattern(
        programs,
        active,
        traced,
        peak_flops=chips * kind.flops,
        memory=moved.memory / kind.bandwidth,
        network=sum(moved.sent.values()) / kind.links,
        sent=moved.sent,
        temporaries=compiled.memory_analysis().temp_size_in_bytes,
        peak=peak(compiled),
        seconds=seconds,
    )


def _traced(programs: Programs, active: tuple[int, ...]) -> Any:
    """The train step, traced for one pattern of turns."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return programs.step.trace(programs.abstract, programs.batch, key, active)


def _pattern(
    programs: Programs,
    active: tuple[int, ...],
    traced: Any,
    *,
    peak_flops: float,
    memory: float,
    network: float,
    **measured: Any,
) -> Pattern:
    """A pattern of turns with its bound of compute and its utilisation.

    Args:
      peak_flops: of all chips, per second.
      memory, network: seconds.
      measured: the other fields of `Pattern`.
    """
    model_flops = sum(programs.patterns[active].values())
    work = sum(flops.count(traced.jaxpr.jaxpr, recomputed=True).values())
    compute = work / peak_flops
    longest = max(compute, memory, network, 1e-30)
    return Pattern(
        turns="+".join(map(str, active)),
        model_flops=model_flops,
        compute=compute,
        memory=memory,
        network=network,
        utilisation=model_flops / peak_flops / longest,
        **measured,
    )


def by_role(state, nets) -> dict[str, dict[str, int]]:
    """role -> part of an abstract state -> bytes of it in each chip's memory."""

    def parts(role: str) -> dict[str, int]:
        return {part: _bytes(tree) for part, tree in parts_of(state, role).items()}

    return {role: parts(role) for role in nets}


def _bytes(tree: Any, memory: Literal["device", "host"] = "device") -> int:
    """Bytes a chip of abstract arrays that are stored in `memory`."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        where = leaf.sharding
        on_host = bool(where) and where.memory_kind == "pinned_host"
        if on_host == (memory == "host"):
            shape = where.shard_shape(leaf.shape) if where else leaf.shape
            total += math.prod(shape) * leaf.dtype.itemsize
    return total


def gpus(config: ConfigDict, name: str, stage: int = 0) -> Plan:
    """A plan for GPU nodes such as "h100:8x4" (8 a node, 4 nodes), from constants.

    Nothing is compiled, so temporaries are unknown. Traffic between chips is that of FSDP: a
    frozen role's weights are gathered once, those of a moving role twice, and its gradients are
    scattered once. Raises Refused on bad input.
    """
    kind_name, _, shape = name.partition(":")
    kind = chip(kind_name)
    if not kind.node or not re.fullmatch(r"[1-9]\d{0,3}x[1-9]\d{0,3}", shape):
        raise Refused(
            f"--topology={name}: expected GPUs a node x nodes, such as h100:8x4"
        )
    node, nodes = (int(n) for n in shape.split("x"))
    devices = [_Described(i, kind.kinds[0]) for i in range(node * nodes)]
    links = kind.links if nodes == 1 else kind.network
    experiment = Experiment(config, Path("unused"), devices)
    with sharding.use(experiment.mesh, experiment.settings.rules):
        programs, nets = abstract_programs(experiment, stage)
        held = by_role(programs.abstract, nets)
        stages = experiment.method.stages(experiment.settings.steps)
        turns = stages[stage].method.turns
        patterns = []
        for active in programs.patterns:
            moving = {role for i in active for role in turns[i].moves}
            patterns.append(
                _estimated(
                    programs, active, moving, held, experiment.mesh, kind, links
                )
            )
    return Plan(
        topology=name,
        chips=len(devices),
        mesh=_split_axes(experiment.mesh),
        by_role=held,
        batch=_bytes(programs.batch),
        host=0,
        patterns=tuple(patterns),
        hbm=kind.hbm,
    )


def _estimated(
    programs: Programs,
    active: tuple[int, ...],
    moving: set[str],
    held: dict[str, dict[str, int]],
    mesh: jax.sharding.Mesh,
    kind: Chip,
    links: float,
) -> Pattern:
    """A pattern of turns from constants; `links` is the bandwidth between chips."""
    ways = mesh.shape["fsdp"]
    model = programs.patterns[active]
    weights = {
        role: (parts["params"] + parts["frozen"]) * ways
        for role, parts in held.items()
        if model.get(role)
    }
    reads = sum(
        size * (2 if role in moving else 1) for role, size in weights.items()
    )
    scattered = sum(weights.get(role, 0) for role in moving)
    sent = {
        "all-gather": reads * (ways - 1) / ways,
        "reduce-scatter": scattered * (ways - 1) / ways,
    }
    state = sum(sum(parts.values()) for parts in held.values())
    return _pattern(
        programs,
        active,
        _traced(programs, active),
        peak_flops=mesh.size * kind.flops,
        memory=sum(weights.values()) * 2 / kind.bandwidth,
        network=sum(sent.values()) / links,
        sent=sent,
        temporaries=0,
        peak=state + _bytes(programs.batch),
        seconds=0.0,
    )


def _split_axes(mesh: jax.sharding.Mesh) -> dict[str, int]:
    return {axis: size for axis, size in mesh.shape.items() if size > 1}


@dataclasses.dataclass(frozen=True)
class _Described:
    """A device for shardings alone."""

    id: int
    device_kind: str
    platform: str = "described"
    process_index: int = 0


def search(
    config: ConfigDict, name: str, most: int = 12, stage: int = 0
) -> Iterator[tuple[dict[str, Any], Plan | str]]:
    """Tries mesh shapes, rematerialisation, accumulation and places of frozen weights.

    Yields (change, plan or reason of refusal), the likeliest candidates first; at most `most` are
    compiled. These are not compiled:
    - a candidate whose state alone is too large;
    - one with more tensor parallelism than the first that fits, or with frozen weights on the host
      where that has them on the device;
    - one that accumulates or rematerialises less than another that does not fit;
    - one with weights on the host where more is missing than the frozen weights take.
    """
    devices, kind = topology(name)
    tried = Tried()
    compiled = 0
    for change in candidates(config, len(devices)):
        if compiled >= most or tried.rules_out(change):
            continue
        candidate = changed(config, change)
        missing = 0.0
        frozen = 0
        try:
            held = _state_bytes(candidate, devices, stage)
            state = sum(sum(parts.values()) for parts in held.values())
            frozen = sum(parts["frozen"] for parts in held.values())
            if state > 0.9 * kind.hbm:
                found = f"state of {state / 2**30:.1f} GiB a chip"
            else:
                compiled += 1
                found = compile_for(candidate, name, every=False, stage=stage)
                missing = found.peak - found.hbm
        except Refused as error:
            found = str(error)
        except jax.errors.JaxRuntimeError as error:
            found = too_large(error)
            missing = _missing(error)
        if isinstance(found, Plan) and found.fits:
            tried.fits(change)
        else:
            tried.fails(change)
        if missing > 0 and missing > frozen:
            tried.fails({**change, "place": "host"})
        yield change, found


def _state_bytes(
    config: ConfigDict, devices: list[Any], stage: int
) -> dict[str, dict[str, int]]:
    experiment = Experiment(config, Path("unused"), devices)
    with sharding.use(experiment.mesh, experiment.settings.rules):
        programs, nets = abstract_programs(experiment, stage)
    return by_role(programs.abstract, nets)


class Tried:
    """What the candidates of a search say of those that follow."""

    def __init__(self):
        self._enough: tuple[int, str] | None = None  # the first that fits
        self._failed: list[dict[str, Any]] = []

    def fits(self, change: dict[str, Any]) -> None:
        """Notes a candidate that fits."""
        if self._enough is None:
            self._enough = self._cost(change)

    def fails(self, change: dict[str, Any]) -> None:
        """Notes a candidate that does not fit."""
        self._failed.append(change)

    def rules_out(self, change: dict[str, Any]) -> bool:
        """Whether a candidate need not be compiled."""
        if any(self._needs_more(change, failed) for failed in self._failed):
            return True
        if self._enough is None:
            return False
        ways, place = self._cost(change)
        return ways > self._enough[0] or place > self._enough[1]

    def _cost(self, change: dict[str, Any]) -> tuple[int, str]:
        mesh = change["mesh"]
        return mesh["tensor"] * mesh["sequence"], change["place"]

    def _needs_more(self, change: dict[str, Any], failed: dict[str, Any]) -> bool:
        """Whether `change` needs at least the memory of `failed`."""
        same = all(change[key] == failed[key] for key in ("mesh", "place"))
        fewer = change["accumulate"] <= failed["accumulate"]
        return same and fewer and failed["remat"] in (change["remat"], "full")


def too_large(error: jax.errors.JaxRuntimeError) -> str:
    """The compiler's line on a program that does not fit: by how much it exceeds HBM."""
    said = [line.strip() for line in str(error).splitlines()]
    return next(
        (line for line in said if re.search("exceed|used", line, re.I)),
        str(error)[:160],
    )


def _missing(error: jax.errors.JaxRuntimeError) -> float:
    """Bytes that a program needs beyond HBM; 0 where the compiler does not say."""
    said = re.search(
        r"\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", str(error)
    )
    return (float(said[1]) - float(said[2])) * 2**30 if said else 0.0


def candidates(config: ConfigDict, devices: int) -> Iterator[dict[str, Any]]:
    """Changes of a config to try.

    FSDP alone comes first, then tensor and sequence parallelism in growing numbers. Frozen weights
    are on the device before they are on the host. The accumulation and rematerialisation with the
    least memory come first.
    """
    frozen = build.build(config.method).frozen
    powers = [2**i for i in range(int(math.log2(devices)) + 1)]
    splits = sorted(
        ((t, s) for t in powers for s in powers if t * s <= min(devices, 64)),
        key=lambda ts: (ts[0] * ts[1], ts[1]),
    )
    has_remat = any(
        "remat" in (role.get("model") or {}) for role in config.roles.values()
    )
    policies = ("full", "dots_no_batch") if has_remat else ("",)
    large = any(
        role.get("model") and name in frozen for name, role in config.roles.items()
    )
    places = ("device", "host") if large else ("device",)
    for (tensor, sequence), place in itertools.product(splits, places):
        fsdp = devices // (tensor * sequence)
        mesh = dict(data=1, fsdp=fsdp, sequence=sequence, tensor=tensor)
        steps = [
            n for n in (16, 8, 4, 2, 1) if config.data.batch_size % (fsdp * n) == 0
        ]
        for accumulate, remat in itertools.product(steps or [1], policies):
            yield {
                "mesh": mesh,
                "accumulate": accumulate,
                "remat": remat,
                "place": place,
            }


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
    """(the resource that limits a pattern, the config keys that change it)."""
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
