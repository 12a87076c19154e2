"""What the commands share: arguments, configs from files, refusals in one line, exit codes."""

from __future__ import annotations

import ast
import contextlib
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

from jaxdistill.core.build import current_field, resolve
from jaxdistill.core.types import Refused, nearest
from jaxdistill.run.host import keep_freed_memory, listen
from jaxdistill.run.records import local, read_config

ROOT = Path(__file__).resolve().parents[1]  # the checkout
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: stopped with work left, run it again


def main(command: Callable[[list[str]], None], usage: str = "") -> None:
    """Runs a command, or prints `usage` (else its file's docstring) for -h and --help, and exits
    with

    0   done;
    2   refused: bad input, or a folder that is of another run or damaged; a rerun would be refused
    again;
    75  stopped by SIGTERM or Ctrl-C with work left: the same command goes on from what was saved;
    1   anything else: a loss that is no number, a full disk, a read error, a lost process. The last
    good checkpoint stays.

    Whatever the code is, the reason is one line on stderr; with JAXDISTILL_TRACEBACK set, what it
    came from stands before it.
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
        _end(
            1,
            f"failed: out of memory{f' ({error})' if str(error) else ''}; the last good"
            " checkpoint is kept",
        )
    except KeyboardInterrupt:
        _end(STOPPED, "interrupted; nothing saved since the last checkpoint, run again to go on")


def _mute_leftovers() -> None:
    """Keeps off stderr what orbax and tensorstore leave of reads and writes that waited for one
    that failed.
    """
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    usual = sys.unraisablehook

    def hook(found: Any) -> None:
        text = f"{found.object!r} {found.exc_value!r}"
        if not any(
            name in text for name in ("Event loop is closed", "_read_array", "async_serialize")
        ):
            usual(found)

    sys.unraisablehook = hook


def _end(code: int, line: str) -> None:
    print(" ".join(line.split()), file=sys.stderr)
    sys.exit(code)


def _machine(error: OSError) -> str:
    """What the operating system said, and of which file."""
    said = error.strerror or str(error) or type(error).__name__
    return f"{error.filename}: {said}" if error.filename else said


def asks_for_help(argv: Sequence[str]) -> bool:
    """Whether -h or --help is among a command's own arguments; those after -- are another's."""
    own = argv[: argv.index("--")] if "--" in argv else argv
    return not {"-h", "--help"}.isdisjoint(own)


def no_command(argv: list[str]) -> None:
    """What a file of tools/ does that others import."""
    raise Refused(
        f"{Path(sys.argv[0]).name}: no command of its own, others import it; --help says what it"
        " holds"
    )


def join(distributed: bool) -> None:
    """Joins the other processes of the run, before anything else touches JAX.

    `launch.local_cluster` says through the environment who they are (JAXDISTILL_COORDINATOR,
    _PROCESSES, _PROCESS);
    with `distributed`, JAX finds out by itself on Cloud TPU, GKE and Slurm. Raises Refused where it
    finds nothing to join, OSError where the others do not come.
    """
    import jax

    if "JAXDISTILL_PROCESS" in os.environ:
        number = lambda name: int(os.environ[f"JAXDISTILL_{name}"])
        jax.distributed.initialize(
            os.environ["JAXDISTILL_COORDINATOR"],
            number("PROCESSES"),
            number("PROCESS"),
            heartbeat_timeout_seconds=number("HEARTBEAT"),
        )
    elif distributed:
        try:
            jax.distributed.initialize()
        except ValueError as error:  # JAX found no coordinator
            raise Refused(
                "--distributed: found no TPU slice, no job of GKE and none of Slurm to join;"
                " several processes of one machine "
                "are started by launch.local_cluster"
            ) from error
        except RuntimeError as error:  # the others did not come
            raise OSError(f"--distributed: {str(error).strip().splitlines()[0]}") from error


def arguments(
    argv: Sequence[str], known: Mapping[str, Any]
) -> tuple[dict[str, Any], ConfigDict | None]:
    """`--key=value` or `--key value` for the keys of `known` (defaults; a bool takes no value), and
    the config.

    `--config=FILE[:variant]` calls FILE's get_config; `--config.a.b=value` replaces a value by one
    of its own type.
    Raises Refused on anything else.
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
            if given and value.lower() not in ("0", "false", "1", "true"):
                raise Refused(f"--{key}={value}: expected true or false, or nothing, which is true")
            values[key] = value.lower() not in ("0", "false")
            continue
        if not given:
            if not words or words[0].startswith("--"):
                raise Refused(f"--{key} needs a value")
            value = words.pop(0)
        if key.startswith("config."):
            overrides[key.removeprefix("config.")] = value
        else:
            values[key] = value
    config = None
    if values.get("config"):
        config = load_config(values["config"])
    elif values.get("workdir") and (local(values["workdir"], "--workdir") / "config.json").exists():
        config = read_config(local(values["workdir"], "--workdir")).lock()
    if overrides and config is None:
        raise Refused("--config.key=value needs --config=FILE")
    for path, value in overrides.items():
        override(config, path, value)
    return values, config


def load_config(name: str) -> ConfigDict:
    """The config of FILE or FILE:variant; a relative FILE is looked up in the current folder, then
    in the checkout's.

    Raises Refused where there is no such file or it has no get_config.
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
    module = importlib.util.module_from_spec(
        spec := importlib.util.spec_from_file_location("config_file", file)
    )
    with _in_file(path, file):
        spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise Refused(f"--config={path}: defines no get_config()")
    if variant and not inspect.signature(module.get_config).parameters:
        raise Refused(f"--config={name}: {path} has no variants, expected --config={path}")
    with _in_file(path, file):
        made = module.get_config(variant) if variant else module.get_config()
    if not isinstance(made, ConfigDict):
        raise Refused(
            f"--config={path}: get_config() returns {type(made).__name__}, expected"
            " core.build.experiment(...)"
        )
    return made


def _near(path: str) -> str:
    """The existing config whose name is nearest, in the same folder or in the checkout."""
    shown = lambda file: str(file.relative_to(ROOT)) if file.is_relative_to(ROOT) else str(file)
    beside = Path(path).parent.glob("*.py") if Path(path).parent.is_dir() else ()
    names = [*map(str, beside), *map(shown, (ROOT / "configs").rglob("[!_]*.py"))]
    close = difflib.get_close_matches(path, names, 1)
    return f"; did you mean {close[0]!r}?" if close else ", here or in the checkout"


@contextlib.contextmanager
def _in_file(path: str, file: Path) -> Iterator[None]:
    """Turns what goes wrong in a config's own Python into a refusal that names file and line."""
    try:
        yield
    except Refused as error:
        raise Refused(f"{path}: {error}") from error
    except SyntaxError as error:
        raise Refused(f"{path}:{error.lineno}: {error.msg}") from error
    except Exception as error:
        lines = [
            f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)
        ]
        first = (str(error).strip().splitlines() or [""])[0]
        raise Refused(
            f"{path}:{lines[-1] if lines else 1}: {type(error).__name__}: {first}"
        ) from error


def override(config: ConfigDict, path: str, text: str) -> None:
    """Sets `path` (dotted) to `text`, read as a value of the type that stands there. Raises
    Refused.
    """
    *parents, last = path.split(".")
    node = config
    walked = "config"
    for given in [*parents, last]:
        name = _current(node, given)
        if not isinstance(node, ConfigDict) or name not in node:
            keys = list(node) if isinstance(node, ConfigDict) else []
            raise Refused(
                f"--config.{path}: {walked} has no key"
                f" {name!r}{nearest(name, keys) if keys else ''}"
            )
        parent = node
        node = node[name]
        walked = f"{walked}.{name}"
    if isinstance(node, ConfigDict):
        raise Refused(f"--config.{path}: is a group; its keys are {', '.join(node)}")
    parent[name] = _read(path, text, node)


def _current(node: Any, key: str) -> str:
    """The name today of the key `key` of a config's group."""
    if not isinstance(node, ConfigDict) or key in node or not isinstance(node.get("name"), str):
        return key
    return current_field(resolve(node["name"]), key)


def _read(path: str, text: str, old: Any) -> Any:
    kind = type(old)
    if kind is str:
        return text
    if kind is bool:
        if text.lower() in ("true", "1", "false", "0"):
            return text.lower() in ("true", "1")
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
        value = value if isinstance(value, (tuple, list)) else (value,)
        inner = type(old[0]) if old else None
        value = kind(float(v) if inner is float and type(v) is int else v for v in value)
        if inner and any(type(v) is not inner for v in value):
            raise Refused(
                f"--config.{path}={text}: expected {kind.__name__} of {inner.__name__}, as in"
                f" {old!r}"
            )
        return value
    if type(value) is not kind:
        raise Refused(f"--config.{path}={text}: expected {kind.__name__}, as in {old!r}")
    return value


def needed(values: Mapping[str, Any], config: ConfigDict | None) -> tuple[ConfigDict, Path]:
    """Config and workdir of a command that cannot do without. Raises Refused."""
    if not values["workdir"]:
        raise Refused("--workdir=DIR is needed")
    workdir = local(values["workdir"], "--workdir")
    if config is None:
        raise Refused(f"--config=FILE is needed ({values['workdir']} holds no run)")
    return config, workdir


def whole(values: Mapping[str, Any], key: str, least: int, most: int = 2**31 - 1) -> int:
    """An argument as an integer. Raises Refused outside of `least` to `most`."""
    text = values[key]
    if not re.fullmatch(r"-?[0-9]{1,18}", text) or not least <= int(text) <= most:
        large = text.isdecimal() and int(text[:19]) > most
        raise Refused(
            f"--{key}={text[:40]}: expected an integer of at least {least}"
            + f", at most {most}" * large
        )
    return int(text)


def decimal(
    values: Mapping[str, Any], key: str, least: float, most: float = math.inf, above: bool = False
) -> float:
    """An argument as a finite number. Raises Refused outside of `least` to `most`, or, with
    `above`, at `least` itself.
    """
    text = values[key]
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or not least <= value <= most or (above and value == least):
        fits = (
            f"above {least:g}"
            if above
            else f"from {least:g} to {most:g}"
            if math.isfinite(most)
            else f"of at least {least:g}"
        )
        raise Refused(f"--{key}={text[:40]}: expected a number {fits}")
    return value


def output(
    values: Mapping[str, Any], key: str, suffixes: Sequence[str] = (), folder: bool = False
) -> Path | None:
    """Where an argument says that a file (of one of `suffixes`), or with `folder` files, shall be;
    None where it says nothing.

    Asked before the work begins. Raises Refused where nothing could be written there.
    """
    text = values[key]
    if not text:
        return None
    path = Path(text)
    shown = text[:80]
    local(text, f"--{key}")
    if (
        not text.isprintable()
        or max(len(os.fsencode(part)) for part in path.absolute().parts) > 255
    ):
        raise Refused(f"--{key}={shown!r}: expected the name of a {'folder' if folder else 'file'}")
    if not folder and ((path.is_dir() and "" not in suffixes) or text.endswith(("/", "."))):
        raise Refused(
            f"--{key}={shown}: is a folder, expected a file such as"
            f" {shown.rstrip('/.')}/out{''.join(suffixes[:1])}"
        )
    if folder and path.exists() and not path.is_dir():
        raise Refused(f"--{key}={shown}: is a file, expected a folder")
    if suffixes and path.suffix not in suffixes:
        raise Refused(
            f"--{key}={shown}: expected a name that ends in {' or '.join(filter(None, suffixes))}"
        )
    held = next(
        parent for parent in (path.absolute(), *path.absolute().parents) if os.path.lexists(parent)
    )
    if held != path.absolute() and not held.is_dir():
        raise Refused(f"--{key}={shown}: {held} is no folder")
    if not os.access(held, os.W_OK):
        raise Refused(f"--{key}={shown}: {held} cannot be written to")
    return path
