"""Comparisons of methods under the same conditions, on several seeds.

A suite is a config file whose variants are the methods (`configs/digits/suite.py:dmd2`), and
configs of the runs that all share (a teacher). Each run is a process, so that its peak memory can
be measured. Every method is trained twice: for an equal number of student updates, and for the
seconds that one method, the clock, took for these. Finished runs are not repeated, so that a suite
may be stopped and started again. The page has all finished runs, those of the earlier JSON file
included.
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
    # Name -> config of the runs that all start from; the suite's configs refer to them as
    # runs/<suite>/<name>_0.
    shared: dict[str, str]
    metrics: tuple[str, ...]  # columns: metrics of the models in report.json
    chart: str  # the metric of the chart, against seconds of a student update
    clock: str  # the method whose seconds all methods get in the second table
    about: str  # text on the page
    # tokens in an update: samples times their length; 0 for no text
    tokens: int = 0


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
        shared={
            "teacher": "configs/lm/carry.py:teacher",
            "start": "configs/lm/carry.py:start",
        },
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
        metrics=(
            "perplexity",
            "kl",
            "reverse_kl",
            "rollout_kl",
            "rollout_reverse_kl",
        ),
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


def run(
    name: str, only: list[str], seeds: list[int], workdir: Path, extra: list[str]
) -> Path:
    """Makes the missing runs and writes docs/results/<name>.json, .md and .png.

    Args:
        name: The suite.
        only: The methods to run; empty for all.
        seeds: The seeds.
        workdir: The folder of the runs.
        extra: Overrides for all runs: --config.key=value.

    Returns:
        The page.

    Raises:
        Refused: The suite or a method is unknown.
    """
    suite = lookup(SUITES, name, "--suite")
    variants = list(importlib.import_module(module(suite.config)).VARIANTS)
    for method in only:
        lookup(dict.fromkeys(variants), method, "--only")
    chosen = only or variants
    todo = []
    for seed in seeds:
        todo += [(seed, method, False) for method in (*suite.shared, *chosen)]
        todo += [(seed, method, True) for method in chosen if method != suite.clock]
    for seed, method, timed in tqdm(todo, desc=name, unit="run"):
        if not timed:
            _train(suite, name, method, seed, workdir, workdir, extra)
            continue
        steps = _steps_in_time(suite, method, seed, workdir)
        if steps:
            overrides = [*extra, f"--config.steps={steps}"]
            _train(suite, name, method, seed, workdir, workdir / "timed", overrides)
    return write(name, workdir, {method: i for i, method in enumerate(variants)})


def _steps_in_time(suite: Suite, method: str, seed: int, workdir: Path) -> int:
    """Engine steps of `method` in the seconds of the clock's run; 0: not known.

    They are a multiple of the steps of one student update.
    """
    runs = {r["method"]: r for r in rows(workdir) if r["seed"] == seed}
    if not {method, suite.clock} <= runs.keys():
        return 0
    own = runs[method]
    clock = runs[suite.clock]
    updates = clock["updates"] * clock["update_seconds"] / own["update_seconds"]
    if math.isnan(updates) or not own["updates"]:  # a run too short to be timed
        return 0
    return max(1, round(updates)) * (own["steps"] // own["updates"])


def module(config: str) -> str:
    """The name that a config file is imported by."""
    return config.removesuffix(".py").replace("/", ".")


def starts(suite: Suite, config, name: str, workdir: Path, seed: int) -> list[str]:
    """Overrides that replace the shared runs in a config by those of this seed."""
    runs = {
        f"runs/{name}/{run}_0": workdir / f"{run}_{seed}" for run in suite.shared
    }
    inits = {role: cfg.init for role, cfg in config.roles.items()}
    return [
        f"--config.roles.{role}.init={runs[init]}"
        for role, init in inits.items()
        if init in runs
    ]


def _train(
    suite: Suite,
    name: str,
    method: str,
    seed: int,
    workdir: Path,
    folder: Path,
    extra: list[str],
) -> None:
    """Trains one run in a folder of `folder`, from the shared runs in `workdir`.

    process.json, with the peak memory, is written when it has finished. Of a failure the last line
    of its log is printed.
    """
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
        log = folder / "log.txt"
        last = "".join(log.read_text().strip().splitlines()[-1:])
        print(f"{method}, seed {seed}: failed, see {log}: {last}", file=sys.stderr)
        return
    write_json(folder / "process.json", {"peak_bytes": usage.ru_maxrss * 1024})


def rows(workdir: Path, timed: bool = False) -> Iterator[dict]:
    """A row for each finished run: method, seed, models, student updates, seconds, memory."""
    for file in sorted(workdir.glob("*_[0-9]*/process.json")):
        method, _, seed = file.parent.name.rpartition("_")
        report = json.loads((file.parent / "report.json").read_text())
        records = metrics.read(file.parent / "metrics.jsonl")
        speeds = [
            r["perf/steps_per_second"]
            for r in records
            if "perf/steps_per_second" in r
        ][1:]
        cycle = build(current(report["config"]["method"])).cycle
        yield {
            "method": method,
            "seed": int(seed),
            "timed": timed,
            "models": report["models"],
            "steps": report["steps"],
            "updates": report["steps"] // cycle,
            "update_seconds": cycle / statistics.median(speeds)
            if speeds
            else float("nan"),
            "peak_bytes": json.loads(file.read_text())["peak_bytes"],
        }


def keep(file: Path, new: list[dict], *keys: str) -> list[dict]:
    """Adds rows to the list in a JSON file.

    Args:
        file: The file, which need not exist.
        new: The rows. They replace old ones with the same values of `keys`.
        keys: The keys that name a row.

    Returns:
        All rows, sorted by `keys`.
    """
    old = json.loads(file.read_text()) if file.exists() else []
    by_key = {tuple(row[key] for key in keys): row for row in (*old, *new)}
    kept = [by_key[key] for key in sorted(by_key)]
    write_json(file, kept)
    return kept


def write(name: str, workdir: Path, order: dict[str, int]) -> Path:
    """Writes the page, the chart and the JSON file of a suite.

    Args:
        name: The suite.
        workdir: The folder of the runs.
        order: Method -> its place in the tables.

    Returns:
        The page.
    """
    suite = SUITES[name]
    out = OUT / name
    OUT.mkdir(parents=True, exist_ok=True)
    new = [*rows(workdir), *rows(workdir / "timed", timed=True)]
    found = keep(out.with_suffix(".json"), new, "timed", "method", "seed")
    _chart(suite, [r for r in found if not r["timed"]], out.with_suffix(".png"))
    teachers = [r for r in found if r["method"] == "teacher"]
    students = sorted(
        (r for r in found if r["method"] in order), key=lambda r: order[r["method"]]
    )
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
        parts += _tables(
            f"Equal seconds, those of `{suite.clock}`", suite, teachers, timed, most
        )
    if suite.shared:
        head = (f"at {most} NFE" if most > 1 else "run", *suite.metrics, "seeds")
        table = []
        for shared in suite.shared:
            runs = [r for r in found if r["method"] == shared]
            table.append([*_scores(shared, _at(runs, most), suite), str(len(runs))])
        parts += ["## What all share", markdown_table(head, table)]
    out.with_suffix(".md").write_text("\n\n".join(parts) + "\n")
    return out.with_suffix(".md")


def _at(runs: list[dict], nfe: int) -> list[dict]:
    """The scores of the students of `runs` at `nfe` calls of the network."""
    models = [model for run in runs for model in run["models"]]
    return [m for m in models if m["nfe"] == nfe and m["name"] == "student"]


def _tables(
    title: str, suite: Suite, teachers: list[dict], students: list[dict], most: int
) -> list[str]:
    """Headings and tables, one for each number of calls of the network (NFE).

    Where the NFE are fewer than `most`, the teacher's largest, the table has a row for the teacher.
    """
    models = [model for run in students for model in run["models"]]
    steps = sorted({m["nfe"] for m in models if m["name"] == "student"})
    speed = ["tokens a second"] if suite.tokens else []
    costs = ("updates", "seconds an update", *speed, "peak MiB", "seeds")
    methods = list(dict.fromkeys(run["method"] for run in students))
    parts = []
    for nfe in steps:
        table = []
        if nfe < most and _at(teachers, nfe):
            blanks = [""] * (len(costs) - 1)
            scores = _scores("teacher", _at(teachers, nfe), suite)
            table.append([*scores, *blanks, str(len(teachers))])
        for method in methods:
            runs = [r for r in students if r["method"] == method and _at([r], nfe)]
            if runs:
                table.append(
                    _scores(method, _at(runs, nfe), suite) + _costs(runs, suite)
                )
        heading = f"## {title}, {nfe} NFE" if len(steps) > 1 else f"## {title}"
        parts += [
            heading,
            markdown_table(("method", *suite.metrics, *costs), table),
        ]
    return parts


def _scores(method: str, models: list[dict], suite: Suite) -> list[str]:
    """The first cells of a row: the method and its metrics."""
    return [
        method,
        *(_spread([m[k] for m in models if k in m]) for k in suite.metrics),
    ]


def _costs(runs: list[dict], suite: Suite) -> list[str]:
    """The last cells of a row: updates, their seconds, tokens a second, memory, number of seeds."""
    seconds = [run["update_seconds"] for run in runs]
    cells = [_spread([run["updates"] for run in runs]), _spread(seconds)]
    if suite.tokens:
        cells.append(_spread([suite.tokens / s for s in seconds]))
    cells.append(_spread([run["peak_bytes"] / 2**20 for run in runs]))
    cells.append(str(len(runs)))
    return cells


def _spread(values: list[float]) -> str:
    """The mean, and the range where the values differ."""
    if not values:
        return ""
    mean = number(float(statistics.mean(values)))
    if len(set(values)) == 1:
        return mean
    return f"{mean} ({number(float(min(values)))} to {number(float(max(values)))})"


def _chart(suite: Suite, found: list[dict], file: Path) -> None:
    """Draws the chart: the suite's metric against seconds of an update, a point for each run.

    Metrics of samplers are those at the fewest NFE. Both axes are logarithmic.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 5), layout="constrained")
    # 40 different pairs of marker and colour.
    markers = itertools.cycle("osD^vP*X")
    colors = itertools.cycle(pyplot.get_cmap("tab10").colors)
    methods = dict.fromkeys(
        r["method"] for r in found if r["method"] not in suite.shared
    )
    for method, marker, color in zip(methods, markers, colors):
        points = []
        for run in found:
            if run["method"] == method:
                student = next(m for m in run["models"] if m["name"] == "student")
                points.append((run["update_seconds"], student[suite.chart]))
        axis.scatter(*zip(*points), s=36, marker=marker, color=color, label=method)
    has_steps = len({m["nfe"] for r in found for m in r["models"]}) > 1
    teacher = []
    for run in found:
        if run["method"] == "teacher":
            model = max(run["models"], key=lambda m: m["nfe"])
            teacher.append(model[suite.chart])
    if teacher:
        label = "teacher at its most steps" if has_steps else "teacher"
        axis.axhline(
            statistics.mean(teacher), color="0.6", linestyle="--", label=label
        )
    figure.legend(loc="outside right upper", frameon=False)
    name = f"{suite.chart} at the fewest NFE" if has_steps else suite.chart
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="seconds for an update of the student",
        ylabel=name,
    )
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main(no_command, __doc__)
