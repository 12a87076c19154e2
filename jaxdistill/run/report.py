"""The end of a run: evaluation, report.json, report.html and samples/."""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxdistill.core.types import Refused
from jaxdistill.run import records
from jaxdistill.run.checkpoint import write_json
from jaxdistill.run.page import page
from jaxdistill.run.table import number, text_table


def look(trained, step: int, *, score: bool) -> dict[str, float]:
    """Writes sample grids of a run in training to samples/.

    Returns metrics `eval/<name>@<nfe>` of the student where `score` asks for them.
    """
    evaluation = trained.experiment.evaluation
    if evaluation is None:
        return {}
    pictures = evaluation.pictures(trained)
    students = {
        title: p for title, p in pictures.items() if title.startswith("student")
    }
    _save(trained.experiment.workdir / "samples", students, f"step{step:07d}_")
    if not score:
        return {}
    scores = {}
    for row in evaluation.rows(trained):
        if row["name"] == "student":
            own = {
                key: value
                for key, value in row.items()
                if key not in ("name", "nfe")
            }
            scores |= {
                f"eval/{key}@{row['nfe']}": float(value)
                for key, value in own.items()
            }
    return scores


def write(
    trained,
    reports: Mapping[str, Any],
    *,
    seconds: float,
    config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Evaluates a finished run and writes report.json, report.html and samples/.

    Args:
      trained: experiment, networks and weights.
      reports: inner run -> its report.json. The student's rows of runs that no role starts from
        (baselines) join the table under the run's name.
      seconds: of training.
      config: what the run was trained with, as JSON; None: the experiment's config.

    Returns:
      The content of report.json.
    """
    experiment = trained.experiment
    workdir = experiment.workdir
    config = json.loads(experiment.config.to_json()) if config is None else config
    rows = []
    pictures = {}
    if experiment.evaluation is not None:
        rows = experiment.evaluation.rows(trained)
        pictures = experiment.evaluation.pictures(trained)
    used = {experiment.source(role).removeprefix("@") for role in experiment.roles}
    for name, other in reports.items():
        if name not in used:
            rows += [
                {**row, "name": name}
                for row in other["models"]
                if row["name"] == "student"
            ]
    result = {
        "config": config,
        "method": config["method"]["name"],
        "steps": experiment.settings.steps,
        "seconds": round(seconds, 1),
        "models": rows,
        "claim": claim(experiment.config.claim, rows),
    }
    _save(workdir / "samples", pictures)
    if jax.process_index() == 0:
        text = page(result, pictures, workdir)
        (workdir / "report.html").write_text(
            text, encoding="utf-8", errors="backslashreplace"
        )
    write_json(workdir / "report.json", result)
    return result


def _save(folder: Path, pictures: Mapping[str, Any], prefix: str = "") -> None:
    """Writes pictures under their titles. One process does."""
    if jax.process_index():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for title, picture in pictures.items():
        picture.save(
            folder / f"{prefix}{title.replace(', ', '_').replace(' ', '')}.png"
        )


def read(workdir: Path) -> dict[str, Any]:
    """The report.json of a finished run. Raises Refused where it is missing or incomplete."""
    return records.read_report(Path(workdir))


def summary(result: Mapping[str, Any], workdir: Path) -> str:
    """What a command prints at its end: the table, the claim, the path of the report."""
    lines = [text_table(result["models"])] if result["models"] else []
    found = result["claim"]
    if found:
        sign = "<=" if found["better"] == "lower" else ">="
        verdict = "holds" if found["holds"] else "does not hold"
        lines.append(
            f"claim: {found['metric']} of {found['model']} {sign} {found['bound']} x"
            f" {found['against']}: {number(found['value'])} against"
            f" {number(found['baseline'])}: {verdict}"
        )
    return "\n".join([*lines, f"report: {Path(workdir) / 'report.html'}"])


def claim(
    wanted: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The claim of a config with the values of the table, and whether it holds.

    It holds if value <= ratio * baseline ("lower") or value >= ratio * baseline ("higher"). The
    teacher's value is that of its first row.

    Args:
      wanted: metric, model and baseline ("name" or "name@nfe"), better, ratio.
    """
    if not wanted:
        return {}
    value = {
        key: _find(rows, wanted[key], wanted["metric"])
        for key in ("model", "baseline")
    }
    compare = {"lower": operator.le, "higher": operator.ge}[wanted["better"]]
    teacher = next(
        (row.get(wanted["metric"]) for row in rows if row["name"] == "teacher"),
        None,
    )
    return {
        "metric": wanted["metric"],
        "model": wanted["model"],
        "against": wanted["baseline"],
        "value": value["model"],
        "baseline": value["baseline"],
        "teacher": teacher,
        "ratio": value["model"] / value["baseline"] if value["baseline"] else None,
        "bound": wanted["ratio"],
        "better": wanted["better"],
        "holds": bool(compare(value["model"], wanted["ratio"] * value["baseline"])),
    }


def _find(rows, model: str, metric: str) -> float:
    name, _, nfe = model.partition("@")
    for row in rows:
        if row["name"] == name and (not nfe or str(row["nfe"]) == nfe):
            return row[metric]
    names = ", ".join(f"{row['name']}@{row['nfe']}" for row in rows)
    raise Refused(
        f"config.claim: no row {model!r} in the evaluation; rows are {names}"
    )
