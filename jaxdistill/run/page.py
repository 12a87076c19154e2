"""The page report.html: curves, sample grids, the table and the config in one file."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxdistill.run import metrics
from jaxdistill.run.table import columns, number

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1080px;
margin:2em auto;padding:0 1em;color:#1a1a1a}
table{border-collapse:collapse;margin:1em 0}
td,th{padding:.35em .9em;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}
figure{display:inline-block;margin:0 1em 1em 0;vertical-align:top}
figcaption{font-size:13px;color:#555}
figure img{max-width:100%}
img.wide{max-width:100%}
details pre{background:#f6f6f6;padding:1em;overflow:auto;font-size:12px}
""".replace("\n", "")


def page(
    result: Mapping[str, Any], pictures: Mapping[str, Any], workdir: Path
) -> str:
    """The page of a finished run. All texts of a config or an evaluation are escaped.

    Args:
      result: the content of report.json.
      pictures: title -> PIL image.
      workdir: holds the metrics of the curves.
    """
    method = escaped(result["method"])
    name = escaped(result["method"].split(":")[-1])
    seed = html.escape(str(result["config"]["seed"]))
    config = escaped(json.dumps(result["config"], indent=1))
    figures = "".join(
        _figure(title, picture) for title, picture in pictures.items()
    )
    samples = f"<h2>Samples</h2>{figures}" if figures else ""
    return "\n".join(
        [
            '<!doctype html><html lang="en"><meta charset="utf-8">'
            f"<title>{method}</title><style>{STYLE}</style>",
            f"<h1>{name}</h1>",
            f"<p>{method}, {result['steps']:,} steps, {result['seconds']:,.0f} s, seed {seed}</p>",
            f"{_table(result['models'])}{_claim(result['claim'])}",
            samples,
            f'<h2>Losses</h2><img class="wide" src="{_data(_curves(workdir))}" alt="losses">',
            f"<details><summary>Config</summary><pre>{config}</pre></details></html>",
            "",
        ]
    )


def escaped(value: Any) -> str:
    """A text or a number as HTML shows it."""
    return html.escape(value if isinstance(value, str) else number(value))


def _table(rows: list[Mapping[str, Any]]) -> str:
    names = columns(rows)
    head = "".join(f"<th>{escaped(name.replace('_', ' '))}</th>" for name in names)
    body = ""
    for row in rows:
        cells = "".join(f"<td>{escaped(row.get(name, ''))}</td>" for name in names)
        body += f"<tr>{cells}</tr>"
    return f"<table><tr>{head}</tr>{body}</table>"


def _claim(claim: Mapping[str, Any]) -> str:
    """The claim as a sentence; nothing where the config claims nothing."""
    if not claim:
        return ""
    sign = "&le;" if claim["better"] == "lower" else "&ge;"
    verdict = "holds" if claim["holds"] else "does not hold"
    metric, model, against = (
        escaped(claim[key]) for key in ("metric", "model", "against")
    )
    bound = html.escape(str(claim["bound"]))
    return (
        f"<p>Claim: {metric} of {model} {sign} {bound} &times; that of {against}:"
        f" {escaped(claim['value'])} against {escaped(claim['baseline'])}; <b>{verdict}</b>.</p>"
    )


def _figure(title: str, picture: Any) -> str:
    png = io.BytesIO()
    picture.save(png, format="PNG")
    name = escaped(title)
    image = f'<img src="{_data(png.getvalue())}" alt="{name}">'
    return f"<figure>{image}<figcaption>{name}</figcaption></figure>"


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _curves(workdir: Path) -> bytes:
    """Losses over steps as PNG, one panel for each role."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves = _losses(workdir)
    roles = list(dict.fromkeys(name.split("/")[0] for name in curves)) or [
        "student"
    ]
    size = (5 * len(roles), 3.2)
    figure, axes = pyplot.subplots(
        1, len(roles), figsize=size, squeeze=False, layout="constrained"
    )
    for axis, role in zip(axes[0], roles):
        for name, points in curves.items():
            owner, _, metric = name.partition("/")
            if owner == role:
                axis.plot(*zip(*points), label=_plain(metric), linewidth=1)
        axis.set(title=_plain(role), xlabel="step")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=7)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    pyplot.close(figure)
    return out.getvalue()


def _losses(workdir: Path) -> dict[str, list[tuple[int, float]]]:
    """Metric of a role -> its (step, value), without speeds and evaluations."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for record in metrics.read(workdir / "metrics.jsonl"):
        for name, value in record.items():
            of_role = "/" in name and not name.startswith(("perf/", "eval/"))
            if of_role and value is not None:
                curves.setdefault(name, []).append((record["step"], value))
    return curves


def _plain(text: str) -> str:
    """A text that matplotlib shows as it is: no formula, and no label that it leaves out."""
    return text.replace("$", r"\$").lstrip("_")
