"""Readers of the files of a run: config.json, report.json, metrics.jsonl, stages/.

Each raises Refused, with one line that names the file, where the content is damaged. Errors of the
operating system (no permission, a read error) stay OSErrors.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxdistill.core.build import Run, build, completed, current, plain
from jaxdistill.core.types import Method, Refused, one_line, quoted

# Keys of a config with which a run may be resumed at other values.
FREE = (
    "log_every",
    "sample_every",
    "eval_every",
    "checkpoint_every",
    "keep",
    "tensorboard",
    "wandb",
    "mesh",
)
# Folders that a run makes in its own; no name of a run inside it.
RESERVED = (
    "stages",
    "checkpoints",
    "samples",
    "tensorboard",
    "data",
    "pools",
    "endpoints",
    "damaged",
    "export",
)
MEASURED = "measured.json"  # fields of the method that the run has measured
JUDGED = ("evaluation", "claim")  # keys that `launch.evaluate` may change
# Of an address; one slash, since pathlib makes one of two.
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
NUMBER = (int, float)


def local(place: str | Path, what: str) -> Path:
    """`place` as a path of this machine, with `~` expanded.

    Args:
        place: The path as the user gave it.
        what: The argument or the config's key that gave it, for the message.

    Raises:
        Refused: It is an address with a scheme, as of an object store.
    """
    if "\0" in str(place):
        raise Refused(f"{what}={place}: expected a path, without a zero byte")
    if str(place).startswith("~") and os.path.expanduser(place) == str(place):
        raise Refused(f"{what}={place}: no such user")
    if found := SCHEME.match(str(place)):
        raise Refused(
            f"{what}={place}: {found[1]}:// is not supported, expected a folder of this machine"
            " (mount the bucket, with gcsfuse or Mountpoint for S3, and give the folder)"
        )
    try:
        return Path(os.path.expanduser(place))
    except (RuntimeError, ValueError) as error:
        raise Refused(f"{what}={place}: {one_line(error)}") from error


def read_text(file: Path) -> str:
    """A file's text. Raises Refused where it is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise Refused(f"{file}: is no UTF-8 text (byte {error.start})") from error


def parse(text: str, where: str) -> Any:
    """The value of a JSON text. Raises Refused, beginning with `where`, where it is not JSON."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise Refused(f"{where}: is no JSON ({error})") from error
    except RecursionError as error:
        raise Refused(f"{where}: is no JSON that can be read (too deep)") from error


def check_keys(found: Any, wanted: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Checks keys and types of an object of JSON.

    Args:
        found: The object.
        wanted: Key -> type of its value, or a tuple of types. A bool is no number, and neither is
            an integer that is too large for a float.
        where: The beginning of the message.

    Returns:
        `found`.

    Raises:
        Refused: It is no object, or a key is missing or of another type.
    """
    if not isinstance(found, dict):
        raise Refused(
            f"{where}: is {quoted(found)}, expected an object with the keys {', '.join(wanted)}"
        )
    for key, kinds in wanted.items():
        if key not in found:
            raise Refused(f"{where}: has no key {key!r}")
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        value = found[key]
        if not _is_of(value, kinds):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise Refused(f"{where}: {key} is {quoted(value)}, expected {expected}")
    return found


def _is_of(value: Any, kinds: tuple[type, ...]) -> bool:
    """Whether a value is of one of these types; see `check_keys` for bools and large integers."""
    if isinstance(value, bool) and bool not in kinds:
        return False
    if isinstance(value, int) and not -(2**1023) < value < 2**1023:
        return False
    return isinstance(value, kinds)


def read_config(workdir: Path) -> ConfigDict:
    """The config of the run in `workdir`, with old names of files and fields replaced by new ones.

    Raises:
        Refused: There is none, or a part of it is missing.
    """
    file = workdir / "config.json"
    if not file.exists():
        raise Refused(f"{workdir}: no config.json, hence no run of ours")
    found = parse(read_text(file), str(file))
    _check_config(found, str(file))
    try:
        return ConfigDict(current(found))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise Refused(f"{file}: is no config ({one_line(error, 60)})") from error


def _check_config(found: Any, where: str) -> None:
    """Raises Refused where a key of a config is missing or of another type."""
    wanted = dict.fromkeys(
        ("method", "data", "evaluation", "claim", "roles", "runs"), dict
    )
    for field in dataclasses.fields(Run):
        is_group = dataclasses.is_dataclass(field.default)
        wanted[field.name] = dict if is_group else type(field.default)
    check_keys(found, wanted, where)
    for name, role in found["roles"].items():
        check_keys(role, {"name": str}, f"{where}: roles.{quoted(name)}")
    for key in ("method", "data"):
        check_keys(found[key], {"name": str}, f"{where}: {key}")
    for name, inner in found["runs"].items():
        _check_config(inner, f"{where}: runs.{quoted(name)}")


def measured(workdir: Path) -> dict[str, Any]:
    """The fields of the method that a run has measured so far, as in a config."""
    file = workdir / MEASURED
    if not file.exists():
        return {}
    return check_keys(parse(read_text(file), str(file)), {}, str(file))


def with_measured(workdir: Path, method: Method) -> Method:
    """The method with the fields that a run has measured.

    Raises Refused where measured.json is damaged, or has other fields than the method.
    """
    fields = measured(workdir)
    if not fields:
        return method
    described = {**plain(method).to_dict(), **fields}
    return build(ConfigDict(described), str(workdir / MEASURED))


def read_report(workdir: Path) -> dict[str, Any]:
    """The report.json of a finished run.

    Raises:
        Refused: There is none, a part of it is missing, or a value is not one that a run writes.
    """
    file = workdir / "report.json"
    if not file.exists():
        raise Refused(f"{workdir}: no report.json; has that run finished?")
    wanted = {
        "config": dict,
        "method": str,
        "steps": int,
        "seconds": NUMBER,
        "models": list,
        "claim": dict,
    }
    found = check_keys(parse(read_text(file), str(file)), wanted, str(file))
    _check_range(found["steps"], 1, f"{file}: steps")
    _check_range(found["seconds"], 0, f"{file}: seconds")
    check_keys(found["config"], {"method": dict, "seed": int}, f"{file}: config")
    name = check_keys(
        found["config"]["method"], {"name": str}, f"{file}: config.method"
    )["name"]
    if found["method"] != name:
        raise Refused(
            f"{file}: method is {quoted(found['method'])}, expected that of its config,"
            f" {quoted(name)}"
        )
    for i, row in enumerate(found["models"]):
        check_keys(row, {"name": str, "nfe": int}, f"{file}: models[{i}]")
        _check_range(row["nfe"], 1, f"{file}: models[{i}]: nfe")
        check_keys(
            row,
            {key: type(value) for key, value in row.items()},
            f"{file}: models[{i}]",
        )
    if found["claim"]:
        names = dict.fromkeys(("metric", "model", "against", "better"), str)
        values = dict.fromkeys(("value", "baseline", "bound"), NUMBER)
        check_keys(
            found["claim"], names | values | {"holds": bool}, f"{file}: claim"
        )
    return found


def _check_range(value: float, least: int, where: str) -> None:
    """Raises Refused where a number is less than `least` or not finite."""
    if not least <= value < math.inf:
        raise Refused(f"{where} is {quoted(value)}, expected {least} or more")


def read_lines(file: Path, *, clock: bool = False) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, without a last line that was cut short.

    Args:
        file: Its path; there are no records where no such file exists.
        clock: Whether a record must have seconds, too, besides a step.

    Raises:
        Refused: Another line is not a record; the message names the line.
    """
    lines = file.read_bytes().split(b"\n") if file.exists() else []
    while lines and not lines[-1].strip():
        lines.pop()
    wanted = {"step": int}
    if clock:
        wanted["seconds"] = NUMBER
    records = []
    for i, line in enumerate(lines, 1):
        where = f"{file}:{i}"
        try:
            found = parse(_decoded(line, where), where)
        except Refused:
            if i < len(lines):
                raise
            break
        check_keys(found, wanted, where)
        if clock and not math.isfinite(found["seconds"]):
            raise Refused(
                f"{where}: seconds is {found['seconds']}, expected a number"
            )
        check_keys(found, dict.fromkeys(found, (*NUMBER, type(None))), where)
        records.append(found)
    return records


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise Refused(f"{where}: is no UTF-8 text (byte {error.start})") from error


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of a nested mapping."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    found = {}
    for name, child in tree.items():
        found |= flat(child, f"{prefix}.{name}" if prefix else name)
    return found


def difference(
    there: Mapping[str, Any], here: Mapping[str, Any], free: tuple[str, ...] = FREE
) -> str:
    """The first difference between the configs of two runs, as a part of a sentence.

    Args:
        there: The config of one run, as JSON. Fields that its classes have gained since it was
            written are at their defaults.
        here: The config of the other.
        free: Keys of the top level that may differ.

    Returns:
        The key and both values; "" where the configs are the same.
    """
    there = flat(completed(there))
    here = flat(completed(here))
    compared = [
        key
        for key in sorted(there.keys() | here.keys())
        if key.split(".")[0] not in free
    ]
    changed = [key for key in compared if there.get(key) != here.get(key)]
    if not changed:
        return ""
    first = changed[0]
    more = f" (and {len(changed) - 1} more)" if changed[1:] else ""
    return f"{first} is {there.get(first)!r} there, {here.get(first)!r} here{more}"


def check_result(
    workdir: Path, config: ConfigDict, free: tuple[str, ...] = FREE
) -> None:
    """Raises Refused where the report.json in `workdir`, if there is one, is of another config."""
    file = workdir / "report.json"
    if not file.exists():
        return
    changed = difference(
        read_report(workdir)["config"], json.loads(config.to_json()), free
    )
    if not changed:
        return
    advice = "config.json was changed after the run; put it back, or give another --workdir"
    if re.split("[. ]", changed)[0] in JUDGED:
        advice = "launch.evaluate makes it anew"
    raise Refused(f"{file} is of another config: {changed}; {advice}")


def stages(workdir: Path) -> list[Path]:
    """The folders of the results of the finished stages, in order.

    Raises:
        Refused: One before the last is missing, or a result is no folder.
    """
    folder = workdir / "stages"
    if not folder.exists():
        return []
    if not folder.is_dir():
        raise Refused(
            f"{folder}: is a file, expected the folder of the stages' results"
        )
    names = [entry.name for entry in folder.iterdir()]
    numbers = [
        int(name) for name in names if re.fullmatch(r"0|[1-9][0-9]{0,8}", name)
    ]
    for i, number in enumerate(sorted(numbers)):
        if number != i:
            raise Refused(
                f"{folder}: stage {number} is there, stage {i} before it is missing"
            )
        if not (folder / str(i)).is_dir():
            raise Refused(
                f"{folder / str(i)}: is a file, expected a stage's result"
            )
    return [folder / str(i) for i in range(len(numbers))]
