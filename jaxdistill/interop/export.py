"""A finished run's student as a PyTorch folder: weights, scheduler, and a card that says how to sample."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import jax

from jaxdistill import interop
from jaxdistill.core import lora
from jaxdistill.core.bank import Bank
from jaxdistill.core.report import columns, markdown_table, number
from jaxdistill.core.types import Refused
from jaxdistill.diffusion.process import Flow
from jaxdistill.models.dit import DiT


def export(trained, folder: Path) -> None:
    """Writes the student, adapters folded in; where the method has several experts, each into `folder/<role>`, and the members
    of a bank each into a folder of its number.

    Raises Refused where a network has no PyTorch class.
    """
    experiment = trained.experiment
    report = json.loads((experiment.workdir / "report.json").read_text())
    for role in experiment.method.exports:
        net, params = trained.nets[role], trained.params[role]
        if net.adapts:
            params = lora.merge(trained.params[net.adapts], params, net.scale)
            net = trained.nets[net.adapts]
        inside = folder if len(experiment.method.exports) == 1 else folder / role
        for part, one, weights in _members(net, params):
            one, weights = experiment.method.exported(one, weights)
            interop.save(inside / part, one, weights, card=_card(experiment, one, report))


def _members(net, params):
    """(folder, net, params) of one network, or of each in a bank."""
    if not isinstance(net, Bank):
        return [("", net, params)]
    return [(str(k), net.one, jax.tree.map(lambda w: w[k], params)) for k in range(net.members)]


def _card(experiment, net, report: dict[str, Any]) -> str:
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

## Sampling

```python
{_recipe(experiment, net, steps)}
```

## Config

```json
{json.dumps(report["config"], indent=1)}
```
"""


def _recipe(experiment, net, steps: int) -> str:
    if not isinstance(net.config, DiT):
        return textwrap.dedent("""\
            from transformers import AutoModelForCausalLM
            model = AutoModelForCausalLM.from_pretrained(".")
            tokens = model.generate(prompt_tokens, max_new_tokens=64)""")
    method, denoiser = experiment.method, experiment.described("student")[1]
    if not isinstance(denoiser.native, Flow) or type(denoiser.param).__name__ != "Velocity":
        raise Refused(f"export: no sampling recipe for {type(denoiser.param).__name__} on {type(denoiser.native).__name__}")
    scale, shape = denoiser.param.time_scale, (net.config.channels, net.config.size, net.config.size)
    times = [float(t) for t in denoiser.native.time(method.process.angle(method.sampling_times(steps)))]
    return textwrap.dedent(f"""\
        import torch
        from diffusers import DiTTransformer2DModel
        model = DiTTransformer2DModel.from_pretrained(".").eval()
        labels = torch.arange({net.config.classes})
        x0 = torch.zeros(len(labels), {", ".join(map(str, shape))})
        with torch.no_grad():
            for t in {[round(t, 6) for t in times]}:
                x = (1 - t) * x0 + t * torch.randn_like(x0)
                v = model(x, timestep=torch.full((len(labels),), {scale} * t), class_labels=labels).sample
                x0 = x - t * v""")
