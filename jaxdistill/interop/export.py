"""A finished run's student as a PyTorch folder: its weights, or its adapter, and a card that says how to sample."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import interop
from jaxdistill.core import lora
from jaxdistill.core.bank import Bank
from jaxdistill.core.report import columns, markdown_table, number
from jaxdistill.core.types import Refused
from jaxdistill.interop.adapter import save_adapter


def export(trained, folder: Path, *, adapter: bool = False) -> None:
    """Writes the student, adapters folded in; where the method has several experts, each into `folder/<role>`, and the members
    of a bank each into a folder of its number. With `adapter`, the adapters alone, as `save_adapter` does.

    Raises Refused where a network has no PyTorch class, or is no adapter where one is asked for.
    """
    experiment = trained.experiment
    report = json.loads((experiment.workdir / "report.json").read_text())
    for role in experiment.method.exports:
        net, params = trained.nets[role], trained.params[role]
        inside = folder if len(experiment.method.exports) == 1 else folder / role
        if adapter:
            if not net.adapts:
                raise Refused(f"export: {role} has full weights, no adapter; export it without --adapter")
            base, source = trained.nets[net.adapts], experiment.source(net.adapts)
            card = _card(experiment, role, base, report)
            save_adapter(inside, base, net, params, source=source if Path(source).is_dir() else "", card=card)
            continue
        if net.adapts:
            params = lora.merge(trained.params[net.adapts], params, net.scale)
            net = trained.nets[net.adapts]
        for part, one, weights in _members(net, params):
            one, weights = experiment.method.exported(one, weights)
            interop.save(inside / part, one, weights, card=_card(experiment, role, one, report))


def _members(net, params):
    """(folder, net, params) of one network, or of each in a bank."""
    if not isinstance(net, Bank):
        return [("", net, params)]
    return [(str(k), net.one, jax.tree.map(lambda w: w[k], params)) for k in range(net.members)]


def _card(experiment, role: str, net, report: dict[str, Any]) -> str:
    method = type(experiment.method)
    about = (__import__(method.__module__, fromlist=["_"]).__doc__ or "").strip()
    rows = [row for row in report["models"] if row["name"] in ("student", "teacher")]
    keys = columns(rows)
    table = markdown_table(keys, [[number(row.get(k, "")) for k in keys] for row in rows])
    steps = next((row["nfe"] for row in rows if row["name"] == "student"), 1)
    return f"""---
tags: [jaxdistill, distillation, {method.__name__.lower()}]
---
# {method.__name__} student

{about}

Trained with `jaxdistill`: `{report["config"]["method"]["name"]}`, {report["steps"]} steps, seed {report["config"]["seed"]}.
NFE: {steps}.

{table}

## Use

{_recipe(experiment, role, net, steps)}

## Config

```json
{json.dumps(report["config"], indent=1)}
```
"""


def _recipe(experiment, role: str, net, steps: int) -> str:
    """What the card says about use: Python that runs, or in words why there is none."""
    family, method = interop.family_of(net), experiment.method
    lines = [f"from {family.library} import {family.name}", f'model = {family.name}.from_pretrained(".").eval()']
    denoiser = experiment.described(role)[1]
    if denoiser is None:
        return _python(lines + [f"output = {family.call}"] * bool(family.call))
    try:
        plan = chain(method, denoiser, steps)
    except Refused as error:
        return f"{error}; `{type(method).__module__}` has it.\n\n{_python(lines)}"
    if len(method.exports) > 1 or not family.call:
        why = f"one of {len(method.exports)} experts" if len(method.exports) > 1 else f"x0 at {steps} times"
        return f"{role}: {why}; `{type(method).__module__}` says which network serves which time.\n\n{_python(lines)}"
    *grid, channels = experiment.data.batch(0, slice(None, 1))["x"].shape[1:]
    known = {field.name: getattr(net.config, field.name) for field in dataclasses.fields(net.config)}
    call = family.call.format(x="scale * x", t="torch.full((len(x),), t)")
    again = "x = alpha * x0 + sigma * " + ("torch.randn_like(x0)" if method.renoises else "eps")
    table = ",\n    ".join(f"({', '.join(f'{v:.7g}' for v in step)})" for step in plan)
    return _python(
        [
            "import torch",
            *lines,
            family.given.format(**known),
            "# the network's time and the scale of its input; x0 = p x + q output; the state's alpha and sigma",
            f"steps = [\n    {table},\n]",
            f"x = {_start(method, denoiser, steps):.7g} * torch.randn(len(cond), {', '.join(map(str, (channels, *grid)))})",
            "with torch.no_grad():",
            "    for i, (t, scale, p, q, alpha, sigma) in enumerate(steps):",
            "        if i:",
            f"            {again}",
            f"        x0 = p * x + q * {call}",
            *([] if method.renoises else ["        eps = (x - alpha * x0) / sigma"]),
        ]
    )


def _python(lines: list[str]) -> str:
    return "```python\n" + "\n".join(lines) + "\n```"


def chain(method, denoiser, steps: int) -> np.ndarray:
    """The student's chain in the network's own coordinates, float [steps, 6]: at each time, what the network is fed as its time,
    the scale of its input, the p and q of x0 = p x + q output, and the state's alpha and sigma.

    Raises Refused where `method.sample` is no chain of x0 at fixed times.
    """
    if denoiser.fold or steps < 1:
        raise Refused(f"{type(method).__name__}: its network is fed two times")
    native, one = denoiser.native, jnp.ones(1)
    t = denoiser.own_time(method.process, method.sampling_times(steps))

    def row(t):
        scale, fed = denoiser.param.inputs(native, one, t[None])
        p, q = (denoiser.param.pred(native, raw, x, t[None]).x0 for x, raw in ((one, 0 * one), (0 * one, one)))
        return jnp.stack([fed, scale, p, q, *native.alpha_sigma(t[None])])[:, 0]

    return np.asarray(jax.vmap(row)(t), np.float64)


def _start(method, denoiser, steps: int) -> float:
    """The first state for unit noise, in the network's own coordinates: it is seen as one of the first time."""
    state = method.process.start(method.initial(jnp.ones((1, 1))))[0, 0]
    return float(state * denoiser.own_scale(method.process, method.sampling_times(steps)[0]))
