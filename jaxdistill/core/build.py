"""Config <-> objects. There is no registry: "file:Class" below `jaxdistill` (or in any package) is
its own entry, and the keys of its config are the fields of its dataclass.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Mapping
from typing import Any, Literal

from ml_collections import ConfigDict

from jaxdistill.core import fields
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
    """What the config says of one network. An empty model or denoiser is that of the role it is
    copied from.
    """

    model: Any = None  # spec(...) of a model's dataclass
    denoiser: Any = (
        None  # spec(...) of a diffusion.denoiser:Denoiser, for networks that predict from (x_t, t)
    )
    # "": as the method says | fresh | random (frozen) | exact (the data's law) | a role | @run | a
    # run's or exported folder
    init: str = ""
    param_dtype: fields.Dtype = (
        "float32"  # what a frozen role is stored in; roles that move are float32
    )
    quantize: Literal["", "int8"] = (
        # int8: a frozen role's matrices in eight bits, a scale for each output channel (extra
        # [int8])
        ""
    )
    place: Literal["device", "host"] = (
        "device"  # where a frozen role's weights rest; each layer is fetched when it is needed
    )
    optimizer: Optimizer = Optimizer()
    ema: Any = Ema()
    rules: Rules = Rules()
    lora: Lora = Lora()
    # members, where the role is a bank of networks of this kind (core/bank.py); 0: one network
    bank: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The top level of every config."""

    seed: int = 0  # weights and training randomness; the data has a seed of its own
    steps: fields.Steps = 1000  # engine steps over all stages
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


NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")

WINGS = {
    "denoisers": ("dit", "unet", "edm", "sana", "wan", "qwen_image", "mlp"),
    "language": ("lm", "qwen", "gemma", "neox", "t5", "bert"),
    "autoencoders": ("vae", "vae_dc", "vae_wan"),
    "vision": ("vit", "clip", "sam", "lpips", "perceptron", "random_features", "judges"),
}
MOVED = {  # file as configs of version 0.1 name it -> file today
    f"models.{file}": f"models.{wing}.{file}" for wing, files in WINGS.items() for file in files
} | {"methods.distribution._dmd": "methods.distribution.dmd"}
MOVED_CLASSES = {  # "file:Class" of a file whose classes went to several files -> file today
    f"methods.distribution._family:{cls}": f"methods.distribution.{file}"
    for cls, file in {
        "BinnedFDistill": "f_distill",
        "DDS": "sds",
        "DIPlusPlus": "di_plus_plus",
        "DIStar": "di_star",
        "FDistill": "f_distill",
        "NormalisedUniInstruct": "uni_instruct",
        "RedDiff": "sds",
        "SDS": "sds",
        "SIM": "sim",
        "SiD": "sid",
        "SiDA": "sida",
    }.items()
}


def resolve(name: str) -> Any:
    """The class behind "package.file:Class", looked up below `jaxdistill` first. Raises Refused."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise Refused(
            f"name={fields.shown(name)}: expected the name of a class as 'package.file:Class'"
        )
    file, _, cls = current_name(name).partition(":")
    for module in (f"jaxdistill.{file}", file):
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name and (module == error.name or module.startswith(error.name + ".")):
                continue
            raise
        if hasattr(found, cls):
            return getattr(found, cls)
        classes = [k for k in vars(found) if k[:1].isupper()]
        raise Refused(f"name={name!r}: {module} has no class {cls!r}{nearest(cls, classes)}")
    path = file.replace(".", "/")
    raise Refused(f"name={name!r}: no file jaxdistill/{path}.py, and no module {file!r}")


def current_name(name: str) -> str:
    """ "package.file:Class" where the class is today: files have moved since configs were written."""
    file, colon, cls = name.partition(":")
    file = MOVED_CLASSES.get(name) or MOVED.get(file, file)
    return f"{file}{colon}{cls}"


def current_field(cls: type, field: str) -> str:
    """A field's name today. A class lists its renamed fields, old name -> new one, in `renamed`."""
    for base in cls.__mro__:
        if field in vars(base).get("renamed", {}):
            return base.renamed[field]
    return field


def current(config: Any) -> Any:
    """Plain config data of an earlier version under the names of today: files and fields."""
    if not isinstance(config, Mapping):
        return config
    given = {key: current(value) for key, value in config.items()}
    name = given.get("name")
    if not isinstance(name, str):
        return given
    given["name"] = current_name(name)
    cls = _known(given["name"])
    if not dataclasses.is_dataclass(cls):
        return given
    return {current_field(cls, key): value for key, value in given.items()}


def plain(value: Any) -> Any:
    """An object of a dataclass as config data: its fields, and its class under `name`.

    Objects in its fields become config data too; other values stay as they are.
    Raises Refused on a value of another type, or out of its field's range.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        cls = type(value)
        path = f"{cls.__module__}:{cls.__qualname__}".removeprefix("jaxdistill.")
        given = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        _check_fields(cls, path, given)
        held = {name: plain(fields.coerced(cls, name, part)) for name, part in given.items()}
        return ConfigDict({"name": path, **held}, convert_dict=False)
    if value is None:
        return ConfigDict()
    if isinstance(value, ConfigDict):
        return value.copy_and_resolve_references()
    if isinstance(value, Mapping):
        return ConfigDict({k: plain(v) for k, v in value.items()})
    return value


def spec(name: str, **values: Any) -> ConfigDict:
    """The config of one class: all its fields with their defaults, some replaced.

    Raises Refused on an unknown field, and on a value of another type or out of range.
    """
    made = {k: build(v) if _is_spec(v) else v for k, v in values.items()}
    return plain(
        _construct(name, made, "")
    )  # the class checks what it will be given, not its config


def build(config: Mapping[str, Any], where: str = "") -> Any:
    """The object that a `spec` describes, nested ones included.

    `where` is the config's place as messages name it ("config.roles.student"). Raises Refused on an
    unknown field, and on a value of another type or out of range.
    """
    if not isinstance(config, (Mapping, ConfigDict)) or "name" not in config:
        found = (
            fields.shown(config)
            if not isinstance(config, (Mapping, ConfigDict))
            else "without a name"
        )
        raise Refused(f"{where or 'spec'} is {found}: expected a group with the name of a class")
    made = {k: _object(v, _below(where, k)) for k, v in config.items() if k != "name"}
    return _construct(config["name"], made, where)


def completed(config: Any) -> Any:
    """Plain config data with the fields that its classes have gained since it was written, at their
    defaults.

    A class that is not there any more is left as it is.
    """
    return _completed(current(config))


def _completed(config: Any) -> Any:
    if not isinstance(config, Mapping):
        return config
    given = {key: _completed(value) for key, value in config.items()}
    if not isinstance(given.get("name"), str):
        return given
    cls = _known(given["name"])
    if not dataclasses.is_dataclass(cls):
        return given
    fresh = {f.name: f.default for f in dataclasses.fields(cls) if f.init and f.name not in given}
    known = {name: value for name, value in fresh.items() if value is not dataclasses.MISSING}
    return {**given, **{name: _jsonable(plain(value)) for name, value in known.items()}}


def _known(name: str) -> Any:
    """The class of a config without importing anything but the library; None where that does not
    have it.
    """
    file, _, cls = name.partition(":")
    loaded = sys.modules.get(file)
    if loaded is not None:
        return getattr(loaded, cls, None)
    try:
        return resolve(name) if importlib.util.find_spec(f"jaxdistill.{file}") else None
    except (Refused, ImportError, ValueError):
        return None


def _jsonable(value: Any) -> Any:
    return json.loads(ConfigDict({"value": value}).to_json())["value"]


def _is_spec(value: Any) -> bool:
    return isinstance(value, (Mapping, ConfigDict)) and "name" in value


def _below(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _object(value: Any, where: str) -> Any:
    if _is_spec(value):
        return build(value, where)
    if isinstance(value, (Mapping, ConfigDict)):
        return {k: _object(v, _below(where, k)) for k, v in value.items()} or None
    return tuple(value) if isinstance(value, list) else value


def located(where: str, error: Refused) -> Refused:
    """The refusal with the place in the config that it speaks of in front."""
    text = str(error)
    last = where.rpartition(".")[2]
    if not where or text.startswith("config"):
        return error
    if re.match(rf"{re.escape(last)}[.=\[ ]", text):
        return Refused(where + text.removeprefix(last))
    field = re.match(r"[\w.]+=", text)
    return Refused(f"{where}.{text}" if field else f"{where}: {text}")


def _construct(name: str, values: Mapping[str, Any], where: str) -> Any:
    try:
        cls = resolve(name)
        if not dataclasses.is_dataclass(cls):
            raise Refused(f"name={name!r}: expected a dataclass")
    except Refused as error:
        raise located(where, error) from error
    return made(cls, name, values, where)


def made(cls: type, name: str, values: Mapping[str, Any], where: str) -> Any:
    """An object of `cls`, which messages call `name`, from the values at `where` in a config.

    Raises Refused on a field that is unknown, missing, of another type or out of range.
    """
    values = {current_field(cls, key): value for key, value in values.items()}
    try:
        _check_fields(cls, name, values)
        return cls(**{key: fields.coerced(cls, key, value) for key, value in values.items()})
    except Refused as error:
        raise located(where, error) from error


def _check_fields(cls: type, name: str, values: Mapping[str, Any]) -> None:
    """Raises Refused where a field is unknown, missing, or of another type or range than the class
    says.
    """
    known = [f for f in dataclasses.fields(cls) if f.init]
    names = [f.name for f in known]
    for key in values:
        if key not in names:
            raise Refused(f"{name} has no field {key!r}{nearest(str(key), names)}")
    no_default = lambda f: (
        f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    )
    missing = [f.name for f in known if f.name not in values and no_default(f)]
    if missing:
        raise Refused(f"{name} needs {', '.join(missing)}")
    for key, value in values.items():
        if problem := fields.problem(cls, key, value):
            raise Refused(f"{key}={fields.shown(value)}: {problem}")


def experiment(
    *,
    method: Mapping,
    data: Mapping,
    roles: Mapping[str, Role],
    evaluation: Mapping | None = None,
    claim: Mapping | None = None,
    runs: Mapping[str, Mapping] = {},
    **run: Any,
) -> ConfigDict:
    """A whole config: `Run`'s fields at the top, and below it

    method, data, evaluation: `spec(...)`; roles: name -> Role;
    claim: dict(metric, model, baseline, better "lower" | "higher", ratio): what the final
    evaluation is held against;
    runs: name -> a whole config of its own, trained first in `workdir/<name>` if a role starts from
    it ("@name") or the claim names it (a baseline). Their seed, data.seed and data.path are this
    config's, and stay so when these are changed. Returned locked: a misspelt key is an error.
    """
    top = {key: build(value) if _is_spec(value) else value for key, value in run.items()}
    top = plain(made(Run, "config", top, "config"))
    del top["name"]
    parts = dict(
        method=method,
        data=data,
        evaluation=evaluation,
        claim=claim,
        runs=dict(runs),
        roles=dict(roles),
    )
    config = ConfigDict({**top, **{k: plain(v) for k, v in parts.items()}})
    _share(config)
    return config.lock()


def _share(config: ConfigDict) -> None:
    """Makes seed, data.seed and data.path of the runs inside references to this config's."""
    for inner in config.runs.values():
        inner.seed = config.get_ref("seed")
        for key in ("seed", "path"):
            inner.data[key] = config.data.get_ref(key)
        _share(inner)


def run_settings(config: ConfigDict, where: str = "config") -> Run:
    """The top level of a config as an object. Raises Refused on a value of another type or out of
    range.
    """
    missing = [f.name for f in dataclasses.fields(Run) if f.name not in config]
    if missing:
        raise Refused(f"{where}.{missing[0]} is missing")
    given = {f.name: config[f.name] for f in dataclasses.fields(Run)}
    return made(Run, where, {k: _object(v, _below(where, k)) for k, v in given.items()}, where)
