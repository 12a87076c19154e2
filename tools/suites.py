"""Fair tables: every method of a suite config under the same conditions, on several seeds, in
processes of their own.

A suite is a config file whose variants are the methods (`configs/digits/suite.py:dmd2`) and a
config that trains the teacher that all share. Each run is a process, so that its peak memory is its
own. Every method trains twice: for the same number of student updates, and for the seconds that one
of them, the clock, took for those. Finished runs are kept: a suite may be stopped and started
again, and the page is written from whatever has finished, here or in its last JSON file.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tqdm import tqdm

from jaxdistill.core.build import build, current
from jaxdistill.core.types import lookup
from jaxdistill.run import metrics
from jaxdistill.run.checkpoint import write_json
from jaxdistill.run.table import markdown_table, number
from launch._command import load_config, main, no_command

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs/results"


@dataclasses.dataclass(frozen=True)
class Suite:
    """What is compared, and how the page shows it."""

    title: str
    config: str  # a file with VARIANTS
    shared: dict[
        str, str
    ]  # run that all start from -> its config; the configs call it runs/<suite>/<run>_0
    metrics: tuple[str, ...]  # columns, of report.json's rows
    chart: str  # the metric that is drawn, against seconds for an update of the student
    clock: str  # the method whose seconds all get in the second table
    about: str
    tokens: int = 0  # rows times their length, in an update; 0: no text


SUITES = {
    "digits": Suite(
        title="Distillation methods on the digits",
        config="configs/digits/suite.py",
        shared={"teacher": "configs/digits/teacher.py"},
        metrics=("frechet", "precision", "recall", "diversity", "accuracy"),
        chart="frechet",
        clock="dmd2",
        about="""8x8 digits, a class-conditional DiT of 0.33 M weights as teacher and student, the
same number of student updates for every method. Fréchet distance in the features of a small
classifier (lower is better), precision and recall of its manifold, mean distance of two samples of
one label (diversity), share of samples that an independent classifier reads as the label asked for
(accuracy). Distribution matching trains a student for four steps at once here (`uni_instruct` for
one) and five updates of its critics to one of the student, so that its updates cost more.
Progressive distillation was made for one step, and is scored at more too. Seconds are those of
steps: the pairs that `reflow` lets its teacher write beforehand are not counted. Peak memory is
the process's, compilation included. sCM's paper asks for a slow embedding of the time, and this
teacher reads 1000 t: with more steps its student gets worse. From one that reads t
(`--config.roles.student.denoiser.param.time_scale=1.0`, seed 0, .421 at 50 steps) sCM comes to
1.17 at one step in 400 updates, and to .485 in equal seconds. `uni_instruct` was measured before
its GAN waited for the divergence (`reverse_until`).""",
    ),
    "lm": Suite(
        title="Distillation methods on additions",
        config="configs/lm/suite.py",
        shared={"teacher": "configs/lm/carry.py:teacher", "start": "configs/lm/carry.py:start"},
        metrics=("perplexity", "kl", "reverse_kl", "accuracy"),
        chart="perplexity",
        clock="gkd",
        tokens=64 * 10,
        about="""Two-digit additions, a Llama of 64 channels that was trained for 2,000 steps as
teacher, one of 32 trained for 300 as the start of every student; 64 responses a step, 1,000 steps.
Held-out perplexity of the right answers, KL divergence from the teacher on them in both
directions, share of sums that are right when the student decodes greedily (accuracy; it is not
what `grpo` and `rlad` train, the share of right samples). `sft` and `grpo` have no teacher. `grpo`
and `rlad` write eight answers to each of eight prompts, see a reward of 1 for a right one, make
four updates of each batch, and have a learning rate of 3e-4 where the others have 1e-3. Seconds
are those of steps: answers that `sequence_kd` and `paced` let the networks write beforehand are
not counted.""",
    ),
    "svamp": Suite(
        title="Reasons of a large model on arithmetic word problems",
        config="configs/lm/svamp_suite.py",
        shared={},
        metrics=("perplexity", "accuracy"),
        chart="perplexity",
        clock="step_by_step",
        about="""SVAMP and the rationales of PaLM 540B, in bytes; a Llama of 0.14 M weights from
nothing, 8 problems a step, 400 steps. Held-out perplexity of the data's equations, and the share
of problems where the equation that the student writes has the right value (accuracy). `labels` and
`step_by_step` learn the data's equations, `palm_labels` and `palm_step_by_step` the teacher's:
three quarters are right, and all are written in another way, so that their perplexity on the
data's says nothing. The file is `--config.data.path`.""",
    ),
    "text": Suite(
        title="Distillation methods on tiny Shakespeare",
        config="configs/lm/text_suite.py",
        shared={
            "teacher": "configs/lm/text_suite.py:teacher",
            "start": "configs/lm/text_suite.py:start",
        },
        metrics=("perplexity", "kl", "reverse_kl", "rollout_kl", "rollout_reverse_kl"),
        chart="perplexity",
        clock="gkd",
        tokens=16 * 64,
        about="""A byte-level Llama of 1.0 M weights that was trained for 800 steps as teacher, one
of 0.12 M trained for 300 as the start of every student; 16 rows of 64 bytes a step, 400 steps.
Held-out perplexity of a byte, KL divergence from the teacher on held-out text and on what the
student goes on with itself (rollout), in both directions. The file is `--config.data.path`, here
tiny Shakespeare (1.1 MB). Nothing can be right or wrong here: `paced`, `grpo` and `rlad` are left
out.""",
    ),
}


def run(name: str, only: list[str], seeds: list[int], workdir: Path, extra: list[str]) -> Path:
    """Trains what is missing, writes docs/results/<name>.json, .md and .png; returns the page.
    Raises Refused.
    """
    suite = lookup(SUITES, name, "--suite")
    variants = list(importlib.import_module(module(suite.config)).VARIANTS)
    for method in only:
        lookup(dict.fromkeys(variants), method, "--only")
    chosen = only or variants
    passes = ((False, [*suite.shared, *chosen]), (True, [m for m in chosen if m != suite.clock]))
    todo = [
        (seed, method, timed) for seed in seeds for timed, methods in passes for method in methods
    ]
    for seed, method, timed in tqdm(todo, desc=name, unit="run"):
        if not timed:
            _train(suite, name, method, seed, workdir, workdir, extra)
        elif steps := _steps_in_time(suite, method, seed, workdir):
            _train(
                suite,
                name,
                method,
                seed,
                workdir,
                workdir / "timed",
                [*extra, f"--config.steps={steps}"],
            )
    return write(name, workdir, {m: variants.index(m) for m in variants})


def _steps_in_time(suite: Suite, method: str, seed: int, workdir: Path) -> int:
    """Steps of the engine that take `method` the seconds of the clock's run, whole updates of the
    student; 0: not known.
    """
    runs = {r["method"]: r for r in rows(workdir) if r["seed"] == seed}
    if not {method, suite.clock} <= runs.keys():
        return 0
    mine = runs[method]
    clock = runs[suite.clock]
    updates = clock["updates"] * clock["update_seconds"] / mine["update_seconds"]
    if math.isnan(updates) or not mine["updates"]:  # too short to have been timed
        return 0
    return max(1, round(updates)) * (mine["steps"] // mine["updates"])


def module(config: str) -> str:
    """The name that a config file is imported by."""
    return config.removesuffix(".py").replace("/", ".")


def starts(suite: Suite, config, name: str, workdir: Path, seed: int) -> list[str]:
    """Overrides that give every role its shared run of this seed."""
    runs = {f"runs/{name}/{run}_0": workdir / f"{run}_{seed}" for run in suite.shared}
    return [
        f"--config.roles.{role}.init={runs[cfg.init]}"
        for role, cfg in config.roles.items()
        if cfg.init in runs
    ]


def _train(
    suite: Suite, name: str, method: str, seed: int, workdir: Path, folder: Path, extra: list[str]
) -> None:
    """One run into `folder`, from the shared runs in `workdir`."""
    folder = folder / f"{method}_{seed}"
    if (folder / "process.json").exists():
        return
    config = suite.shared.get(method) or f"{suite.config}:{method}"
    command = [
        sys.executable,
        "-m",
        "launch.train",
        f"--config={config}",
        f"--workdir={folder}",
        f"--config.seed={seed}",
        *extra,
    ]
    command += starts(suite, load_config(str(ROOT / config)), name, workdir, seed)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("w") as log:
        child = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except KeyboardInterrupt:
            child.wait()
            raise
    if os.waitstatus_to_exitcode(status) != 0:
        last = (folder / "log.txt").read_text().strip().splitlines()[-1:]
        print(
            f"{method}, seed {seed}: failed, see {folder / 'log.txt'}: {''.join(last)}",
            file=sys.stderr,
        )
        return
    write_json(folder / "process.json", {"peak_bytes": usage.ru_maxrss * 1024})


def rows(workdir: Path, timed: bool = False) -> Iterator[dict]:
    """One for each finished run: method, seed, its models, updates of the student, seconds for one,
    peak memory.
    """
    for file in sorted(workdir.glob("*_[0-9]*/process.json")):
        method, _, seed = file.parent.name.rpartition("_")
        report = json.loads((file.parent / "report.json").read_text())
        records = metrics.read(file.parent / "metrics.jsonl")
        speeds = [r["perf/steps_per_second"] for r in records if "perf/steps_per_second" in r][1:]
        every = build(current(report["config"]["method"])).cycle
        yield {
            "method": method,
            "seed": int(seed),
            "timed": timed,
            "models": report["models"],
            "steps": report["steps"],
            "updates": report["steps"] // every,
            "update_seconds": every / statistics.median(speeds) if speeds else float("nan"),
            "peak_bytes": json.loads(file.read_text())["peak_bytes"],
        }


def keep(file: Path, new: list[dict], *keys: str) -> list[dict]:
    """Puts the new rows into `file`, a table's, in the places of those with the same `keys`;
    returns all, sorted by these.
    """
    key = lambda row: tuple(row[k] for k in keys)
    old = json.loads(file.read_text()) if file.exists() else []
    every = [
        row
        for _, row in sorted(
            ({key(row): row for row in old} | {key(row): row for row in new}).items()
        )
    ]
    write_json(file, every)
    return every


def write(name: str, workdir: Path, order: dict[str, int]) -> Path:
    """The page, the chart and the numbers behind both."""
    suite = SUITES[name]
    out = OUT / name
    OUT.mkdir(parents=True, exist_ok=True)
    found = keep(
        out.with_suffix(".json"),
        [*rows(workdir), *rows(workdir / "timed", timed=True)],
        "timed",
        "method",
        "seed",
    )
    _chart(suite, [r for r in found if not r["timed"]], out.with_suffix(".png"))
    teachers = [r for r in found if r["method"] == "teacher"]
    students = sorted((r for r in found if r["method"] in order), key=lambda r: order[r["method"]])
    most = max((m["nfe"] for r in teachers for m in r["models"]), default=0)
    equal = [r for r in students if not r["timed"]]
    timed = [r for r in students if r["timed"] or r["method"] == suite.clock]
    parts = [
        f"# {suite.title}",
        f"`python tools/reproduce.py --suite={name}` writes this page.",
        suite.about,
        f"![{suite.chart} against seconds]({name}.png)",
        "Means over seeds, then the range where there are several.",
    ]
    parts += _tables("Equal updates", suite, teachers, equal, most)
    if len(timed) > len({r["seed"] for r in timed}):
        parts += _tables(f"Equal seconds, those of `{suite.clock}`", suite, teachers, timed, most)
    head = (f"at {most} NFE" if most > 1 else "run", *suite.metrics, "seeds")
    shared = {run: [r for r in found if r["method"] == run] for run in suite.shared}
    if shared:
        table = [
            [*_scores(name, _at(runs, most), suite), str(len(runs))]
            for name, runs in shared.items()
        ]
        parts += ["## What all share", markdown_table(head, table)]
    out.with_suffix(".md").write_text("\n\n".join(parts) + "\n")
    return out.with_suffix(".md")


def _at(runs: list[dict], nfe: int) -> list[dict]:
    """Their students' scores at so many calls of the network."""
    return [m for r in runs for m in r["models"] if m["nfe"] == nfe and m["name"] == "student"]


def _tables(
    title: str, suite: Suite, teachers: list[dict], students: list[dict], most: int
) -> list[str]:
    """One for each number of calls of the network; the teacher's row where it takes fewer than its
    most.
    """
    steps = sorted({m["nfe"] for r in students for m in r["models"] if m["name"] == "student"})
    costs = (
        "updates",
        "seconds an update",
        *(["tokens a second"] if suite.tokens else []),
        "peak MiB",
        "seeds",
    )
    parts = []
    for nfe in steps:
        table = []
        if nfe < most and _at(teachers, nfe):
            table.append(
                _scores("teacher", _at(teachers, nfe), suite)
                + [""] * (len(costs) - 1)
                + [str(len(teachers))]
            )
        for method in dict.fromkeys(r["method"] for r in students):
            runs = [r for r in students if r["method"] == method and _at([r], nfe)]
            if runs:
                table.append(_scores(method, _at(runs, nfe), suite) + _costs(runs, suite))
        parts += [
            f"## {title}" + (f", {nfe} NFE" if len(steps) > 1 else ""),
            markdown_table(("method", *suite.metrics, *costs), table),
        ]
    return parts


def _scores(method: str, models: list[dict], suite: Suite) -> list[str]:
    return [method, *(_spread([m[k] for m in models if k in m]) for k in suite.metrics)]


def _costs(runs: list[dict], suite: Suite) -> list[str]:
    seconds = [r["update_seconds"] for r in runs]
    return [
        _spread([r["updates"] for r in runs]),
        _spread(seconds),
        *([_spread([suite.tokens / s for s in seconds])] if suite.tokens else []),
        _spread([r["peak_bytes"] / 2**20 for r in runs]),
        str(len(runs)),
    ]


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    mean = number(float(statistics.mean(values)))
    return (
        mean
        if len(set(values)) == 1
        else f"{mean} ({number(float(min(values)))} to {number(float(max(values)))})"
    )


def _chart(suite: Suite, found: list[dict], file: Path) -> None:
    """The chart's metric (samplers: at the fewest NFE) against seconds an update, a point for each
    run, both axes logarithmic.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 5), layout="constrained")
    marks = zip(
        itertools.cycle("osD^vP*X"), itertools.cycle(pyplot.get_cmap("tab10").colors)
    )  # 40 pairs before one comes again
    for method, (marker, color) in zip(
        dict.fromkeys(r["method"] for r in found if r["method"] not in suite.shared), marks
    ):
        mine = [r for r in found if r["method"] == method]
        points = [
            (
                r["update_seconds"],
                next(m[suite.chart] for m in r["models"] if m["name"] == "student"),
            )
            for r in mine
        ]
        axis.scatter(*zip(*points), s=36, marker=marker, color=color, label=method)
    steps = len({m["nfe"] for r in found for m in r["models"]}) > 1
    teacher = [
        max(r["models"], key=lambda m: m["nfe"])[suite.chart]
        for r in found
        if r["method"] == "teacher"
    ]
    if teacher:
        axis.axhline(
            statistics.mean(teacher),
            color="0.6",
            linestyle="--",
            label="teacher at its most steps" if steps else "teacher",
        )
    figure.legend(loc="outside right upper", frameon=False)
    name = f"{suite.chart} at the fewest NFE" if steps else suite.chart
    axis.set(xscale="log", yscale="log", xlabel="seconds for an update of the student", ylabel=name)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main(no_command, __doc__)
