"""Config <-> objects. There is no registry: "file:Class" below `jaxdistill` (or in any package) is its own entry, and
the keys of its config are the fields of its dataclass."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from jaxdistill.core.optim import Ema, Optimizer
from jaxdistill.core.sharding import MeshShape, Rules
from jaxdistill.core.types import Refused, nearest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adaptation: the role's weights are adapters on another role's frozen ones."""

    rank: int = 0  # 0: the role has full weights
    alpha: float = 0.0  # scale is alpha / rank; 0: alpha = rank
    base: str = "teacher"  # the role that owns the frozen weights
    targets: str = r".*kernel"  # regular expression on weight paths


@dataclasses.dataclass(frozen=True, kw_only=True)
class Role:
    """What the config says of one network. An empty model or denoiser is that of the role it is copied from."""

    model: Any = None  # spec(...) of a model's dataclass
    denoiser: Any = None  # spec(...) of a diffusion.denoiser:Denoiser, for networks that predict from (x_t, t)
    init: str = ""  # "": as the method says | fresh | random (frozen) | exact (the data's law) | a role | @run | a run's or exported folder
    param_dtype: str = "float32"  # what a frozen role is stored in; roles that move are float32
    quantize: str = ""  # int8: a frozen role's matrices in eight bits, a scale for each output channel (extra [int8])
    place: str = "device"  # device | host: where a frozen role's weights rest; each layer is fetched when it is needed
    optimizer: Optimizer = Optimizer()
    ema: Any = Ema()
    rules: Rules = Rules()
    lora: Lora = Lora()
    bank: int = 0  # members, where the role is a bank of networks of this kind (core/bank.py); 0: one network


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The top level of every config."""

    seed: int = 0  # weights and training randomness; the data has a seed of its own
    steps: int = 1000  # engine steps over all stages
    accumulate: int = 1  # micro-batches per step
    log_every: int = 20
    sample_every: int = 0  # steps between sample grids; 0: only at the end
    eval_every: int = 0  # steps between evaluations; 0: only at the end
    checkpoint_every: int = 500
    keep: int = 2  # checkpoints
    tensorboard: bool = True
    wandb: str = ""  # project; needs the extra [wandb]
    mesh: MeshShape = MeshShape()
    rules: Rules = Rules()  # of activations and batches; a role's own rules place its weights

    def __post_init__(self):
        for name in ("steps", "accumulate", "log_every", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise Refused(f"config.{name}={getattr(self, name)}: expected a positive integer")
        for name in ("sample_every", "eval_every"):
            if getattr(self, name) < 0:
                raise Refused(f"config.{name}={getattr(self, name)}: expected 0 or a positive integer")


def resolve(name: str) -> Any:
    """The class behind "package.file:Class", looked up below `jaxdistill` first. Raises Refused."""
    file, _, cls = name.partition(":")
    for module in (f"jaxdistill.{file}", file):
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name and (module == error.name or module.startswith(error.name + ".")):
                continue
            raise
        if hasattr(found, cls):
            return getattr(found, cls)
        raise Refused(f"name={name!r}: {module} has no class {cls!r}{nearest(cls, [k for k in vars(found) if k[:1].isupper()])}")
    raise Refused(f"name={name!r}: no file jaxdistill/{file.replace('.', '/')}.py, and no module {file!r}")


def _plain(value: Any) -> Any:
    """A field's value as config data; dataclasses become dicts with their class under `name`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        path = f"{type(value).__module__}:{type(value).__qualname__}".removeprefix("jaxdistill.")
        return ConfigDict({"name": path, **{f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}},
                          convert_dict=False)  # fmt: skip
    if value is None:
        return ConfigDict()
    if isinstance(value, ConfigDict):
        return value.copy_and_resolve_references()
    if isinstance(value, Mapping):
        return ConfigDict({k: _plain(v) for k, v in value.items()})
    return value


def spec(name: str, **fields: Any) -> ConfigDict:
    """The config of one class: all its fields with their defaults, some replaced. Raises Refused on an unknown one."""
    made = {k: build(v) if isinstance(v, (Mapping, ConfigDict)) and "name" in v else v for k, v in fields.items()}
    return _plain(_construct(resolve(name), name, made))  # the class checks what it will be given, not its config


def build(config: Mapping[str, Any]) -> Any:
    """The object that a `spec` describes, nested ones included. Raises Refused on an unknown field."""
    fields = {k: _object(v) for k, v in config.items() if k != "name"}
    return _construct(resolve(config["name"]), config["name"], fields)


def _object(value: Any) -> Any:
    if isinstance(value, (Mapping, ConfigDict)):
        if "name" in value:
            return build(value)
        return {k: _object(v) for k, v in value.items()} or None
    return tuple(value) if isinstance(value, list) else value


def _construct(cls, name: str, fields: Mapping[str, Any]) -> Any:
    if not dataclasses.is_dataclass(cls):
        raise Refused(f"name={name!r}: expected a dataclass")
    known = [f.name for f in dataclasses.fields(cls) if f.init]
    for key in fields:
        if key not in known:
            raise Refused(f"{name} has no field {key!r}{nearest(key, known)}")
    missing = [f.name for f in dataclasses.fields(cls) if f.init and f.name not in fields
               and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]  # fmt: skip
    if missing:
        raise Refused(f"{name} needs {', '.join(missing)}")
    return cls(**fields)


def experiment(*, method: Mapping, data: Mapping, roles: Mapping[str, Role], evaluation: Mapping | None = None,
               claim: Mapping | None = None, runs: Mapping[str, Mapping] = {}, **run: Any) -> ConfigDict:  # fmt: skip
    """A whole config: `Run`'s fields at the top, and below it

    method, data, evaluation: `spec(...)`; roles: name -> Role;
    claim: dict(metric, model, baseline, better "lower" | "higher", ratio): what the final evaluation is held against;
    runs: name -> a whole config of its own, trained first in `workdir/<name>` if a role starts from it ("@name") or the
    claim names it (a baseline).
    Their seed, data.seed and data.path are this config's, and stay so when these are changed.
    Returned locked: a misspelt key is an error.
    """
    top = _plain(_construct(Run, "config", run))
    del top["name"]
    parts = dict(method=method, data=data, evaluation=evaluation, claim=claim, runs=dict(runs), roles=dict(roles))
    config = ConfigDict({**top, **{k: _plain(v) for k, v in parts.items()}})
    _share(config)
    return config.lock()


def _share(config: ConfigDict) -> None:
    """Makes seed, data.seed and data.path of the runs inside references to this config's."""
    for inner in config.runs.values():
        inner.seed = config.get_ref("seed")
        for key in ("seed", "path"):
            inner.data[key] = config.data.get_ref(key)
        _share(inner)


def run_settings(config: ConfigDict) -> Run:
    """The top level of a config as an object. Raises Refused on values out of range."""
    return _construct(Run, "config", {f.name: _object(config[f.name]) for f in dataclasses.fields(Run)})
