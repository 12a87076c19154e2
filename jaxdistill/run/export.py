"""A finished run's student as a PyTorch folder: its weights or its adapter, its scheduler, and a
model card that says how to sample.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxdistill import interop
from jaxdistill.core.bank import Bank
from jaxdistill.core.net import Net, materialise
from jaxdistill.core.types import Method, Params, Refused
from jaxdistill.diffusion.denoiser import Denoiser
from jaxdistill.interop.adapter import check_adapter, save_adapter
from jaxdistill.interop.chain import SCHEDULER, Scheduler, chain, scheduler, start
from jaxdistill.interop.folder import replaceable, whole_folder
from jaxdistill.interop.tables import Family, literal
from jaxdistill.interop.tokenizer import tokenizer_files, with_special_tokens
from jaxdistill.run.experiment import Experiment, Trained
from jaxdistill.run.report import read
from jaxdistill.run.table import columns, markdown_table, number


def check(experiment: Experiment, folder: Path, *, adapter: bool = False) -> None:
    """Raises Refused where `export` to `folder` would; no weight is read for it.

    That is where nothing can be written there, the run has not finished, or a network has no
    PyTorch class, or no adapter that PyTorch could put on it.
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
            if net.adapts:
                net = net.whole
            interop.family_of(net.one if isinstance(net, Bank) else net)


def needed_roles(experiment: Experiment, *, adapter: bool = False) -> set[str]:
    """The roles whose weights `export` takes: those that it writes, and the bases of adapters that
    are merged.
    """
    exports = experiment.method.exports
    return set(exports) if adapter else experiment.with_bases(exports)


def _check_adapts(role: str, net: Net) -> None:
    if not net.adapts:
        raise Refused(
            f"export: {role} has full weights, no adapter; export it without --adapter"
        )


def export(trained: Trained, folder: Path, *, adapter: bool = False) -> None:
    """Writes a run's student for PyTorch.

    A method with several experts has each in `folder/<role>`, a bank each member in a folder of its
    number. A denoiser of diffusers has `scheduler/scheduler_config.json` beside it, where one of
    diffusers' schedulers steps as `method.sample` does; a language model has the data's end token,
    and its tokenizer where there is one. The folder appears when it is complete, and replaces an
    earlier export alone.

    Args:
        trained: The run; of its weights those of `needed_roles` are read.
        folder: Where to.
        adapter: Whether adapters are written alone, as `save_adapter` does; otherwise they are
            merged into their bases.

    Raises:
        Refused: As `check` does.
    """
    experiment = trained.experiment
    roles = experiment.method.exports
    check(experiment, folder, adapter=adapter)
    report = read(experiment.workdir)
    write = _export_adapter if adapter else _export_whole
    if len(roles) == 1 and not isinstance(trained.nets[roles[0]], Bank):
        write(trained, report, roles[0], Path(folder))
        return
    with whole_folder(folder) as inside:
        for role in roles:
            place = inside if len(roles) == 1 else inside / role
            write(trained, report, role, place)


def _export_adapter(
    trained: Trained, report: Mapping[str, Any], role: str, folder: Path
) -> None:
    """Writes the adapter of a role."""
    experiment = trained.experiment
    net = trained.nets[role]
    _check_adapts(role, net)
    base = trained.nets[net.adapts]
    source = experiment.source(net.adapts)
    is_run = (Path(source) / "stages").exists()
    if is_run or not (Path(source) / "config.json").is_file():
        source = ""  # no folder that PyTorch loads
    loading = _adapted(interop.family_of(base), source)
    student = Student(experiment, report, role, base, loading, base=net.adapts)
    save_adapter(
        folder,
        base,
        net,
        trained.params[role],
        source=source,
        card=student.card,
        beside=student.beside,
    )


def _export_whole(
    trained: Trained, report: Mapping[str, Any], role: str, folder: Path
) -> None:
    """Writes all weights of a role."""
    experiment = trained.experiment
    net = trained.nets[role]
    params = trained.params[role]
    if net.adapts:
        params = materialise(net.whole_weights(role, trained.params))
        net = net.whole
    for inside, one, weights in _members(net, params):
        one, weights = experiment.method.exported(one, weights)
        config = with_special_tokens(one.config, experiment.data.texts)
        one = dataclasses.replace(one, config=config)
        member = f"{inside}: one of {net.members}" if inside else ""
        loading = _loaded(interop.family_of(one))
        student = Student(
            experiment,
            report,
            role,
            one,
            loading,
            member=member,
            adapters=trained.adapters,
        )
        interop.save(
            folder / inside, one, weights, card=student.card, beside=student.beside
        )


def _members(net: Net, params: Params) -> list[tuple[str, Net, Params]]:
    """(folder, net, params) of a network, or of each member of a bank."""
    if not isinstance(net, Bank):
        return [("", net, params)]
    return [
        (str(k), net.one, jax.tree.map(lambda w: w[k], params))
        for k in range(net.members)
    ]


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
    base = repr(source) if source else '"BASE"'  # which the reader fills in
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
    """What is written beside the weights of one folder."""

    experiment: Experiment
    report: dict[str, Any]
    role: str
    net: Net  # the network that diffusers or transformers calls: of an adapter, the base
    model: list[str]  # Python that makes `model` of the folder
    member: str = ""  # which member of a bank it is: "1: one of 4"
    base: str = ""  # of an adapter, the role whose weights it goes on
    # folder of a run -> weight of its adapters in the sum of several
    adapters: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def family(self) -> Family:
        """The family of the network."""
        return interop.family_of(self.net)

    @property
    def denoiser(self) -> Denoiser | None:
        """How the network's output is read."""
        return self.experiment.described(self.role)[1]

    @property
    def steps(self) -> int:
        """Evaluations at which the run's evaluation samples the student."""
        counts = [
            row["nfe"] for row in self.report["models"] if row["name"] == "student"
        ]
        return counts[0] if counts else 1

    @functools.cached_property
    def scheduler(self) -> Scheduler | str:
        """The scheduler, or why there is none; "" where the network is no denoiser of diffusers."""
        denoiser = self.denoiser
        if denoiser is None or self.family.library != "diffusers":
            return ""
        try:
            return scheduler(self.experiment.method, denoiser, self.steps)
        except Refused as error:
            return str(error)

    @property
    def beside(self) -> dict[str, Any]:
        """Files by name: JSON objects, or paths of files that are copied."""
        found = self.scheduler
        return (
            {SCHEDULER: found.config}
            if isinstance(found, Scheduler)
            else dict(self.tokenizer)
        )

    @property
    def reads_text(self) -> bool:
        """Whether the network is a language model of transformers."""
        return self.family.library == "transformers" and hasattr(
            self.net.config, "vocab"
        )

    @functools.cached_property
    def tokenizer(self) -> Mapping[str, Any]:
        """The tokenizer of a language model by file name; empty where there is none."""
        return (
            tokenizer_files(self.experiment, self.role) if self.reads_text else {}
        )

    @property
    def card(self) -> str:
        """The model card."""
        method = type(self.experiment.method)
        report = self.report
        about = (sys.modules[method.__module__].__doc__ or "").strip()
        rows = [
            row for row in report["models"] if row["name"] in ("student", "teacher")
        ]
        keys = columns(rows)
        table = markdown_table(
            keys, [[number(row.get(k, "")) for k in keys] for row in rows]
        )
        given = report["config"]
        # which would end the fence
        config = json.dumps(given, indent=1).replace("`", r"\u0060")
        name = given["method"]["name"]
        return f"""---
tags: [jaxdistill, distillation, {method.__name__.lower()}]
---
# {method.__name__} student

{about}

Trained with `jaxdistill`: `{name}`, {report["steps"]} steps, seed {given["seed"]}.
NFE: {self.steps}.
{self._sum}
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
        """Python that runs the network, or why there is none."""
        call = self.family.call
        method = self.experiment.method
        module = type(method).__module__
        if self.denoiser is None:
            if self.reads_text:
                return self._text()
            return _python(
                [*self.model, f"output = {call}"] if call else self.model
            )
        try:
            plan = chain(method, self.denoiser, self.steps)
        except Refused as error:
            return (
                f"{self._whose}{error}; `{module}` has it.\n\n{_python(self.model)}"
            )
        found = self.scheduler
        ready = _ready(found) if isinstance(found, Scheduler) else []
        experts = len(method.exports)
        if experts == 1 and call:
            return self._whose + self._sampled(plan, ready, found)
        why = (
            f"one of {experts} experts"
            if experts > 1
            else f"x0 at {self.steps} times"
        )
        where = (
            f"{self.role}: {why}; `{module}` says which network serves which time."
        )
        return f"{self._whose}{where}\n\n{_python([*self.model, *ready])}"

    @property
    def _sum(self) -> str:
        """Which adapters the weights are a sum of, where they are one."""
        if not self.adapters:
            return ""
        listed = ", ".join(
            f"`{f}` {weight:g}" for f, weight in self.adapters.items()
        )
        own = str(self.experiment.workdir)
        mine = "" if own in self.adapters else f"`{own}` 1, "
        return (
            f"\nThe weights are those of the base with a weighted sum of adapters: {mine}{listed}."
            " The figures are those of the run alone.\n"
        )

    @property
    def _whose(self) -> str:
        """What the network is a part of, where it is one."""
        if self.member:
            module = type(self.experiment.method).__module__
            return (
                f"{self.role} {self.member} members; `{module}` says which network serves which "
                "condition.\n\n"
            )
        if self.base and '"BASE"' in "".join(self.model):
            return (
                "An adapter: `BASE` is the folder of the network that it goes on, "
                f"`{self.base}`, exported for PyTorch.\n\n"
            )
        return ""

    def _sampled(
        self, plan: np.ndarray, ready: list[str], found: Scheduler | str
    ) -> str:
        """Python that samples by the scheduler that `ready` makes; where there is none, by the
        chain `plan`.
        """
        if isinstance(found, Scheduler):
            lines = ["import torch", *self.model, *ready, *self._stepped(found)]
            return _python(lines) + self._in_a_pipeline(found)
        why = f"Without a scheduler: {found}.\n\n" if found else ""
        first = start(self.experiment.method, self.denoiser, self.steps)
        return why + _python(
            ["import torch", *self.model, *self._written_out(plan, first)]
        )

    def _text(self) -> str:
        """Python that continues a text; where there is no tokenizer, ids of one, with a sentence on
        what the ids are.
        """
        call = self.family.call
        generates = "generate" in call
        data = self.experiment.data.texts
        lines = [*self.model]
        words = self._whose
        if self.base and generates:
            config = with_special_tokens(self.net.config, data)
            if config != self.net.config:
                lines.append(
                    f"model.generation_config.eos_token_id = {list(config.eos)}"
                )
        if self.tokenizer:
            prompt = literal(data.prompt_text("PROMPT"))
            lines += [
                "from transformers import AutoTokenizer",
                'tokenizer = AutoTokenizer.from_pretrained(".")',
                f'tokens = tokenizer({prompt}, return_tensors="pt").input_ids',
            ]
        else:
            about = " ".join((type(data).__doc__ or "").split("\n\n")[0].split())
            name = f"{type(data).__module__}:{type(data).__name__}"
            words += f"No tokenizer goes with it: its tokens are ids of `{name}`. {about}\n\n"
            lines += [
                "import torch",
                "tokens = torch.zeros(1, 2, dtype=torch.int64)  # in its place, ids of a text",
            ]
        if "=mask" in call:
            lines += ["import torch", "mask = torch.ones_like(tokens)"]
        if call:
            lines.append(f"output = {call}")
        if self.tokenizer and generates:
            lines.append(
                "text = tokenizer.decode(output[0], skip_special_tokens=True)"
            )
        return words + _python(list(dict.fromkeys(lines)))

    def _noise(self) -> str:
        """Python that draws unit Gaussian noise, a sample for each condition."""
        *grid, channels = self.experiment.data.spec()["x"].shape[1:]
        return f"torch.randn(len(cond), {', '.join(map(str, (channels, *grid)))})"

    def _given(self) -> str:
        """Python that makes the condition."""
        config = self.net.config
        sizes = {
            field.name: getattr(config, field.name)
            for field in dataclasses.fields(config)
        }
        return self.family.given.format(**sizes)

    def _stepped(self, found: Scheduler) -> list[str]:
        """Python that samples by `scheduler`."""
        if found.scales:
            x = "scheduler.scale_model_input(x, t)"
            first = f"scheduler.init_noise_sigma * {self._noise()}"
        else:
            x = "x"
            first = self._noise()
        return [
            self._given(),
            f"x = {first}",
            "with torch.no_grad():",
            "    for t in scheduler.timesteps:",
            f"        output = {self.family.call.format(x=x, t='t.expand(len(x))')}",
            "        x = scheduler.step(output, t, x).prev_sample",
        ]

    def _in_a_pipeline(self, found: Scheduler) -> str:
        """How the network goes into a pipeline of diffusers, where it reads text."""
        if "encoder_hidden_states" not in self.family.call:
            return ""
        return (
            "\n\nOr in a pipeline of diffusers, `DiffusionPipeline.from_pretrained(..., "
            f"{self.family.component}=model, scheduler=scheduler)`, called with `{found.times}, "
            "guidance_scale=1.0`."
        )

    def _written_out(self, plan: np.ndarray, first: float) -> list[str]:
        """Python that samples by the chain `plan`, from a first state of size `first`."""
        rows = [", ".join(f"{value:.7g}" for value in step) for step in plan]
        table = ",\n    ".join(f"({row})" for row in rows)
        call = self.family.call.format(
            x="scale * x", t="torch.full((len(x),), float(t))"
        )
        renoises = self.experiment.method.renoises
        noise = "torch.randn_like(x0)" if renoises else "eps"
        lines = [
            self._given(),
            "# the network's time and the scale of its input; x0 = p x + q output; the state's "
            "alpha and sigma",
            f"steps = [\n    {table},\n]",
            f"x = {first:.7g} * {self._noise()}",
            "with torch.no_grad():",
            "    for i, (t, scale, p, q, alpha, sigma) in enumerate(steps):",
            "        if i:",
            f"            x = alpha * x0 + sigma * {noise}",
            f"        x0 = p * x + q * {call}",
        ]
        if not renoises:
            lines.append("        eps = (x - alpha * x0) / sigma")
        return lines


def _ready(found: Scheduler) -> list[str]:
    """Python that makes `scheduler` of the folder."""
    return [
        f"from diffusers import {found.name}",
        f'scheduler = {found.name}.from_pretrained(".", subfolder="scheduler")',
        f"scheduler.set_timesteps({found.times})",
    ]


def _python(lines: list[str]) -> str:
    """Lines as a block of Python, imports first."""
    imports_first = sorted(
        lines, key=lambda line: not line.startswith(("import", "from"))
    )
    code = "\n".join(imports_first)
    return f"```python\n{code}\n```"
