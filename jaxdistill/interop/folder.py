"""Folders that an export writes: whole or not at all, and in the place of nothing but what an
export wrote.

An exported folder holds `.jaxdistill_export.json`, the list of its files with their sizes and
BLAKE2b digests. Only a folder that holds these files, as they were, and nothing else is replaced;
all others are refused before any work is done. Of files over 1 GiB, which take long to read, the
time of the last change stands for the digest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock
from safetensors import SafetensorError

from jaxdistill.core.types import Refused
from jaxdistill.interop.safetensors import write_json

MARKER = ".jaxdistill_export.json"
LARGE = 2**30  # bytes; files over it are known by their size and the time of their last change
LOCK = ".lock"  # held while a folder is written; of size 0, and gone at the end
RUN = ("stages", "checkpoints", "metrics.jsonl")  # what a run's folder has
INSIDE_A_RUN = ("stages", "checkpoints", "data", "tensorboard")  # folders that it reads again
LONGEST = "diffusion_pytorch_model-00001-of-00001.safetensors"  # file in an export


def replaceable(target: Path) -> Path:
    """Where an export to `target` is written: its path, with the links of its parents followed.
    Writes nothing.

    The name is free, an empty folder, or a folder that an export wrote and that holds nothing else.
    Raises Refused where it is not, and where nothing could be written: a run, another model,
    foreign or changed files, a link, a name that is too long, a folder that is read-only, the
    working folder or one above it.
    """
    with _in_one_line(target):
        if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+:/", str(target)):
            raise Refused(f"{target}: an export is written to a local folder; copy it from there")
        if target.name in ("", ".."):
            raise Refused(f"{target}: expected the name of a folder, as in export")
        place = target.parent.resolve() / target.name
        _check_length(place)
        here = Path.cwd()
        if place in (here, *here.parents):
            raise Refused(f"{target}: is the working folder or holds it; give another name")
        _check_parents(target, place)
        if place.is_symlink():
            raise Refused(f"{target}: is a link to {os.readlink(place)}; give a folder")
        if place.exists():
            _check_folder(target, place)
    return place


def _check_length(place: Path) -> None:
    """Raises OSError where the file system takes no such name, or path."""
    near = _nearest(place.parent)
    whole = (_beside(place, "new", "0" * 8) / LONGEST, place / LONGEST)
    for path in (*whole, *(near / part for part in place.relative_to(near).parts)):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.lstat()


def _nearest(folder: Path) -> Path:
    """The nearest folder above that is there, or itself."""
    return next(path for path in (folder, *folder.parents) if os.path.lexists(path))


def _check_parents(target: Path, place: Path) -> None:
    for parent in place.parents:
        if (
            parent.name in INSIDE_A_RUN
            and (run := parent.parent)
            and any((run / name).exists() for name in RUN)
        ):
            raise Refused(f"{target}: is inside {parent.name}/ of the run {run}; give another name")
    near = _nearest(place.parent)
    if not near.is_dir():
        raise Refused(f"{target}: {near} is a file, expected a folder")
    if not os.access(near, os.W_OK | os.X_OK):
        raise Refused(f"{target}: the folder {near} is read-only")


def _check_folder(target: Path, place: Path) -> None:
    if not place.is_dir():
        raise Refused(f"{target}: is a file, expected a folder or a free name")
    if os.path.ismount(place):
        raise Refused(f"{target}: is the root of a file system; give a folder inside it")
    written(target, place)


def written(target: Path, place: Path) -> list[str]:
    """The files and folders in the export at `place`, relative, what is in a folder after it; none
    in an empty one. Raises Refused, naming `target`, where anything else is there too.
    """
    if not any(place.iterdir()):
        return []
    if found := next((name for name in RUN if os.path.lexists(place / name)), None):
        raise Refused(f"{target}: is a run (it has {found}); give another name")
    if not os.path.lexists(place / MARKER):
        if (place / "config.json").exists() or (place / "adapter_config.json").exists():
            raise Refused(
                f"{target}: holds a model without {MARKER}, the list of what an export wrote "
                "(earlier versions left none); move it away, or give another name"
            )
        raise Refused(
            f"{target}: not empty and not a model folder that was exported; give another name"
        )
    listed = _read_marker(target, place)
    folders = {str(parent) for name in listed for parent in Path(name).parents}
    found = []
    for name, info in _walk(place):
        if name != MARKER and not (stat.S_ISDIR(info.st_mode) and name in folders):
            if name not in listed:
                raise Refused(
                    f"{target}: {name} was not written by an export; move it away, or give another name"
                )
            if not _as_listed(place / name, info, listed[name]):
                raise Refused(
                    f"{target}: {name} is not as it was exported; move it away, or give another name"
                )
        found.append(name)
    return found


def _walk(folder: Path, inside: str = "") -> Iterator[tuple[str, os.stat_result]]:
    """(relative name, what it is) of everything below a folder; links are not followed."""
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            info = entry.stat(follow_symlinks=False)
            yield inside + entry.name, info
            if stat.S_ISDIR(info.st_mode):
                yield from _walk(Path(entry.path), f"{inside}{entry.name}/")


def _entry(file: Path, info: os.stat_result) -> dict[str, Any]:
    """What the list says of a file: its bytes, and its digest or, of a large one, the nanoseconds
    of its last change.
    """
    if info.st_size > LARGE:
        return {"bytes": info.st_size, "changed_ns": info.st_mtime_ns}
    with file.open("rb") as opened:
        return {
            "bytes": info.st_size,
            "blake2b": hashlib.file_digest(opened, "blake2b").hexdigest(),
        }


def _as_listed(file: Path, info: os.stat_result, entry: dict[str, Any]) -> bool:
    """Whether a file is what `_entry` said of it; it is read only where its size is the same."""
    return (
        stat.S_ISREG(info.st_mode)
        and info.st_size == entry.get("bytes")
        and _entry(file, info) == entry
    )


def _read_marker(target: Path, place: Path) -> dict[str, dict[str, Any]]:
    """Name -> entry of the files of a finished export."""
    listed = _read_list(target, place)
    if not all(isinstance(entry, dict) for entry in listed.values()):
        raise Refused(
            f"{target}: {MARKER} has no digests, so that an edit would be lost (earlier versions left none); "
            "move it away, or give another name"
        )
    return listed


def _read_list(target: Path, place: Path) -> dict[str, Any]:
    marker = place / MARKER
    try:
        if marker.is_symlink():
            raise ValueError("a link")
        listed = json.loads(marker.read_text(encoding="utf-8"))["files"]
        if not isinstance(listed, dict) or not all(
            type(entry) in (dict, int) for entry in listed.values()
        ):
            raise ValueError("no list of files")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Refused(
            f"{target}: {MARKER} is damaged ({error}); move the folder away, or give another name"
        ) from error
    return listed


def _list(folder: Path) -> dict[str, dict[str, Any]]:
    """Name -> entry of all files in a folder but the list itself."""
    return {
        name: _entry(folder / name, info)
        for name, info in _walk(folder)
        if stat.S_ISREG(info.st_mode) and name != MARKER
    }


def _write_marker(folder: Path, listed: dict[str, dict[str, Any]] | None) -> None:
    """`listed` is None as long as the folder is being written."""
    text = json.dumps({"written_by": "jaxdistill", "files": listed}, indent=1)
    (folder / MARKER).write_text(text + "\n", encoding="utf-8")


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block ends, and vanishes if it raises:
    nothing half-written.

    An earlier export at `target` is replaced; until the new one is in its place the old one is
    there, or beside it as `.<name>.old-<id>`, from where the next export takes it back. What
    processes that were killed left beside it is removed. Raises Refused as `replaceable` does, at
    the start and again before the old one goes, and where the disk cannot be written.
    """
    place = replaceable(target)
    with _in_one_line(target):
        place.parent.mkdir(parents=True, exist_ok=True)
        _tidy(place)
        fresh = _beside(place, "new", secrets.token_hex(4))
        fresh.mkdir()
        lock = filelock.FileLock(fresh / LOCK)
        try:
            lock.acquire(blocking=False)
            _write_marker(fresh, None)
            with _named(fresh, target):
                yield fresh
            _write_marker(fresh, _list(fresh))
            _swap(target, place, fresh)
            (place / LOCK).unlink(missing_ok=True)
        finally:
            lock.release()
            shutil.rmtree(fresh, ignore_errors=True)


def _swap(target: Path, place: Path, fresh: Path) -> None:
    """`fresh` goes to `place`; of what is there nothing is lost that no export wrote."""
    replaceable(place)
    if not place.exists() or not any(place.iterdir()):
        fresh.rename(place)  # an empty folder gives way
        return
    old = fresh.with_name(fresh.name.replace(".new-", ".old-"))
    place.rename(old)
    try:
        names = written(target, old)
        fresh.rename(place)
    except BaseException:
        if not os.path.lexists(place):
            old.rename(place)
        raise
    _remove(old, names)


def _remove(folder: Path, names: list[str]) -> None:
    """Deletes what `written` found in a folder, the list of its files last, and the folder; what
    else is there stays.
    """
    with contextlib.suppress(OSError):
        for path in (folder / name for name in reversed(names) if name != MARKER):
            path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
        (folder / MARKER).unlink(missing_ok=True)
        folder.rmdir()


def _tidy(place: Path) -> None:
    """Ends what processes that were killed left beside `place`: half-written folders go, an export
    that was moved aside comes back where none has taken its place. Only what is ours is touched.
    """
    fresh = _beside(place, "new", "")
    moved = _beside(place, "old", "")
    mine = lambda stem: [
        path
        for path in place.parent.iterdir()
        if re.fullmatch(re.escape(stem.name) + "[0-9a-f]{8}", path.name)
    ]
    for folder in (path for path in mine(fresh) if path.is_dir() and not path.is_symlink()):
        with contextlib.suppress(OSError, Refused):
            if not (folder / MARKER).is_file():
                folder.rmdir()  # where it is empty
            elif _abandoned(folder):
                shutil.rmtree(folder)
    for old in (path for path in mine(moved) if path.is_dir() and not path.is_symlink()):
        if (fresh.parent / old.name.replace(".old-", ".new-")).exists():
            continue  # its process is at work
        with contextlib.suppress(OSError, Refused):
            names = written(old, old)
            if names and not os.path.lexists(place):
                old.rename(place)
            else:
                _remove(old, names)


def _abandoned(folder: Path) -> bool:
    """Whether nobody writes it any more. Raises Refused where it is complete and something else was
    put into it.
    """
    if _complete(folder):
        written(folder, folder)
    lock = filelock.FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        return False
    lock.release()
    return True


def _complete(folder: Path) -> bool:
    try:
        _read_list(folder, folder)
    except Refused:
        return False
    return True


def _beside(place: Path, kind: str, number: str) -> Path:
    """A hidden name beside `place`; of a name that is long, a short one."""
    stem = (
        place.name
        if len(os.fsencode(place.name)) < 200
        else hashlib.sha256(os.fsencode(place.name)).hexdigest()[:32]
    )
    return place.with_name(f".{stem}.{kind}-{number}")


def put(file: Path, value: Mapping[str, Any] | Path) -> None:
    """Writes a JSON object, or what the file at a path holds."""
    if isinstance(value, Path):
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(value, file)
    else:
        write_json(file, value)


@contextlib.contextmanager
def _in_one_line(target: Path) -> Iterator[None]:
    """What the file system refuses, as Refused."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "ymlink loop" not in str(error):
            raise
        raise Refused(f"{target}: cannot be written: {' '.join(str(error).split())}") from error


@contextlib.contextmanager
def _named(fresh: Path, target: Path) -> Iterator[None]:
    """Messages name the folder that was asked for."""
    try:
        yield
    except Refused as error:
        raise Refused(str(error).replace(str(fresh), str(target))) from error
