"""Estimates the cost of a config on a TPU slice or on GPU nodes, without having them.

python tools/plan.py --config=FILE --topology=v5p:4x4x4 [--search] [--most=12] [--effort=0] \\
    [--stage=0] [--json=FILE] [--config.key=value ...]

Compiles each pattern of turns with the TPU compiler (pip install 'jaxdistill[tpu]'). Prints whether
it fits, bytes of a chip by role, temporaries, flops, bytes of each collective, lower bounds of the
step time, and the largest of them. With --search it tries mesh shapes, rematerialisation,
accumulation and frozen weights in host memory, with at most --most compilations, and prints the
fastest plan that fits, also after Ctrl-C. --stage=1 is the second stage of a method of several.
--effort=-1 compiles convolutions (U-Nets) about eight times as fast, since the compiler searches
less for their tiles. Plans for GPU nodes (h100:8x4) are computed from constants. Exit code 0 where
it fits, 1 where it does not.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["JAX_PLATFORMS"] = "cpu"

from jaxdistill.core.types import Refused
from launch._command import arguments, decimal, main, output, whole

KNOWN = {
    "config": "",
    "topology": "",
    "search": False,
    "json": "",
    "most": "12",
    "effort": "0",
    "stage": "0",
}


def plan(argv):
    values, config = arguments(argv, KNOWN)
    if config is None:
        raise Refused("--config=FILE is needed")
    if not values["topology"]:
        raise Refused(
            "--topology=SLICE is needed, such as v5e:4x4, v5p:4x4x4 or h100:8x4"
        )
    most = whole(values, "most", 1)
    effort = decimal(values, "effort", -1.0, 1.0)
    stage = whole(values, "stage", 0)
    file = output(values, "json")
    import jax

    from jaxdistill.run import plan as planner

    name = values["topology"]
    planner.set_effort(effort)
    planner.shorten(config, stage)
    if name.split(":")[0] in planner.GPU_KINDS:
        best = planner.gpus(config, name, stage)
    elif values["search"]:
        best = search(planner, config, name, most, stage)
    else:
        try:
            best = planner.compile_for(config, name, stage=stage)
        except jax.errors.JaxRuntimeError as error:
            print(f"{name}: DOES NOT FIT: {planner.too_large(error)}; try --search")
            sys.exit(1)
    if best is None:
        print(f"nothing that was tried fits {name}")
        sys.exit(1)
    show(planner, best)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(dataclasses.asdict(best), indent=1) + "\n")
    sys.exit(0 if best.fits else 1)


def search(planner, config, name, most, stage=0):
    """The fastest plan that fits; None where none does."""
    best = None
    try:
        for found in tried(planner.search(config, name, most, stage)):
            if found.fits and (best is None or found.seconds < best.seconds):
                best = found
    except KeyboardInterrupt:
        print(
            "interrupted; the best so far:" if best else "interrupted", flush=True
        )
    return best


def tried(candidates):
    """The plans among the candidates; others are the reasons why there is none.

    A line is printed for each plan, and for each reason that is not that of the candidate before.
    """
    last = None
    for change, found in candidates:
        mesh = " ".join(f"mesh.{axis}={n}" for axis, n in change["mesh"].items())
        what = (
            f"{mesh} accumulate={change['accumulate']} remat={change['remat'] or '-'}"
            f" frozen={change['place']}"
        )
        if isinstance(found, str):
            if found != last:
                print(f"{what}: {found}", flush=True)
            last = found
            continue
        fits = "fits" if found.fits else "does not fit"
        size = f"{found.peak / 2**30:.1f} GiB a chip"
        print(f"{what}: {fits}, {size}, step >= {found.seconds:.3g} s", flush=True)
        yield found


def show(planner, plan) -> None:
    """Prints a plan: a table of bytes by role, then each pattern of turns."""
    mesh = " x ".join(f"{axis} {n}" for axis, n in plan.mesh.items()) or "1 chip"
    fits = "fits" if plan.fits else "DOES NOT FIT"
    print(
        f"{plan.topology}: {plan.chips} chips, {mesh}; {fits}: "
        f"{_gib(plan.peak)} of {_gib(plan.hbm)} GiB a chip at the peak"
    )
    print(
        f"\n{'GiB a chip':<14}" + "".join(f"{part:>10}" for part in planner.PARTS)
    )
    for role, parts in plan.by_role.items():
        print(
            f"{role:<14}"
            + "".join(f"{_gib(parts[part]):>10}" for part in planner.PARTS)
        )
    print(f"{'batch':<14}{_gib(plan.batch):>10}")
    if plan.host:
        print(f"{'on the host':<14}{_gib(plan.host):>10}")
    for pattern in plan.patterns:
        _show_pattern(pattern, *planner.advice(plan, pattern))


def _show_pattern(p, binds: str, key: str) -> None:
    """Prints a pattern of turns, its largest lower bound and the config's key that changes it."""
    sent = ", ".join(f"{kind} {_gib(n)} GiB" for kind, n in sorted(p.sent.items()))
    print(
        f"\nturns {p.turns}: temporaries {_gib(p.temporaries)} GiB, peak {_gib(p.peak)} GiB,"
        f" model flops {p.model_flops:.4g}, compiled in {p.seconds:.0f} s"
    )
    print(f"  sent a chip: {sent or 'nothing'}")
    print(
        f"  at least: compute {p.compute:.4g} s, HBM {p.memory:.4g} s, interconnect"
        f" {p.network:.4g} s; model-flops utilisation at most {100 * p.utilisation:.0f} %"
    )
    print(f"  binds: {binds}; moved by {key}")


def _gib(size: float) -> str:
    return f"{size / 2**30:.3f}"


if __name__ == "__main__":
    main(plan)
