"""What a run's folder says of itself (config.json, report.json, metrics.jsonl, stages/), read in
one place.

Every reader raises Refused with one line that names the file where its content is damaged; what the
operating system says (no permission, a read error) stays an OSError.
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

from jaxdistill.core.build import Run, completed, current
from jaxdistill.core.types import Refused, one_line, quoted

FREE = (
    "log_every",
    "sample_every",
    "eval_every",
    "checkpoint_every",
    "keep",
    "tensorboard",
    "wandb",
    "mesh",
)  # a run may go on with others
RESERVED = (
    "stages",
    "checkpoints",
    "samples",
    "tensorboard",
    "data",
    "damaged",
    "export",
)  # folders of a run's own
JUDGED = ("evaluation", "claim")  # what `launch.evaluate` may give other values
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")  # pathlib makes one slash of two
NUMBER = (int, float)


def local(place: str | Path, what: str) -> Path:
    """`place` as a path of this machine, `~` read as the user's folder.

    Raises Refused where it is the address of an object store, or anything else with a scheme.

    `what` is the argument or the key of the config that gave it, for the message.
    """
    if "\0" in str(place):
        raise Refused(f"{what}={place}: expected a path, without a zero byte")
    if str(place).startswith("~") and os.path.expanduser(place) == str(place):
        raise Refused(f"{what}={place}: no such user")
    if found := SCHEME.match(str(place)):
        raise Refused(
            f"{what}={place}: {found[1]}:// is not supported, expected a folder of this machine"
            " (mount the bucket, with gcsfuse "
            "or Mountpoint for S3, and give the folder)"
        )
    try:
        return Path(os.path.expanduser(place))
    except (RuntimeError, ValueError) as error:
        raise Refused(f"{what}={place}: {one_line(error)}") from error


def read_text(file: Path) -> str:
    """A file's text. Raises Refused where it is none in UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise Refused(f"{file}: is no UTF-8 text (byte {error.start})") from error


def parse(text: str, where: str) -> Any:
    """JSON. Raises Refused, which begins with `where`, where it is torn."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise Refused(f"{where}: is no JSON ({error})") from error
    except RecursionError as error:
        raise Refused(f"{where}: is no JSON that can be read (too deep)") from error


def check_keys(found: Any, wanted: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`found`, where it is an object that has every key of `wanted` with a value of that type (or
    one of a tuple of types).

    True is no number, and neither is a whole one that no float can hold. Raises Refused.
    """
    if not isinstance(found, dict):
        raise Refused(
            f"{where}: is {quoted(found)}, expected an object with the keys {', '.join(wanted)}"
        )
    for key, kinds in wanted.items():
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        if key not in found:
            raise Refused(f"{where}: has no key {key!r}")
        value = found[key]
        if (
            not isinstance(value, kinds)
            or (isinstance(value, bool) and bool not in kinds)
            or not _holds(value)
        ):
            raise Refused(
                f"{where}: {key} is {quoted(value)}, expected"
                f" {' or '.join(kind.__name__ for kind in kinds)}"
            )
    return found


def _holds(value: Any) -> bool:
    """Whether a float can hold this number; true of all that is none."""
    return not isinstance(value, int) or -(2**1023) < value < 2**1023


def read_config(workdir: Path) -> ConfigDict:
    """The config of the run in `workdir`, with today's names of files and fields.

    Raises Refused where there is none, or a part of it is missing.
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
    wanted = {
        f.name: dict if dataclasses.is_dataclass(f.default) else type(f.default)
        for f in dataclasses.fields(Run)
    }
    wanted |= dict.fromkeys(("method", "data", "evaluation", "claim", "roles", "runs"), dict)
    check_keys(found, wanted, where)
    for name, role in found["roles"].items():
        check_keys(role, {"name": str}, f"{where}: roles.{quoted(name)}")
    for key in ("method", "data"):
        check_keys(found[key], {"name": str}, f"{where}: {key}")
    for name, inner in found["runs"].items():
        _check_config(inner, f"{where}: runs.{quoted(name)}")


def read_report(workdir: Path) -> dict[str, Any]:
    """The report.json of a finished run. Raises Refused where there is none, or a part of it is
    missing or none that a run writes.
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
    name = check_keys(found["config"]["method"], {"name": str}, f"{file}: config.method")["name"]
    if found["method"] != name:
        raise Refused(
            f"{file}: method is {quoted(found['method'])}, expected that of its config,"
            f" {quoted(name)}"
        )
    for i, row in enumerate(found["models"]):
        check_keys(row, {"name": str, "nfe": int}, f"{file}: models[{i}]")
        _check_range(row["nfe"], 1, f"{file}: models[{i}]: nfe")
        check_keys(row, {key: type(value) for key, value in row.items()}, f"{file}: models[{i}]")
    if found["claim"]:
        names = dict.fromkeys(("metric", "model", "against", "better"), str)
        values = dict.fromkeys(("value", "baseline", "bound"), NUMBER)
        check_keys(found["claim"], names | values | {"holds": bool}, f"{file}: claim")
    return found


def _check_range(value: float, least: int, where: str) -> None:
    """Raises Refused where a number is less than `least` or not finite."""
    if not least <= value < math.inf:
        raise Refused(f"{where} is {quoted(value)}, expected {least} or more")


def read_lines(file: Path, *, clock: bool = False) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, none where there is no such file; a last line that was cut
    short is left out.

    Raises Refused, which names the line, where another one is no record: an object with a step and,
    where `clock` is asked for, the seconds.
    """
    lines = file.read_bytes().split(b"\n") if file.exists() else []
    while lines and not lines[-1].strip():
        lines.pop()
    records = []
    for i, line in enumerate(lines, 1):
        where = f"{file}:{i}"
        try:
            found = parse(line.decode(), where)
        except UnicodeDecodeError as error:
            if i < len(lines):
                raise Refused(f"{where}: is no UTF-8 text (byte {error.start})") from error
            break
        except Refused:
            if i < len(lines):
                raise
            break
        check_keys(found, {"step": int} | ({"seconds": NUMBER} if clock else {}), where)
        if clock and not math.isfinite(found["seconds"]):
            raise Refused(f"{where}: seconds is {found['seconds']}, expected a number")
        records.append(check_keys(found, dict.fromkeys(found, (*NUMBER, type(None))), where))
    return records


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Values of a nested mapping under their dotted keys."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    return {
        k: v
        for name, sub in tree.items()
        for k, v in flat(sub, f"{prefix}.{name}" if prefix else name).items()
    }


def difference(
    there: Mapping[str, Any], here: Mapping[str, Any], free: tuple[str, ...] = FREE
) -> str:
    """Where two configs (as JSON) are of different runs: the first such key and both values, as a
    part of a sentence; "" where nowhere. Keys of the top level in `free` may differ, and fields
    that a class has gained since are at their defaults.
    """
    there = flat(completed(there))
    here = flat(completed(here))
    changed = [
        k
        for k in sorted(there.keys() | here.keys())
        if there.get(k) != here.get(k) and k.split(".")[0] not in free
    ]
    if not changed:
        return ""
    more = f" (and {len(changed) - 1} more)" if changed[1:] else ""
    return f"{changed[0]} is {there.get(changed[0])!r} there, {here.get(changed[0])!r} here{more}"


def check_result(workdir: Path, config: ConfigDict, free: tuple[str, ...] = FREE) -> None:
    """Raises Refused where `workdir` has a report.json, and that is of another config."""
    if not (workdir / "report.json").exists():
        return
    if changed := difference(read_report(workdir)["config"], json.loads(config.to_json()), free):
        judged = changed.split(".")[0].split(" ")[0] in JUDGED
        advice = (
            "launch.evaluate makes it anew"
            if judged
            else "config.json was changed after the run; put it back, or give another --workdir"
        )
        raise Refused(f"{workdir / 'report.json'} is of another config: {changed}; {advice}")


def stages(workdir: Path) -> list[Path]:
    """The results of the stages that are done, in order. Raises Refused where one is missing before
    the last, or a result is no folder.
    """
    folder = workdir / "stages"
    if not folder.exists():
        return []
    if not folder.is_dir():
        raise Refused(f"{folder}: is a file, expected the folder of the stages' results")
    numbers = sorted(
        int(p.name) for p in folder.iterdir() if re.fullmatch(r"0|[1-9][0-9]{0,8}", p.name)
    )
    for i, number in enumerate(numbers):
        if number != i:
            raise Refused(f"{folder}: stage {number} is there, stage {i} before it is missing")
        if not (folder / str(i)).is_dir():
            raise Refused(f"{folder / str(i)}: is a file, expected a stage's result")
    return [folder / str(i) for i in numbers]
