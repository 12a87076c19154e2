"""Shared code of the commands: arguments, configs from files, refusals in one line, exit codes."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import importlib.util
import inspect
import logging
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxdistill.core.build import (
    build,
    current_field,
    current_fields,
    plain,
    resolve,
    spec,
)
from jaxdistill.core.types import Refused, nearest
from jaxdistill.run.host import keep_freed_memory, listen
from jaxdistill.run.records import local, read_config

ROOT = Path(__file__).resolve().parents[1]  # the checkout
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: stopped with work left, run it again
TRUE = ("1", "true")
FALSE = ("0", "false")


def main(command: Callable[[list[str]], None], usage: str = "") -> None:
    """Runs a command and exits, with the reason in one line on stderr. Exit codes:

    0   done;
    2   refused: the input is bad, or a folder is damaged or has another run. The same command
        would be refused again;
    75  stopped by SIGTERM or Ctrl-C with work left: the same command resumes what was saved;
    1   anything else: a loss that is not finite, a full disk, a read error, a lost process. The
        last good checkpoint stays.

    With JAXDISTILL_TRACEBACK set, the cause of a refusal is printed, too.

    Args:
        command: Takes the arguments of the command line.
        usage: Printed for -h and --help; empty for the docstring of the command's file.
    """
    if asks_for_help(sys.argv[1:]):
        print((usage or command.__globals__["__doc__"]).strip())
        return
    keep_freed_memory()
    from jaxdistill.run.loop import Stopped
    from jaxdistill.run.metrics import NonFinite

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    listen()
    _mute_leftovers()
    try:
        command(sys.argv[1:])
    except Refused as error:
        if os.environ.get("JAXDISTILL_TRACEBACK") and error.__cause__:
            traceback.print_exception(error.__cause__)
        _end(2, f"refused: {error}")
    except NonFinite as error:
        _end(1, f"stopped: {error}; the last good checkpoint is kept")
    except Stopped as stop:
        _end(STOPPED, f"stopped: {stop}")
    except OSError as error:
        _end(1, f"failed: {_machine(error)}; the last good checkpoint is kept")
    except MemoryError as error:
        details = f" ({error})" if str(error) else ""
        _end(1, f"failed: out of memory{details}; the last good checkpoint is kept")
    except KeyboardInterrupt:
        _end(
            STOPPED,
            "interrupted; nothing saved since the last checkpoint, run again to go on",
        )


def _mute_leftovers() -> None:
    """Silences messages about reads and writes that waited for one that failed.

    orbax and tensorstore leave such coroutines behind, and Python reports them on stderr.
    """
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    usual = sys.unraisablehook
    muted = ("Event loop is closed", "_read_array", "async_serialize")

    def hook(found: Any) -> None:
        text = f"{found.object!r} {found.exc_value!r}"
        if not any(name in text for name in muted):
            usual(found)

    sys.unraisablehook = hook


def _end(code: int, line: str) -> None:
    """Exits with `code` and one line on stderr."""
    print(" ".join(line.split()), file=sys.stderr)
    sys.exit(code)


def _machine(error: OSError) -> str:
    """The message of the operating system, with the file that it is about."""
    said = error.strerror or str(error) or type(error).__name__
    return f"{error.filename}: {said}" if error.filename else said


def asks_for_help(argv: Sequence[str]) -> bool:
    """Whether -h or --help is among the arguments before "--"; those after it are not ours."""
    own = argv[: argv.index("--")] if "--" in argv else argv
    return not {"-h", "--help"}.isdisjoint(own)


def no_command(argv: list[str]) -> None:
    """The command of files in tools/ that only others import. Raises Refused."""
    raise Refused(
        f"{Path(sys.argv[0]).name}: no command of its own, others import it; --help says what it"
        " holds"
    )


def join(distributed: bool) -> None:
    """Joins the other processes of the run; must come before any other use of JAX.

    `launch.local_cluster` sets JAXDISTILL_COORDINATOR, _PROCESSES, _PROCESS and _HEARTBEAT.

    Args:
        distributed: Whether JAX looks for the other processes itself, on Cloud TPU, GKE or Slurm.

    Raises:
        Refused: JAX finds no other processes.
        OSError: The other processes do not come.
    """
    import jax

    if "JAXDISTILL_PROCESS" in os.environ:
        jax.distributed.initialize(
            os.environ["JAXDISTILL_COORDINATOR"],
            int(os.environ["JAXDISTILL_PROCESSES"]),
            int(os.environ["JAXDISTILL_PROCESS"]),
            heartbeat_timeout_seconds=int(os.environ["JAXDISTILL_HEARTBEAT"]),
        )
    elif distributed:
        try:
            jax.distributed.initialize()
        except ValueError as error:  # JAX found no coordinator
            raise Refused(
                "--distributed: found no TPU slice, no job of GKE and none of Slurm to join;"
                " several processes of one machine are started by launch.local_cluster"
            ) from error
        except RuntimeError as error:  # the others did not come
            raise OSError(
                f"--distributed: {str(error).strip().splitlines()[0]}"
            ) from error


def arguments(
    argv: Sequence[str], known: Mapping[str, Any]
) -> tuple[dict[str, Any], ConfigDict | None]:
    """Parses `--key=value` and `--key value`.

    `--config=FILE[:variant]` calls get_config of FILE; `--config.a.b=value` replaces a value of
    the config by one of the same type.

    Args:
        argv: The words of the command line.
        known: Key -> default. The key of a bool needs no value.

    Returns:
        (key -> value, config): the config of --config, else that of the run in --workdir, else
        None.

    Raises:
        Refused: An argument is unknown, has no value or a bad one.
    """
    values = dict(known)
    overrides = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        key, given, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            raise Refused(f"argument {word!r}: expected --key=value")
        if not key.startswith("config.") and key not in known:
            raise Refused(f"unknown argument --{key}{nearest(key, known)}")
        if isinstance(known.get(key), bool):
            if given and value.lower() not in (*TRUE, *FALSE):
                raise Refused(
                    f"--{key}={value}: expected true or false, or nothing, which is true"
                )
            values[key] = value.lower() not in FALSE
            continue
        if not given:
            if not words or words[0].startswith("--"):
                raise Refused(f"--{key} needs a value")
            value = words.pop(0)
        if key.startswith("config."):
            overrides[key.removeprefix("config.")] = value
        else:
            values[key] = value
    config = _config_of(values)
    if overrides and config is None:
        raise Refused("--config.key=value needs --config=FILE")
    for path, value in overrides.items():
        override(config, path, value)
    return values, config


def _config_of(values: Mapping[str, Any]) -> ConfigDict | None:
    """The config of --config, or of the run in --workdir; None where there is neither."""
    if values.get("config"):
        return load_config(values["config"])
    if values.get("workdir"):
        workdir = local(values["workdir"], "--workdir")
        if (workdir / "config.json").exists():
            return read_config(workdir).lock()
    return None


def load_config(name: str) -> ConfigDict:
    """The config of "FILE" or "FILE:variant".

    A relative FILE is looked for in the current folder, then in the checkout.

    Raises:
        Refused: There is no such file, or it has no get_config.
    """
    local(name, "--config")
    path, _, variant = name.partition(":")
    found = [place for place in (Path(path), ROOT / path) if place.is_file()]
    if not found:
        raise Refused(f"--config={path}: no such file{_near(path)}")
    file = found[0]
    for place in (str(ROOT), os.getcwd()):
        if place not in sys.path:
            sys.path.insert(0, place)
    spec = importlib.util.spec_from_file_location("config_file", file)
    module = importlib.util.module_from_spec(spec)
    with _in_file(path, file):
        spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise Refused(f"--config={path}: defines no get_config()")
    if variant and not inspect.signature(module.get_config).parameters:
        raise Refused(
            f"--config={name}: {path} has no variants, expected --config={path}"
        )
    with _in_file(path, file):
        made = module.get_config(variant) if variant else module.get_config()
    if not isinstance(made, ConfigDict):
        raise Refused(
            f"--config={path}: get_config() returns {type(made).__name__}, expected"
            " core.build.experiment(...)"
        )
    return made


def _near(path: str) -> str:
    """The end of the message about a config file that does not exist: the nearest name.

    Names are those in the same folder and in the checkout.
    """
    folder = Path(path).parent
    beside = folder.glob("*.py") if folder.is_dir() else ()
    names = [str(file) for file in beside]
    names += [
        str(file.relative_to(ROOT)) for file in (ROOT / "configs").rglob("[!_]*.py")
    ]
    close = difflib.get_close_matches(path, names, 1)
    return f"; did you mean {close[0]!r}?" if close else ", here or in the checkout"


@contextlib.contextmanager
def _in_file(path: str, file: Path) -> Iterator[None]:
    """Makes refusals with file and line of exceptions in the Python code of a config."""
    try:
        yield
    except Refused as error:
        raise Refused(f"{path}: {error}") from error
    except SyntaxError as error:
        raise Refused(f"{path}:{error.lineno}: {error.msg}") from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [
            1,
            *(frame.lineno for frame in frames if frame.filename == str(file)),
        ]
        first = (str(error).strip().splitlines() or [""])[0]
        raise Refused(
            f"{path}:{lines[-1]}: {type(error).__name__}: {first}"
        ) from error


def override(config: ConfigDict, path: str, text: str) -> None:
    """Sets the value at the dotted key `path` to `text`, read as a value of the present type.

    Raises:
        Refused: There is no such key, or the text is not of that type.
    """
    keys_left = path.split(".")
    node = config
    where = "config"
    while keys_left:
        given = keys_left.pop(0)
        name, *inside = _current(node, given).split(".")
        keys_left = [*inside, *keys_left]
        if not isinstance(node, ConfigDict) or name not in node:
            keys = list(node) if isinstance(node, ConfigDict) else []
            near = nearest(name, keys) if keys else ""
            raise Refused(f"--config.{path}: {where} has no key {name!r}{near}")
        parent = node
        node = node[name]
        where = f"{where}.{name}"
    if isinstance(node, ConfigDict):
        parent[name] = _group(path, parent, given, text)
    elif name == "name" and isinstance(node, str) and text != node:
        _change_class(path, parent, text)
    else:
        parent[name] = _read(path, text, node)


def _group(path: str, parent: ConfigDict, key: str, text: str) -> ConfigDict:
    """The group that `text` stands for, where an earlier version had text in its place."""
    fields = {}
    if isinstance(parent.get("name"), str):
        fields = current_fields(resolve(parent["name"]), {key: text})
    for value in fields.values():
        if isinstance(value, Mapping):
            return plain(build(value)).lock()
    keys = ", ".join(parent[_current(parent, key)])
    raise Refused(f"--config.{path}: is a group; its keys are {keys}")


def _change_class(path: str, group: ConfigDict, name: str) -> None:
    """Makes `group` one of another class: fields that both have keep their values."""
    cls = resolve(name)
    names = (
        {f.name for f in dataclasses.fields(cls)}
        if dataclasses.is_dataclass(cls)
        else set()
    )
    fresh = spec(
        name, **{key: value for key, value in group.items() if key in names}
    )
    with group.unlocked():
        for key in set(group) - set(fresh):
            del group[key]
        for key in set(fresh) - set(group):
            group[key] = fresh[key]
    group["name"] = name


def _current(node: Any, key: str) -> str:
    """The new name of a key of a config's group, where the field has been renamed."""
    if (
        not isinstance(node, ConfigDict)
        or key in node
        or not isinstance(node.get("name"), str)
    ):
        return key
    return current_field(resolve(node["name"]), key)


def _read(path: str, text: str, old: Any) -> Any:
    """`text` as a value of the type of `old`. Raises Refused where it is none."""
    kind = type(old)
    if kind is str:
        return text
    if kind is bool:
        if text.lower() in (*TRUE, *FALSE):
            return text.lower() in TRUE
        raise Refused(f"--config.{path}={text}: expected true or false")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise Refused(
            f"--config.{path}={text[:80]}: expected {kind.__name__}, as in {old!r}"
        ) from None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind in (tuple, list):
        return _sequence(path, text, value, old)
    if type(value) is not kind:
        raise Refused(
            f"--config.{path}={text}: expected {kind.__name__}, as in {old!r}"
        )
    return value


def _sequence(path: str, text: str, value: Any, old: tuple | list) -> tuple | list:
    """`value` as a sequence of the types of `old` and its members. Raises Refused."""
    kind = type(old)
    members = value if isinstance(value, (tuple, list)) else (value,)
    if not old:
        return kind(members)
    inner = type(old[0])
    if inner is float:
        members = [float(v) if type(v) is int else v for v in members]
    if any(type(v) is not inner for v in members):
        raise Refused(
            f"--config.{path}={text}: expected {kind.__name__} of {inner.__name__}, as in {old!r}"
        )
    return kind(members)


def needed(
    values: Mapping[str, Any], config: ConfigDict | None
) -> tuple[ConfigDict, Path]:
    """(config, workdir) of a command that needs both. Raises Refused where one is missing."""
    if not values["workdir"]:
        raise Refused("--workdir=DIR is needed")
    workdir = local(values["workdir"], "--workdir")
    if config is None:
        raise Refused(f"--config=FILE is needed ({values['workdir']} holds no run)")
    return config, workdir


def whole(
    values: Mapping[str, Any], key: str, least: int, most: int = 2**31 - 1
) -> int:
    """An argument as an integer. Raises Refused outside of `least` to `most`."""
    text = values[key]
    if not re.fullmatch(r"-?[0-9]{1,18}", text) or not least <= int(text) <= most:
        expected = f"an integer of at least {least}"
        if text.isdecimal() and int(text[:19]) > most:
            expected += f", at most {most}"
        raise Refused(f"--{key}={text[:40]}: expected {expected}")
    return int(text)


def decimal(
    values: Mapping[str, Any],
    key: str,
    least: float,
    most: float = math.inf,
    above: bool = False,
) -> float:
    """An argument as a finite number.

    Raises:
        Refused: It is outside of `least` to `most`, or, with `above`, equal to `least`.
    """
    text = values[key]
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    in_range = math.isfinite(value) and least <= value <= most
    if in_range and not (above and value == least):
        return value
    if above:
        wanted = f"above {least:g}"
    elif math.isfinite(most):
        wanted = f"from {least:g} to {most:g}"
    else:
        wanted = f"of at least {least:g}"
    raise Refused(f"--{key}={text[:40]}: expected a number {wanted}")


def shares(values: Mapping[str, Any], key: str, own: Path) -> dict[Path, float]:
    """An argument "FOLDER:WEIGHT,FOLDER" as folder -> weight, which is 1 where it is left out.

    Args:
        values: The arguments.
        key: The key of this one.
        own: The folder that "." stands for.

    Raises:
        Refused: A weight is no finite number, or a folder is given twice.
    """
    found = {}
    for text in filter(None, values[key].split(",")):
        place, colon, number = text.rpartition(":")
        if not colon:
            place, number = text, "1"
        folder = own if place == "." else local(place, f"--{key}")
        if folder in found:
            raise Refused(f"--{key}={text}: {place} is given twice")
        weight = math.nan
        with contextlib.suppress(ValueError):
            weight = float(number)
        if not place or not math.isfinite(weight):
            raise Refused(
                f"--{key}={text}: expected FOLDER:WEIGHT, such as {own}:0.5"
            )
        found[folder] = weight
    return found


def output(
    values: Mapping[str, Any],
    key: str,
    suffixes: Sequence[str] = (),
    folder: bool = False,
) -> Path | None:
    """The path of an argument that names a file, or a folder, to write; checked before any work.

    Args:
        values: The arguments.
        key: The key of this one.
        suffixes: Those that the file may have; empty for any.
        folder: Whether it is a folder.

    Returns:
        The path; None where the argument is empty.

    Raises:
        Refused: It cannot be written.
    """
    text = values[key]
    if not text:
        return None
    path = Path(text)
    shown = text[:80]
    local(text, f"--{key}")
    parts = path.absolute().parts
    if (
        not text.isprintable()
        or max(len(os.fsencode(part)) for part in parts) > 255
    ):
        raise Refused(
            f"--{key}={shown!r}: expected the name of a {'folder' if folder else 'file'}"
        )
    if not folder and (
        (path.is_dir() and "" not in suffixes) or text.endswith(("/", "."))
    ):
        raise Refused(
            f"--{key}={shown}: is a folder, expected a file such as"
            f" {shown.rstrip('/.')}/out{''.join(suffixes[:1])}"
        )
    if folder and path.exists() and not path.is_dir():
        raise Refused(f"--{key}={shown}: is a file, expected a folder")
    if suffixes and path.suffix not in suffixes:
        wanted = " or ".join(filter(None, suffixes))
        raise Refused(f"--{key}={shown}: expected a name that ends in {wanted}")
    absolute = path.absolute()
    existing = next(
        place for place in (absolute, *absolute.parents) if os.path.lexists(place)
    )
    if existing != absolute and not existing.is_dir():
        raise Refused(f"--{key}={shown}: {existing} is no folder")
    if not os.access(existing, os.W_OK):
        raise Refused(f"--{key}={shown}: {existing} cannot be written to")
    return path
