"""Writes docs/results/recipes.md: the cost of every recipe on a TPU slice, compiled without one.

python tools/recipes.py [--only=dmd2,kd] [--stage=0] [--topology=v5p:4x4x4]

--stage=1 compiles the second stage of methods of several, and adds a row for it. Each recipe is
compiled in a process of its own, with data of the shapes of its records. Results are kept in
docs/results/recipes.json: recipes that are in it are compiled again only where --only names them.
U-Nets take minutes each.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["JAX_PLATFORMS"] = "cpu"

from tqdm import tqdm

from jaxdistill.core.types import Refused, lookup
from jaxdistill.run.checkpoint import write_json
from jaxdistill.run.table import markdown_table
from launch._command import arguments, main, whole
from tools import stand_ins

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "configs/recipes"
VARIANTS = ("flash_dmd:rl",)  # variants of recipes that have a method of their own
NAMES = sorted([*(path.stem for path in FOLDER.glob("[!_]*.py")), *VARIANTS])
RECIPES = {name: FOLDER / f"{name.partition(':')[0]}.py" for name in NAMES}
USUAL = "v5p:2x2x4"
# Slices of recipes whose batch, caches or weights need another.
SLICES = {
    "ddk": "v5p:2x2x2",
    "grpo": "v5p:2x4x4",
    "phased_dmd": "v5p:2x4x4",
}
# the size of the mesh axis `tensor` where it is not 1
TENSOR = {
    "grpo": 2,
    "sequence_kd": 4,
}
# Of the compiler's search for tiles; memory and traffic of a program hardly depend on it.
EFFORT = -1.0
PAGE = """# Recipes, compiled for TPU slices

`python tools/recipes.py` writes this page: every recipe's train step at its true sizes, weights
over `fsdp`, compiled by the TPU compiler on a CPU (libtpu, effort {effort:g}). GiB are those of one
chip: at the peak of the largest pattern of turns, of its state by role, and of its temporaries.
Seconds of a step are lower bounds, each as if the others cost nothing; MFU is what the largest of
them leaves of the chips' peak. Samples a step are the config's batch.

"""


def recipes(argv):
    values, _ = arguments(
        argv, {"only": "", "topology": "", "one": "", "stage": "0"}
    )
    stage = whole(values, "stage", 0)
    if values["one"]:
        print(json.dumps(compiled(values["one"], values["topology"], stage)))
        return
    only = [n for n in values["only"].split(",") if n]
    for name in only:
        lookup(RECIPES, name, "--only")
    file = ROOT / "docs/results/recipes.json"
    kept = json.loads(file.read_text()) if file.exists() else {}
    named = {name: f"{name}, stage {stage}" if stage else name for name in RECIPES}
    todo = only or [n for n in RECIPES if named[n] not in kept]
    for name in tqdm(todo, desc="recipes", unit="recipe"):
        topology = values["topology"] or SLICES.get(name, USUAL)
        command = [
            sys.executable,
            __file__,
            f"--one={name}",
            f"--topology={topology}",
            f"--stage={stage}",
        ]
        child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if child.returncode:
            last = child.stderr.strip().splitlines()[-1:] or [
                f"exit code {child.returncode}"
            ]
            print(f"{name}: {last[0]}", file=sys.stderr)
            continue
        kept[named[name]] = json.loads(child.stdout.strip().splitlines()[-1])
        write_json(file, dict(sorted(kept.items())))
        file.with_suffix(".md").write_text(
            PAGE.format(effort=EFFORT) + page(kept) + "\n"
        )
    print(file.with_suffix(".md"))


def compiled(name: str, topology: str, stage: int = 0) -> dict:
    """The plan of a stage of a recipe on a slice, as JSON. Raises Refused where it does not fit."""
    import jax

    from jaxdistill.run import plan

    plan.set_effort(EFFORT)
    with tempfile.TemporaryDirectory() as folder:
        config = stand_ins.load(f"recipes.{name}", stand_ins.write(Path(folder)))
        plan.shorten(config, stage)
        with config.unlocked():
            config.mesh = {
                **config.mesh,
                "data": 1,
                "fsdp": -1,
                "tensor": TENSOR.get(name, 1),
            }
        try:
            found = plan.compile_for(config, topology, stage=stage)
        except jax.errors.JaxRuntimeError as error:
            raise Refused(
                f"{topology} does not hold it: {plan.too_large(error)}"
            ) from error
    if not found.fits:
        raise Refused(
            f"{topology} does not hold it: {found.peak / 2**30:.1f} GiB a chip"
        )
    return {
        **dataclasses.asdict(found),
        "peak": found.peak,
        "batch_size": config.data.batch_size,
    }


def page(kept: dict[str, dict]) -> str:
    """The table of plans, in Markdown."""
    rows = [_line(name, plan) for name, plan in sorted(kept.items())]
    head = (
        "recipe",
        "slice",
        "samples",
        "GiB a chip at the peak",
        "state",
        "temporaries",
        "model flops",
        "at least: compute / HBM / interconnect, s",
        "MFU at most",
        "compiled in",
    )
    return markdown_table(head, rows)


def _line(name: str, plan: dict) -> list[str]:
    """The cells of one recipe. Figures of a step are those of its largest pattern of turns."""
    largest = max(plan["patterns"], key=lambda p: p["peak"])
    state = {role: sum(parts.values()) for role, parts in plan["by_role"].items()}
    compiling = sum(p["seconds"] for p in plan["patterns"])
    return [
        f"[`{name}`](../../configs/recipes/{RECIPES[name].name})",
        plan["topology"],
        str(plan["batch_size"]),
        f"{_gib(plan['peak'])} of {plan['hbm'] / 2**30:.0f}",
        ", ".join(f"{role} {_gib(n)}" for role, n in state.items() if n),
        _gib(largest["temporaries"]),
        f"{largest['model_flops']:.3g}",
        " / ".join(f"{largest[k]:.2g}" for k in ("compute", "memory", "network")),
        f"{100 * largest['utilisation']:.0f} %",
        f"{compiling:.0f} s",
    ]


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


if __name__ == "__main__":
    main(recipes)
