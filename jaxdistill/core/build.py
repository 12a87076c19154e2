"""From objects to configs and back.

There is no registry: a class is named "package.file:Class" (below `jaxdistill`, or in any package),
and the keys of its config are the fields of its dataclass.
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
    """Low-rank adaptation: the role's weights adapt the weights of another role.

    The role trains adapters on `targets`, whole leaves that match `full`, and the leaves that its
    own `model` has and its base lacks. All other weights are the base's, which is stored once.
    """

    # of the adapters; 0: no adapters, and without `full` full weights
    rank: int = 0
    alpha: float = 0.0  # scale is alpha / rank; 0: alpha = rank
    # the role that owns the other weights; it may have adapters itself
    base: str = "teacher"
    # regular expression on weight paths; "": no adapters
    targets: str = r".*kernel"
    # regular expression on paths of weights that the role has as a whole, first equal to the base's
    full: str = ""

    @property
    def adapts(self) -> bool:
        """Whether the role has weights of another one."""
        return self.rank != 0 or self.full != ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Role:
    """The config of one network."""

    # The dataclass of a model. None: that of the role which the weights come from. Beside `lora`,
    # what the base lacks of it starts freshly initialised.
    model: Any = None
    # A diffusion.denoiser.Denoiser, for networks that predict from (x_t, t). None: as for `model`.
    denoiser: Any = None
    # Where the first weights come from. "": as the method says; "fresh": newly initialised;
    # "random": newly initialised and frozen; "exact": the data's own distribution; the name of a
    # role; "@name", a run in `runs`; the folder of a run or of an exported model.
    init: str = ""
    # Storage of a frozen role. Roles that are trained are float32.
    param_dtype: fields.Dtype = "float32"
    # "int8": the matrices of a frozen role in eight bits, one scale an output channel (needs the
    # extra [int8]).
    quantize: Literal["", "int8"] = ""
    # The memory that holds the weights of a frozen role; each layer is fetched when it is used.
    place: Literal["device", "host"] = "device"
    optimizer: Optimizer = Optimizer()
    ema: Any = Ema()
    rules: Rules = Rules()
    lora: Lora = Lora()
    # members, if the role is a bank of networks (core/bank.py); 0: one network
    bank: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The top level of every config."""

    seed: int = 0  # of weights and training; the data has its own
    steps: fields.Steps = 1000  # engine steps over all stages
    accumulate: int = 1  # micro-batches a step
    log_every: int = 20
    sample_every: int = 0  # steps between sample grids; 0: only at the end
    eval_every: int = 0  # steps between evaluations; 0: only at the end
    checkpoint_every: int = 500
    keep: int = 2  # checkpoints
    tensorboard: bool = True
    wandb: str = ""  # name of the project; needs the extra [wandb]
    mesh: MeshShape = MeshShape()
    # of activations and batches; weights have their role's rules
    rules: Rules = Rules()


NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")

WINGS = {
    "denoisers": ("dit", "unet", "edm", "sana", "wan", "qwen_image", "mlp"),
    "language": ("lm", "qwen", "gemma", "neox", "t5", "bert"),
    "autoencoders": ("vae", "vae_dc", "vae_wan"),
    "vision": (
        "vit",
        "clip",
        "sam",
        "lpips",
        "perceptron",
        "random_features",
        "judges",
    ),
}
MOVED = {  # file in configs of version 0.1 -> file today
    f"models.{file}": f"models.{wing}.{file}"
    for wing, files in WINGS.items()
    for file in files
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
            if error.name and (
                module == error.name or module.startswith(error.name + ".")
            ):
                continue
            raise
        if hasattr(found, cls):
            return getattr(found, cls)
        classes = [k for k in vars(found) if k[:1].isupper()]
        raise Refused(
            f"name={name!r}: {module} has no class {cls!r}{nearest(cls, classes)}"
        )
    path = file.replace(".", "/")
    raise Refused(
        f"name={name!r}: no file jaxdistill/{path}.py, and no module {file!r}"
    )


def current_name(name: str) -> str:
    """The "package.file:Class" of today for a name in an older config."""
    file, colon, cls = name.partition(":")
    file = MOVED_CLASSES.get(name) or MOVED.get(file, file)
    return f"{file}{colon}{cls}"


def current_field(cls: type, field: str) -> str:
    """A field's name today. A class lists its renamed fields in `renamed`: old name -> new name.

    A new name with a dot ("divergence.beta") is a field of the object in a field.
    """
    for base in cls.__mro__:
        if field in vars(base).get("renamed", {}):
            return base.renamed[field]
    return field


def current_fields(cls: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config of `cls` with their names and values of today.

    A class whose fields have changed in more than their names translates them in a class method
    `upgraded(fields) -> fields`. It is given config data, or objects in place of groups.
    """
    upgraded = getattr(cls, "upgraded", dict)
    return {
        current_field(cls, key): value for key, value in upgraded(given).items()
    }


def current(config: Any) -> Any:
    """Plain config data of an earlier version with today's names of files and fields."""
    if isinstance(config, (list, tuple)):
        return type(config)(map(current, config))
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
    return current_fields(cls, given)


def plain(value: Any) -> Any:
    """An object of a dataclass as config data: its fields, and its class under `name`.

    Objects in its fields become config data too; other values stay as they are.
    Raises Refused on a value of another type, or out of its field's range.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        cls = type(value)
        path = f"{cls.__module__}:{cls.__qualname__}".removeprefix("jaxdistill.")
        given = {
            f.name: getattr(value, f.name)
            for f in dataclasses.fields(value)
            if f.init
        }
        _check_fields(cls, path, given)
        held = {
            name: plain(fields.coerced(cls, name, part))
            for name, part in given.items()
        }
        return ConfigDict({"name": path, **held}, convert_dict=False)
    if value is None:
        return ConfigDict()
    if isinstance(value, ConfigDict):
        return value.copy_and_resolve_references()
    if isinstance(value, Mapping):
        return ConfigDict({k: plain(v) for k, v in value.items()})
    if isinstance(value, tuple):
        return tuple(part if part is None else plain(part) for part in value)
    return value


def spec(name: str, **values: Any) -> ConfigDict:
    """The config of the class called "package.file:Class": all its fields, some replaced.

    Where the class is at hand, `plain(Class(...))` gives the same. Raises Refused on an unknown
    field, and on a value of another type or out of range.
    """
    cls = _dataclass(name, "")
    given = current_fields(cls, values)
    objects = {
        key: build(value) if _is_spec(value) else value
        for key, value in given.items()
    }
    return plain(made(cls, name, objects, ""))


def build(config: Mapping[str, Any], where: str = "") -> Any:
    """The object that config data describes, with the objects in its fields.

    `where` is the place of the data in messages ("config.roles.student"). Raises Refused on an
    unknown field, and on a value of another type or out of range.
    """
    if not _is_spec(config):
        group = isinstance(config, (Mapping, ConfigDict))
        found = "without a name" if group else fields.shown(config)
        raise Refused(
            f"{where or 'spec'} is {found}: expected a group with the name of a class"
        )
    cls = _dataclass(config["name"], where)
    given = current_fields(cls, {k: v for k, v in config.items() if k != "name"})
    values = {k: _object(v, _below(where, k)) for k, v in given.items()}
    return made(cls, config["name"], values, where)


def completed(config: Any) -> Any:
    """Plain config data of an earlier version with today's names and all of today's fields.

    New fields get their defaults. A class that no longer exists is left as it is.
    """
    return _completed(current(config))


def _completed(config: Any) -> Any:
    if isinstance(config, (list, tuple)):
        return type(config)(map(_completed, config))
    if not isinstance(config, Mapping):
        return config
    given = {key: _completed(value) for key, value in config.items()}
    if not isinstance(given.get("name"), str):
        return given
    cls = _known(given["name"])
    if not dataclasses.is_dataclass(cls):
        return given
    fresh = {
        f.name: f.default
        for f in dataclasses.fields(cls)
        if f.init and f.name not in given
    }
    known = {
        name: value
        for name, value in fresh.items()
        if value is not dataclasses.MISSING
    }
    return {
        **given,
        **{name: _jsonable(plain(value)) for name, value in known.items()},
    }


def _known(name: str) -> Any:
    """The class of that name in the library or in a loaded module, else None.

    No other module is imported, since the name may come from a file of others.
    """
    file, _, cls = name.partition(":")
    loaded = sys.modules.get(file)
    if loaded is not None:
        return getattr(loaded, cls, None)
    try:
        return (
            resolve(name)
            if importlib.util.find_spec(f"jaxdistill.{file}")
            else None
        )
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
    if isinstance(value, (list, tuple)):
        return tuple(_object(part, where) for part in value)
    return value


def located(where: str, error: Refused) -> Refused:
    """The refusal with its place in the config in front of the message."""
    text = str(error)
    last = where.rpartition(".")[2]
    if not where or text.startswith("config"):
        return error
    if re.match(rf"{re.escape(last)}[.=\[ ]", text):
        return Refused(where + text.removeprefix(last))
    field = re.match(r"[\w.]+=", text)
    return Refused(f"{where}.{text}" if field else f"{where}: {text}")


def _dataclass(name: str, where: str) -> type:
    """The dataclass called `name`. Raises Refused where there is none."""
    try:
        cls = resolve(name)
        if not dataclasses.is_dataclass(cls):
            raise Refused(f"name={name!r}: expected a dataclass")
    except Refused as error:
        raise located(where, error) from error
    return cls


def made(cls: type, name: str, values: Mapping[str, Any], where: str) -> Any:
    """An object of `cls`, which messages call `name`, from the values at `where` in a config.

    Raises Refused on a field that is unknown, missing, of another type or out of range.
    """
    try:
        _check_fields(cls, name, values)
        return cls(
            **{
                key: fields.coerced(cls, key, value)
                for key, value in values.items()
            }
        )
    except Refused as error:
        raise located(where, error) from error


def _check_fields(cls: type, name: str, values: Mapping[str, Any]) -> None:
    """Raises Refused on a field that is unknown, missing, of another type or out of range."""
    known = [f for f in dataclasses.fields(cls) if f.init]
    names = [f.name for f in known]
    for key in values:
        if key not in names:
            raise Refused(f"{name} has no field {key!r}{nearest(str(key), names)}")
    missing = [f.name for f in known if f.name not in values and _required(f)]
    if missing:
        raise Refused(f"{name} needs {', '.join(missing)}")
    for key, value in values.items():
        if problem := fields.problem(cls, key, value):
            raise Refused(f"{key}={fields.shown(value)}: {problem}")


def _required(field: dataclasses.Field) -> bool:
    given = (field.default, field.default_factory)
    return all(default is dataclasses.MISSING for default in given)


def experiment(
    *,
    method: Any,
    data: Any,
    roles: Mapping[str, Role],
    evaluation: Any = None,
    claim: Mapping[str, Any] | None = None,
    runs: Mapping[str, ConfigDict] = {},
    **run: Any,
) -> ConfigDict:
    """A complete config. It is locked: a misspelt key is an error.

    Args:
      method: a core.types.Method.
      data: a data.base.Dataset.
      roles: name of each network -> its Role.
      evaluation: an evaluation of `jaxdistill.evals`.
      claim: what the final evaluation is compared with: metric, model, baseline, better ("lower" or
        "higher") and ratio.
      runs: name -> a complete config. It is trained first, in `workdir/<name>`, if a role starts
        from it ("@name") or the claim names it (a baseline). Its seed, data.seed and data.path are
        those of this config, also when these are changed later.
      run: fields of `Run`, at the top level of the config.

    Raises:
      Refused: a field is unknown, of another type or out of range.
    """
    given = {
        key: build(value) if _is_spec(value) else value
        for key, value in run.items()
    }
    top = plain(made(Run, "config", given, "config"))
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
    """Makes seed, data.seed and data.path of inner runs references to those of this config."""
    for inner in config.runs.values():
        inner.seed = config.get_ref("seed")
        for key in ("seed", "path"):
            inner.data[key] = config.data.get_ref(key)
        _share(inner)


def run_settings(config: ConfigDict, where: str = "config") -> Run:
    """The top level of a config as an object.

    Raises Refused on a field that is missing, of another type or out of range.
    """
    names = [f.name for f in dataclasses.fields(Run)]
    missing = [name for name in names if name not in config]
    if missing:
        raise Refused(f"{where}.{missing[0]} is missing")
    values = {name: _object(config[name], _below(where, name)) for name in names}
    return made(Run, where, values, where)
