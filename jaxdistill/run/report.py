"""The end of a run: report.json, and report.html with curves, sample grids and the table in one
file.
"""

from __future__ import annotations

import base64
import html
import io
import json
import operator
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxdistill.core.types import Refused
from jaxdistill.run import metrics, records
from jaxdistill.run.checkpoint import write_json

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1080px;margin:2em auto;padding:0 1em;color:#1a1a1a}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.35em .9em;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}figure{display:inline-block;margin:0 1em 1em 0;vertical-align:top}
figcaption{font-size:13px;color:#555}figure img{max-width:100%}img.wide{max-width:100%}
details pre{background:#f6f6f6;padding:1em;overflow:auto;font-size:12px}"""


def number(value: Any) -> str:
    """A table cell."""
    if not isinstance(value, float):
        return (
            f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
        )
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """All keys, in the order in which they first occur."""
    return list(dict.fromkeys(k for row in rows for k in row))


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells as a table of Markdown, whatever text they hold."""
    lines = ([_cell(text) for text in cells] for cells in (head, ["---"] * len(head), *rows))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(text: str) -> str:
    """Text on one line, in which no `|` ends the cell: each has a backslash, and those before it
    are doubled.
    """
    return re.sub(r"(\\*)\|", r"\1\1\\|", " ".join(text.splitlines()))


def text_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as aligned text."""
    cells = [columns(rows)] + [[number(row.get(k, "")) for k in columns(rows)] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))])
        for line in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def look(trained, step: int, *, score: bool) -> dict[str, float]:
    """In the middle of a run: writes sample grids to samples/, and returns `eval/...` numbers where
    asked to score.
    """
    evaluation = trained.experiment.evaluation
    if evaluation is None:
        return {}
    views = {
        title: view
        for title, view in evaluation.pictures(trained).items()
        if title.startswith("student")
    }
    _save(trained.experiment.workdir / "samples", views, f"step{step:07d}_")
    rows = [r for r in evaluation.rows(trained) if r["name"] == "student"] if score else []
    return {
        f"eval/{k}@{r['nfe']}": float(v)
        for r in rows
        for k, v in r.items()
        if k not in ("name", "nfe")
    }


def write(
    trained, reports: Mapping[str, Any], *, seconds: float, config: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Evaluates, writes report.json, report.html and samples/, and returns report.json's content.

    `config` is what report.json says the run was trained with, as JSON; None: the experiment's.

    Rows of the runs inside the config that no role starts from (baselines) join the table under the
    run's name.
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
            rows += [{**row, "name": name} for row in other["models"] if row["name"] == "student"]
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
        page = _html(result, pictures, _curves(workdir))
        (workdir / "report.html").write_text(page, encoding="utf-8", errors="backslashreplace")
    write_json(workdir / "report.json", result)
    return result


def _save(folder: Path, pictures: Mapping[str, Any], prefix: str = "") -> None:
    """Writes pictures under their titles; by one process only."""
    if jax.process_index():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for title, picture in pictures.items():
        picture.save(folder / f"{prefix}{title.replace(', ', '_').replace(' ', '')}.png")


def read(workdir: Path) -> dict[str, Any]:
    """The report.json of a finished run. Raises Refused where it is missing or incomplete."""
    return records.read_report(Path(workdir))


def summary(result: Mapping[str, Any], workdir: Path) -> str:
    """What a command prints at its end: the table, the claim, where the report lies."""
    lines = [text_table(result["models"])] if result["models"] else []
    if stated := result["claim"]:
        sign = "<=" if stated["better"] == "lower" else ">="
        lines.append(
            f"claim: {stated['metric']} of {stated['model']} {sign} {stated['bound']} x"
            f" {stated['against']}: "
            f"{number(stated['value'])} against {number(stated['baseline'])}: "
            f"{'holds' if stated['holds'] else 'does not hold'}"
        )
    return "\n".join([*lines, f"report: {Path(workdir) / 'report.html'}"])


def claim(wanted: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Holds a table against `dict(metric, model, baseline, better, ratio)`; models are "name@nfe",
    teacher the first row's.

    It holds where value <= ratio * baseline ("lower") or value >= ratio * baseline ("higher").
    """
    if not wanted:
        return {}
    value = {key: _find(rows, wanted[key], wanted["metric"]) for key in ("model", "baseline")}
    compare = {"lower": operator.le, "higher": operator.ge}[wanted["better"]]
    teacher = next((row.get(wanted["metric"]) for row in rows if row["name"] == "teacher"), None)
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
    raise Refused(
        f"config.claim: no row {model!r} in the evaluation; rows are"
        f" {', '.join(r['name'] + '@' + str(r['nfe']) for r in rows)}"
    )


def _curves(workdir) -> bytes:
    """Losses over steps, one panel for each role, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves: dict[str, list] = {}
    for record in metrics.read(workdir / "metrics.jsonl"):
        for name, value in record.items():
            if "/" in name and not name.startswith(("perf/", "eval/")) and value is not None:
                curves.setdefault(name, []).append((record["step"], value))
    roles = list(dict.fromkeys(name.split("/")[0] for name in curves)) or ["student"]
    figure, axes = pyplot.subplots(
        1, len(roles), figsize=(5 * len(roles), 3.2), squeeze=False, layout="constrained"
    )
    for axis, role in zip(axes[0], roles):
        for name, points in curves.items():
            if name.startswith(f"{role}/"):
                axis.plot(*zip(*points), label=_plain(name.split("/", 1)[1]), linewidth=1)
        axis.set(title=_plain(role), xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    pyplot.close(figure)
    return out.getvalue()


def _plain(text: str) -> str:
    """Text that matplotlib takes for text: no formula, and no label that it leaves out."""
    return text.replace("$", r"\$").lstrip("_")


def _html(result, pictures, curves: bytes) -> str:
    """The page. All that comes from a config or an evaluation is text: `say` escapes it."""
    say = lambda value: html.escape(value if isinstance(value, str) else number(value))
    cell = lambda tag, value: f"<{tag}>{say(value)}</{tag}>"
    names = columns(result["models"])
    head = "".join(cell("th", name.replace("_", " ")) for name in names)
    body = "".join(
        "<tr>" + "".join(cell("td", row.get(k, "")) for k in names) + "</tr>"
        for row in result["models"]
    )
    data = lambda png: f"data:image/png;base64,{base64.b64encode(png).decode()}"
    figures = ""
    for title, picture in pictures.items():
        png = io.BytesIO()
        picture.save(png, format="PNG")
        figures += f'<figure><img src="{data(png.getvalue())}" alt="{say(title)}"><figcaption>{say(title)}</figcaption></figure>'
    stated = result["claim"]
    sentence = ""
    if stated:
        verdict = "holds" if stated["holds"] else "does not hold"
        sign = "&le;" if stated["better"] == "lower" else "&ge;"
        metric, model, against = (say(stated[key]) for key in ("metric", "model", "against"))
        bound = html.escape(str(stated["bound"]))
        value = say(stated["value"])
        baseline = say(stated["baseline"])
        sentence = f"<p>Claim: {metric} of {model} {sign} {bound} &times; that of {against}: {value} against {baseline}; "
        sentence += f"<b>{verdict}</b>.</p>"
    method = result["method"]
    seed = html.escape(str(result["config"]["seed"]))
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{say(method)}</title><style>{STYLE}</style>
<h1>{say(method.split(":")[-1])}</h1>
<p>{say(method)}, {result["steps"]:,} steps, {result["seconds"]:,.0f} s, seed {seed}</p>
<table><tr>{head}</tr>{body}</table>{sentence}
{f"<h2>Samples</h2>{figures}" if figures else ""}
<h2>Losses</h2><img class="wide" src="{data(curves)}" alt="losses">
<details><summary>Config</summary><pre>{say(json.dumps(result["config"], indent=1))}</pre></details></html>
"""
