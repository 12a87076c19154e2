"""Seeded damage to files, and what a reader may do with them: refuse in one line, without running
or writing anything.

A mutator is `(file, rng) -> str`: it damages the file in place and says how. `DAMAGE` lists those
for any file, `JSON_DAMAGE` those for JSON files. The same seed does the same on every machine.

    rng = np.random.default_rng(0)
    how = damage(file, rng)  # one of DAMAGE, or of JSON_DAMAGE too where the file is JSON
    with quiet(folder):  # AssertionError where something was run, asked or written
        message = outcome(lambda: read(file))  # None where accepted, else the refusal's line
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxdistill.core.types import Refused

Mutator = Callable[[Path, np.random.Generator], str]
ODD: tuple[Any, ...] = (  # what a value of a JSON file is replaced by
    None,
    True,
    False,
    0,
    1,
    -1,
    7,
    10**12,
    10**400,
    -(2**63),
    0.5,
    -0.25,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "8",
    "ghost",
    "../../x",
    "/etc/passwd",
    "a\nb",
    "\ud800",
    [],
    [None],
    [1, "2"],
    [[1]],
    {},
    {"a": 1},
    {"": []},
)


def truncate(file: Path, rng: np.random.Generator) -> str:
    """Cuts the file behind any of its bytes."""
    data = file.read_bytes()
    size = int(rng.integers(0, max(len(data), 1)))
    file.write_bytes(data[:size])
    return f"{file.name}: cut to {size} of {len(data)} bytes"


def flip(file: Path, rng: np.random.Generator, end: int | None = None) -> str:
    """Flips one bit in each of 1 to 4 bytes, before `end` where it is given."""
    data = bytearray(file.read_bytes())
    places = rng.integers(
        0, max(min(end or len(data), len(data)), 1), int(rng.integers(1, 5))
    )
    for place in places if data else ():
        data[place] ^= 1 << int(rng.integers(0, 8))
    file.write_bytes(data)
    return f"{file.name}: bits flipped in bytes {places.tolist()}"


def splice(file: Path, rng: np.random.Generator) -> str:
    """Puts a piece of the file over another place of it."""
    data = file.read_bytes()
    size = int(rng.integers(1, max(len(data) // 4, 2)))
    start, to = (int(n) for n in rng.integers(0, max(len(data) - size, 1), 2))
    file.write_bytes(data[:to] + data[start : start + size] + data[to + size :])
    return f"{file.name}: {size} bytes from {start} put over those at {to}"


def noise(file: Path, rng: np.random.Generator) -> str:
    """Random bytes over a piece of the file."""
    data = file.read_bytes()
    size = int(rng.integers(1, max(len(data) // 4, 2)))
    to = int(rng.integers(0, max(len(data) - size, 1)))
    file.write_bytes(data[:to] + rng.bytes(size) + data[to + size :])
    return f"{file.name}: {size} random bytes at {to}"


def empty(file: Path, rng: np.random.Generator) -> str:
    """Leaves 0 bytes, or as many zeros as there were bytes."""
    data = b"\0" * len(file.read_bytes()) if rng.integers(2) else b""
    file.write_bytes(data)
    return f"{file.name}: {len(data)} zeros"


def duplicate(file: Path, rng: np.random.Generator) -> str:
    """Repeats a piece of the file behind itself."""
    data = file.read_bytes()
    start, end = sorted(int(n) for n in rng.integers(0, len(data) + 1, 2))
    file.write_bytes(data[:end] + data[start:end] + data[end:])
    return f"{file.name}: bytes {start} to {end} twice"


def remove(file: Path, rng: np.random.Generator) -> str:
    """Deletes the file."""
    file.unlink()
    return f"{file.name}: gone"


def replace_value(file: Path, rng: np.random.Generator) -> str:
    """Replaces one value of a JSON file, at any depth, by one of `ODD`."""
    value = _json(file)
    new = ODD[int(rng.integers(len(ODD)))]
    places = list(_places(value))
    holder, key = places[int(rng.integers(len(places)))] if places else (None, None)
    if holder is None:
        value = new
    else:
        holder[key] = new
    _write(file, value)
    return f"{file.name}: {key} is {str(new)[:40]!r}"


def delete_value(file: Path, rng: np.random.Generator) -> str:
    """Deletes one entry of an object or list of a JSON file, at any depth."""
    value = _json(file)
    places = list(_places(value))
    if not places:
        return empty(file, rng)
    holder, key = places[int(rng.integers(len(places)))]
    del holder[key]
    _write(file, value)
    return f"{file.name}: {key} deleted"


def swap_values(file: Path, rng: np.random.Generator) -> str:
    """Exchanges two values of a JSON file."""
    value = _json(file)
    places = list(_places(value))
    if len(places) < 2:
        return replace_value(file, rng)
    (a, i), (b, j) = (
        places[int(n)] for n in rng.choice(len(places), 2, replace=False)
    )
    if any(_inside(x[k], y) for x, k, y in ((a, i, b), (b, j, a))):
        return replace_value(file, rng)
    a[i], b[j] = b[j], a[i]
    _write(file, value)
    return f"{file.name}: {i} and {j} exchanged"


def wrap(file: Path, rng: np.random.Generator) -> str:
    """Puts a JSON file's value into a list, a text, an object or deep brackets, or puts a byte
    order mark before it.
    """
    text = file.read_text(encoding="utf-8")
    kinds = {
        "list": f"[{text}]",
        "text": json.dumps(text),
        "object": f'{{"a": {text}}}',
        "depth": "[" * 200_000,
        "mark": "\ufeff" + text,
    }
    kind = str(rng.choice(sorted(kinds)))
    file.write_text(kinds[kind], encoding="utf-8")
    return f"{file.name}: in a {kind}"


def repeat_key(file: Path, rng: np.random.Generator) -> str:
    """Gives an object of a JSON file one of its keys twice, with different values."""
    value = _json(file)
    if not isinstance(value, dict) or not value:
        return replace_value(file, rng)
    key = str(rng.choice(sorted(value)))
    file.write_text(
        f"{{{json.dumps(key)}: 1, {json.dumps(value)[1:]}", encoding="utf-8"
    )
    return f"{file.name}: {key} twice"


DAMAGE: tuple[Mutator, ...] = (truncate, flip, splice, noise, empty, duplicate)
JSON_DAMAGE: tuple[Mutator, ...] = (
    replace_value,
    replace_value,
    replace_value,
    delete_value,
    swap_values,
    wrap,
    repeat_key,
)


def damage(file: Path, rng: np.random.Generator) -> str:
    """Applies one mutator at random: mostly one for JSON if the file is valid JSON, else one for
    any file.
    """
    mutators = (
        JSON_DAMAGE
        if file.suffix == ".json" and rng.random() < 0.75 and _sound(file)
        else DAMAGE
    )
    return mutators[int(rng.integers(len(mutators)))](file, rng)


def outcome(call: Callable[[], Any], *names: str) -> str | None:
    """None if `call` succeeds, or the message of its Refused; every other exception passes through.

    Raises AssertionError where the message is not one short line, or contains none of `names`.
    """
    try:
        call()
    except Refused as error:
        message = str(error)
        assert message and message.isprintable() and len(message) < 2000, (
            f"not one line: {message[:2000]!r}"
        )
        assert not names or any(name in message for name in names), (
            f"names none of {names}: {message}"
        )
        return message
    return None


def contents(folder: Path) -> dict[str, str]:
    """Every file under a folder with the hash of its bytes; of folders and links, what they are."""
    found = {}
    for path in sorted(folder.rglob("*")):
        kind = (
            f"link to {path.readlink()}"
            if path.is_symlink()
            else "folder"
            if path.is_dir()
            else ""
        )
        found[str(path.relative_to(folder))] = (
            kind or hashlib.sha256(path.read_bytes()).hexdigest()
        )
    return found


RUNS = (
    "pickle.find_class",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "builtins.input",
    "socket.connect",
)
_seen: list[list[str]] = []  # one list for each open `quiet`


def _listen(event: str, args: tuple) -> None:
    if _seen and event in RUNS:
        _seen[-1].append(f"{event}{str(args)[:200]}")


@contextlib.contextmanager
def quiet(folder: Path) -> Iterator[None]:
    """Raises AssertionError where the block unpickles a class, starts a process, reads from the
    terminal or connects to anything, or changes a file under `folder`.
    """
    if not hasattr(quiet, "hook"):
        quiet.hook = True
        sys.addaudithook(_listen)  # for good: such hooks cannot be taken back
    before = contents(folder)
    _seen.append([])
    try:
        yield
    finally:
        events = _seen.pop()
    assert not events, events
    assert contents(folder) == before


def _json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _sound(file: Path) -> bool:
    try:
        _json(file)
    except (ValueError, RecursionError):
        return False
    return True


def _write(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value), encoding="utf-8")


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(holder, key) of every value inside a JSON value."""
    pairs = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in pairs:
        yield value, key
        yield from _places(inner)


def _inside(value: Any, holder: Any) -> bool:
    """Whether `holder` is `value` or is contained in it."""
    return value is holder or any(inner is holder for inner, _ in _places(value))
