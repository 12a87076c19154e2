"""A finished run's student as a PyTorch folder: its weights or its adapter, its scheduler, and a
card that says how to sample.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxdistill import interop
from jaxdistill.core import lora
from jaxdistill.core.bank import Bank
from jaxdistill.core.net import Net
from jaxdistill.core.types import Method, Refused
from jaxdistill.interop.adapter import check_adapter, save_adapter
from jaxdistill.interop.chain import SCHEDULER, Scheduler, chain, scheduler, start
from jaxdistill.interop.folder import replaceable, whole_folder
from jaxdistill.interop.tables import Family, literal
from jaxdistill.interop.tokenizer import tokenizer_files, with_special_tokens
from jaxdistill.run.experiment import Experiment
from jaxdistill.run.report import read
from jaxdistill.run.table import columns, markdown_table, number


def check(experiment: Experiment, folder: Path, *, adapter: bool = False) -> None:
    """Raises Refused where `export` to `folder` would, before any weight is read: where nothing can
    be written there, the run has not finished, or a network has no PyTorch class or no adapter that
    leaves as one.
    """
    replaceable(folder)
    read(experiment.workdir)
    method = experiment.method
    for role in method.exports:
        net = experiment.nets[role]
        if adapter:
            _check_adapts(role, net)
            check_adapter(folder, experiment.nets[net.adapts], net)
        elif type(method).exported is Method.exported:
            interop.family_of(
                experiment.nets[net.adapts] if net.adapts else getattr(net, "one", net)
            )


def _check_adapts(role: str, net: Net) -> None:
    if not net.adapts:
        raise Refused(f"export: {role} has full weights, no adapter; export it without --adapter")


def export(trained, folder: Path, *, adapter: bool = False) -> None:
    """Writes the student, adapters folded in; where the method has several experts, each into
    `folder/<role>`, and the members of a bank each into a folder of its number. With `adapter`, the
    adapters alone, as `save_adapter` does.

    A denoiser of diffusers has `scheduler/scheduler_config.json` beside it, where one of its
    schedulers steps as `method.sample` does; a language model the data's end token, and its
    tokenizer where there is one. The folder appears when all of it is complete, in the place of an
    earlier export alone. Raises Refused as `check` does.
    """
    experiment = trained.experiment
    roles = trained.experiment.method.exports
    check(experiment, folder, adapter=adapter)
    report = read(experiment.workdir)
    alone = len(roles) == 1 and not isinstance(trained.nets[roles[0]], Bank)
    with contextlib.nullcontext(Path(folder)) if alone else whole_folder(folder) as inside:
        for role in roles:
            place = inside if len(roles) == 1 else inside / role
            (_export_adapter if adapter else _export_whole)(trained, report, role, place)


def _export_adapter(trained, report: Mapping[str, Any], role: str, folder: Path) -> None:
    experiment = trained.experiment
    net = trained.nets[role]
    _check_adapts(role, net)
    base = trained.nets[net.adapts]
    source = experiment.source(net.adapts)
    source = (
        source
        if (Path(source) / "config.json").is_file() and not (Path(source) / "stages").exists()
        else ""
    )
    student = Student(
        experiment, report, role, base, _adapted(interop.family_of(base), source), base=net.adapts
    )
    save_adapter(
        folder,
        base,
        net,
        trained.params[role],
        source=source,
        card=student.card,
        beside=student.beside,
    )


def _export_whole(trained, report: Mapping[str, Any], role: str, folder: Path) -> None:
    experiment = trained.experiment
    net = trained.nets[role]
    params = trained.params[role]
    if net.adapts:
        params = lora.merge(trained.params[net.adapts], params, net.scale)
        net = trained.nets[net.adapts]
    for part, one, weights in _members(net, params):
        one, weights = experiment.method.exported(one, weights)
        one = dataclasses.replace(
            one, config=with_special_tokens(one.config, experiment.data.texts)
        )
        member = f"{part}: one of {net.members}" if part else ""
        student = Student(
            experiment, report, role, one, _loaded(interop.family_of(one)), member=member
        )
        interop.save(folder / part, one, weights, card=student.card, beside=student.beside)


def _members(net, params):
    """(folder, net, params) of one network, or of each in a bank."""
    if not isinstance(net, Bank):
        return [("", net, params)]
    return [(str(k), net.one, jax.tree.map(lambda w: w[k], params)) for k in range(net.members)]


def _loaded(family: Family) -> list[str]:
    """Python that makes `model` of the folder."""
    if family.loads:
        return [family.loads]
    return [
        f"from {family.library} import {family.name}",
        f'model = {family.name}.from_pretrained(".").eval()',
    ]


def _adapted(family: Family, source: str) -> list[str]:
    """Python that makes `model` of the base at `source` and the adapter in the folder."""
    base = repr(source) if source else '"BASE"'  # to be filled in
    lines = [
        f"from {family.library} import {family.name}",
        f"model = {family.name}.from_pretrained({base}).eval()",
    ]
    if family.library == "transformers":
        return [
            "from peft import PeftModel",
            *lines,
            'model = PeftModel.from_pretrained(model, ".").eval()',
        ]
    how = f'prefix="{family.component}", weight_name="pytorch_lora_weights.safetensors"'
    return [*lines, f'model.load_lora_adapter(".", {how})']


@dataclasses.dataclass(frozen=True)
class Student:
    """What is written beside one folder's weights. `net` is what diffusers or transformers calls:
    of an adapter, the base.
    """

    experiment: Experiment
    report: dict[str, Any]
    role: str
    net: Net
    model: list[str]  # Python that loads it
    member: str = ""  # which of a bank it is: "1: one of 4"
    base: str = ""  # of an adapter, the role whose weights it goes on

    @property
    def family(self) -> Family:
        return interop.family_of(self.net)

    @property
    def denoiser(self) -> Any:
        """How the network is read; None where it is none. An adapter's is that of the network that
        it goes on.
        """
        lora = self.experiment.roles[self.role].lora
        return self.experiment.described(lora.base if lora.rank else self.role)[1]

    @property
    def steps(self) -> int:
        """Evaluations at which the run's evaluation samples it."""
        return next((row["nfe"] for row in self.report["models"] if row["name"] == "student"), 1)

    @functools.cached_property
    def scheduler(self) -> Scheduler | str:
        """Or in words why there is none."""
        denoiser = self.denoiser
        if denoiser is None or self.family.library != "diffusers":
            return ""
        try:
            return scheduler(self.experiment.method, denoiser, self.steps)
        except Refused as error:
            return str(error)

    @property
    def beside(self) -> dict[str, Any]:
        """Files by name: JSON objects, or what is copied."""
        found = self.scheduler
        return {SCHEDULER: found.config} if isinstance(found, Scheduler) else dict(self.tokenizer)

    @property
    def reads_text(self) -> bool:
        return self.family.library == "transformers" and hasattr(self.net.config, "vocab")

    @functools.cached_property
    def tokenizer(self) -> Mapping[str, Any]:
        """Of a language model, the files that turn text into its ids, where there are any."""
        return tokenizer_files(self.experiment, self.role) if self.reads_text else {}

    @property
    def card(self) -> str:
        method = type(self.experiment.method)
        report = self.report
        about = (__import__(method.__module__, fromlist=["_"]).__doc__ or "").strip()
        rows = [row for row in report["models"] if row["name"] in ("student", "teacher")]
        keys = columns(rows)
        config = json.dumps(report["config"], indent=1).replace(
            "`", r"\u0060"
        )  # which ends no fence
        table = markdown_table(keys, [[number(row.get(k, "")) for k in keys] for row in rows])
        return f"""---
tags: [jaxdistill, distillation, {method.__name__.lower()}]
---
# {method.__name__} student

{about}

Trained with `jaxdistill`: `{report["config"]["method"]["name"]}`, {report["steps"]} steps, seed {report["config"]["seed"]}.
NFE: {self.steps}.

{table}

## Use

{self.use}

## Config

```json
{config}
```
"""

    @property
    def use(self) -> str:
        """Python that runs, or in words why there is none."""
        call = self.family.call
        method = self.experiment.method
        found = self.scheduler
        denoiser = self.denoiser
        if denoiser is None:
            return (
                self._text()
                if self.reads_text
                else _python([*self.model, *[f"output = {call}"] * bool(call)])
            )
        try:
            plan = chain(method, denoiser, self.steps)
        except Refused as error:
            return f"{self._whose}{error}; `{type(method).__module__}` has it.\n\n{_python(self.model)}"
        ready = _ready(found) if isinstance(found, Scheduler) else []
        if len(method.exports) > 1 or not call:
            why = (
                f"one of {len(method.exports)} experts"
                if len(method.exports) > 1
                else f"x0 at {self.steps} times"
            )
            where = f"{self.role}: {why}; `{type(method).__module__}` says which network serves which time."
            return f"{self._whose}{where}\n\n{_python([*self.model, *ready])}"
        return self._whose + self._sampled(plan, ready, found)

    @property
    def _whose(self) -> str:
        """What has to be known of a network that is a part of something."""
        if self.member:
            module = type(self.experiment.method).__module__
            return f"{self.role} {self.member} members; `{module}` says which network serves which condition.\n\n"
        if self.base and '"BASE"' in "".join(self.model):
            return f"An adapter: `BASE` is the folder of the network that it goes on, `{self.base}`, exported for PyTorch.\n\n"
        return ""

    def _sampled(self, plan: np.ndarray, ready: list[str], found: Scheduler | str) -> str:
        """Python that samples by the chain `plan`, or by the scheduler that `ready` makes."""
        method = self.experiment.method
        denoiser = self.denoiser
        if ready:
            return _python(
                ["import torch", *self.model, *ready, *self._stepped(found)]
            ) + self._in_a_pipeline(found)
        why = f"Without a scheduler: {found}.\n\n" if found else ""
        return why + _python(
            [
                "import torch",
                *self.model,
                *self._written_out(plan, start(method, denoiser, self.steps)),
            ]
        )

    def _text(self) -> str:
        """Python for one text, or for ids where there is no tokenizer, and then what the ids are."""
        call = self.family.call
        data = self.experiment.data.texts
        lines = [*self.model]
        words = self._whose
        if (
            self.base
            and (stops := with_special_tokens(self.net.config, data)) != self.net.config
            and "generate" in call
        ):
            lines.append(f"model.generation_config.eos_token_id = {list(stops.eos)}")
        if self.tokenizer:
            prompt = literal(data.prompt_text("PROMPT"))
            lines += [
                "from transformers import AutoTokenizer",
                'tokenizer = AutoTokenizer.from_pretrained(".")',
            ]
            lines += [f'tokens = tokenizer({prompt}, return_tensors="pt").input_ids']
        else:
            about = " ".join((type(data).__doc__ or "").split("\n\n")[0].split())
            words += f"No tokenizer goes with it: its tokens are ids of `{type(data).__module__}:{type(data).__name__}`. {about}\n\n"
            lines += [
                "import torch",
                "tokens = torch.zeros(1, 2, dtype=torch.int64)  # in its place, ids of a text",
            ]
        lines += ["import torch", "mask = torch.ones_like(tokens)"] * ("=mask" in call)
        lines += [f"output = {call}"] * bool(call)
        lines += ["text = tokenizer.decode(output[0], skip_special_tokens=True)"] * (
            bool(self.tokenizer) and "generate" in call
        )
        return words + _python(list(dict.fromkeys(lines)))

    def _noise(self) -> str:
        *grid, channels = self.experiment.data.spec()["x"].shape[1:]
        return f"torch.randn(len(cond), {', '.join(map(str, (channels, *grid)))})"

    def _given(self) -> str:
        return self.family.given.format(
            **{
                f.name: getattr(self.net.config, f.name)
                for f in dataclasses.fields(self.net.config)
            }
        )

    def _stepped(self, found: Scheduler) -> list[str]:
        x, first = (
            ("scheduler.scale_model_input(x, t)", "scheduler.init_noise_sigma * ")
            if found.scales
            else ("x", "")
        )
        return [
            self._given(),
            f"x = {first}{self._noise()}",
            "with torch.no_grad():",
            "    for t in scheduler.timesteps:",
            f"        output = {self.family.call.format(x=x, t='t.expand(len(x))')}",
            "        x = scheduler.step(output, t, x).prev_sample",
        ]

    def _in_a_pipeline(self, found: Scheduler) -> str:
        if "encoder_hidden_states" not in self.family.call:
            return ""
        return (
            "\n\nOr in a pipeline of diffusers, `DiffusionPipeline.from_pretrained(...,"
            f" {self.family.component}=model, "
            f"scheduler=scheduler)`, called with `{found.times}, guidance_scale=1.0`."
        )

    def _written_out(self, plan: np.ndarray, first: float) -> list[str]:
        """The chain without a scheduler, from a first state of size `first`."""
        renoises = self.experiment.method.renoises
        table = ",\n    ".join(f"({', '.join(f'{v:.7g}' for v in step)})" for step in plan)
        again = "x = alpha * x0 + sigma * " + ("torch.randn_like(x0)" if renoises else "eps")
        return [
            self._given(),
            "# the network's time and the scale of its input; x0 = p x + q output; the state's"
            " alpha and sigma",
            f"steps = [\n    {table},\n]",
            f"x = {first:.7g} * {self._noise()}",
            "with torch.no_grad():",
            "    for i, (t, scale, p, q, alpha, sigma) in enumerate(steps):",
            "        if i:",
            f"            {again}",
            "        x0 = p * x + q *"
            f" {self.family.call.format(x='scale * x', t='torch.full((len(x),), float(t))')}",
            *([] if renoises else ["        eps = (x - alpha * x0) / sigma"]),
        ]


def _ready(found: Scheduler) -> list[str]:
    """Python that makes `scheduler` of the folder."""
    return [
        f"from diffusers import {found.name}",
        f'scheduler = {found.name}.from_pretrained(".", subfolder="scheduler")',
        f"scheduler.set_timesteps({found.times})",
    ]


def _python(lines: list[str]) -> str:
    """Imports first."""
    return (
        "```python\n"
        + "\n".join(sorted(lines, key=lambda line: not line.startswith(("import", "from"))))
        + "\n```"
    )
