"""Folders that an export writes: they appear complete or not at all, and replace earlier exports
alone.

An exported folder holds `.jaxdistill_export.json`, the list of its files with their sizes and
BLAKE2b digests. A folder is replaced where it holds these files, unchanged, and nothing else; every
other folder is refused before any work is done. For files over 1 GiB, which take long to read, the
time of the last change takes the place of the digest.
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
# bytes; larger files are known by their size and the time of their last change
LARGE = 2**30
# an empty file, locked while a folder is written, and removed at the end
LOCK = ".lock"
RUN = ("stages", "checkpoints", "metrics.jsonl")  # parts of a run's folder
# its folders that it reads again
INSIDE_A_RUN = (
    "stages",
    "checkpoints",
    "data",
    "tensorboard",
)
LONGEST = "diffusion_pytorch_model-00001-of-00001.safetensors"  # the longest name in an export


def replaceable(target: Path) -> Path:
    """The path to which an export to `target` is written: `target` with the links of its parents
    followed. Writes nothing.

    Raises:
        Refused: `target` exists and is neither an empty folder nor an unchanged export; it is a
            link, the working folder or one above it, or lies inside a run; or nothing can be
            written there.
    """
    with _refusals(target):
        if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+:/", str(target)):
            raise Refused(
                f"{target}: an export is written to a local folder; copy it from there"
            )
        if target.name in ("", ".."):
            raise Refused(f"{target}: expected the name of a folder, as in export")
        place = target.parent.resolve() / target.name
        _check_length(place)
        here = Path.cwd()
        if place in (here, *here.parents):
            raise Refused(
                f"{target}: is the working folder or holds it; give another name"
            )
        _check_parents(target, place)
        if place.is_symlink():
            raise Refused(
                f"{target}: is a link to {os.readlink(place)}; give a folder"
            )
        if place.exists():
            _check_folder(target, place)
    return place


def _check_length(place: Path) -> None:
    """Raises OSError where the file system takes no such name, or path."""
    near = _nearest(place.parent)
    files = [_beside(place, "new", "0" * 8) / LONGEST, place / LONGEST]
    names = [near / part for part in place.relative_to(near).parts]
    for path in (*files, *names):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.lstat()


def _nearest(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.parents) if os.path.lexists(path))


def _check_parents(target: Path, place: Path) -> None:
    """Raises Refused inside the folders of a run that it reads again, and where no folder can be
    made.
    """
    for parent in place.parents:
        if parent.name not in INSIDE_A_RUN:
            continue
        run = parent.parent
        if any((run / name).exists() for name in RUN):
            raise Refused(
                f"{target}: is inside {parent.name}/ of the run {run}; give another name"
            )
    near = _nearest(place.parent)
    if not near.is_dir():
        raise Refused(f"{target}: {near} is a file, expected a folder")
    if not os.access(near, os.W_OK | os.X_OK):
        raise Refused(f"{target}: the folder {near} is read-only")


def _check_folder(target: Path, place: Path) -> None:
    """Raises Refused where what is at `place` is neither an empty folder nor an export."""
    if not place.is_dir():
        raise Refused(f"{target}: is a file, expected a folder or a free name")
    if os.path.ismount(place):
        raise Refused(
            f"{target}: is the root of a file system; give a folder inside it"
        )
    written(target, place)


def written(target: Path, place: Path) -> list[str]:
    """The relative names of all files and folders of the export at `place`, a folder before its
    content; none where `place` is an empty folder.

    Raises Refused, which names `target`, where anything else is there.
    """
    if not any(place.iterdir()):
        return []
    for name in RUN:
        if os.path.lexists(place / name):
            raise Refused(f"{target}: is a run (it has {name}); give another name")
    if not os.path.lexists(place / MARKER):
        raise Refused(f"{target}: {_no_export(place)}")
    listed = _read_marker(target, place)
    folders = {str(parent) for name in listed for parent in Path(name).parents}
    found = []
    for name, info in _content(place):
        found.append(name)
        if name == MARKER or (stat.S_ISDIR(info.st_mode) and name in folders):
            continue
        if name not in listed:
            raise Refused(
                f"{target}: {name} was not written by an export; move it away, or give another name"
            )
        if not _as_listed(place / name, info, listed[name]):
            raise Refused(
                f"{target}: {name} is not as it was exported; move it away, or give another name"
            )
    return found


def _no_export(place: Path) -> str:
    """Why a folder without a list of its files is not replaced."""
    if (place / "config.json").exists() or (place / "adapter_config.json").exists():
        return (
            f"holds a model without {MARKER}, the list of what an export wrote "
            "(earlier versions left none); move it away, or give another name"
        )
    return "not empty and not a model folder that was exported; give another name"


def _content(
    folder: Path, inside: str = ""
) -> Iterator[tuple[str, os.stat_result]]:
    """(relative name, status) of everything below a folder; links are not followed."""
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            info = entry.stat(follow_symlinks=False)
            yield inside + entry.name, info
            if stat.S_ISDIR(info.st_mode):
                yield from _content(Path(entry.path), f"{inside}{entry.name}/")


def _entry(file: Path, info: os.stat_result) -> dict[str, Any]:
    """A file's entry in the list: its bytes, and its digest or, of a large file, the time of its
    last change in nanoseconds.
    """
    if info.st_size > LARGE:
        return {"bytes": info.st_size, "changed_ns": info.st_mtime_ns}
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "blake2b")
    return {"bytes": info.st_size, "blake2b": digest.hexdigest()}


def _as_listed(file: Path, info: os.stat_result, entry: dict[str, Any]) -> bool:
    """Whether a file is as its entry says; it is read only where its size is."""
    if not stat.S_ISREG(info.st_mode) or info.st_size != entry.get("bytes"):
        return False
    return _entry(file, info) == entry


def _read_marker(target: Path, place: Path) -> dict[str, dict[str, Any]]:
    """File name -> entry of a finished export. Raises Refused where the list is damaged, or of an
    earlier version.
    """
    listed = _read_list(target, place)
    if not all(isinstance(entry, dict) for entry in listed.values()):
        raise Refused(
            f"{target}: {MARKER} has no digests, so that an edit would be lost (earlier versions "
            "left none); move it away, or give another name"
        )
    return listed


def _read_list(target: Path, place: Path) -> dict[str, Any]:
    """File name -> entry, of any version. Raises Refused where the list is damaged or not written
    yet.
    """
    marker = place / MARKER
    try:
        if marker.is_symlink():
            raise ValueError("a link")
        listed = json.loads(marker.read_text(encoding="utf-8"))["files"]
        if not isinstance(listed, dict):
            raise ValueError("no list of files")
        if not all(type(entry) in (dict, int) for entry in listed.values()):
            raise ValueError("no list of files")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Refused(
            f"{target}: {MARKER} is damaged ({error}); move the folder away, or give another name"
        ) from error
    return listed


def _list(folder: Path) -> dict[str, dict[str, Any]]:
    """Name -> entry of all files in a folder except the list itself."""
    files = [
        (name, info)
        for name, info in _content(folder)
        if stat.S_ISREG(info.st_mode)
    ]
    return {
        name: _entry(folder / name, info) for name, info in files if name != MARKER
    }


def _write_marker(folder: Path, listed: dict[str, dict[str, Any]] | None) -> None:
    """Writes the list of a folder's files: None as long as the folder is being written."""
    text = json.dumps({"written_by": "jaxdistill", "files": listed}, indent=1)
    (folder / MARKER).write_text(text + "\n", encoding="utf-8")


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target` at the end of the block, and is removed where the
    block raises.

    An earlier export at `target` is replaced. Until the new one is in its place the old one is
    there, or beside it as `.<name>.old-<id>`, from where the next export takes it back. What killed
    processes left beside `target` is removed.

    Raises Refused as `replaceable` does, at the start and again before the old export is removed,
    and where the disk cannot be written.
    """
    place = replaceable(target)
    with _refusals(target):
        place.parent.mkdir(parents=True, exist_ok=True)
        _tidy(place)
        fresh = _beside(place, "new", secrets.token_hex(4))
        fresh.mkdir()
        lock = filelock.FileLock(fresh / LOCK)
        try:
            lock.acquire(blocking=False)
            _write_marker(fresh, None)
            with _under_its_name(fresh, target):
                yield fresh
            _write_marker(fresh, _list(fresh))
            _swap(target, place, fresh)
            (place / LOCK).unlink(missing_ok=True)
        finally:
            lock.release()
            shutil.rmtree(fresh, ignore_errors=True)


def _swap(target: Path, place: Path, fresh: Path) -> None:
    """Moves `fresh` to `place`. Of what is there, only what an export wrote is deleted."""
    replaceable(place)
    if not place.exists() or not any(place.iterdir()):
        fresh.rename(place)  # also onto an empty folder
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
    """Deletes the `names` that `written` found in a folder, the list of files last, then the folder
    where it is empty.
    """
    with contextlib.suppress(OSError):
        for name in reversed(names):
            path = folder / name
            if name == MARKER:
                continue
            if path.is_dir():
                path.rmdir()
            else:
                path.unlink(missing_ok=True)
        (folder / MARKER).unlink(missing_ok=True)
        folder.rmdir()


def _tidy(place: Path) -> None:
    """Clears what killed processes left beside `place`.

    Half-written folders are removed. An export that was moved aside is moved back where no other
    has taken its place, and removed otherwise. Nothing else is touched.
    """
    for folder in _left_beside(place, "new"):
        with contextlib.suppress(OSError, Refused):
            if not (folder / MARKER).is_file():
                folder.rmdir()  # where it is empty
            elif _is_abandoned(folder):
                shutil.rmtree(folder)
    for old in _left_beside(place, "old"):
        writer = old.with_name(old.name.replace(".old-", ".new-"))
        if writer.exists():
            continue  # the process that moved it aside is at work
        with contextlib.suppress(OSError, Refused):
            names = written(old, old)
            if names and not os.path.lexists(place):
                old.rename(place)
            else:
                _remove(old, names)


def _left_beside(place: Path, kind: str) -> list[Path]:
    """The folders that exports to `place` made beside it."""
    name = re.escape(_beside(place, kind, "").name) + "[0-9a-f]{8}"
    found = [
        path for path in place.parent.iterdir() if re.fullmatch(name, path.name)
    ]
    return [path for path in found if path.is_dir() and not path.is_symlink()]


def _is_abandoned(folder: Path) -> bool:
    """Whether no process writes the folder any more. Raises Refused where it is complete and
    something else was put into it.
    """
    if _is_complete(folder):
        written(folder, folder)
    lock = filelock.FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        return False
    lock.release()
    return True


def _is_complete(folder: Path) -> bool:
    """Whether the folder has its list of files."""
    try:
        _read_list(folder, folder)
    except Refused:
        return False
    return True


def _beside(place: Path, kind: str, number: str) -> Path:
    """A hidden name beside `place`; where the name of `place` is long, with a digest for it."""
    stem = place.name
    if len(os.fsencode(stem)) >= 200:
        stem = hashlib.sha256(os.fsencode(stem)).hexdigest()[:32]
    return place.with_name(f".{stem}.{kind}-{number}")


def put(file: Path, value: Mapping[str, Any] | Path) -> None:
    """Writes a JSON object, or a copy of the file at a path."""
    if isinstance(value, Path):
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(value, file)
    else:
        write_json(file, value)


@contextlib.contextmanager
def _refusals(target: Path) -> Iterator[None]:
    """Raises Refused, which names `target`, for errors of the file system."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "ymlink loop" not in str(error):
            raise
        raise Refused(
            f"{target}: cannot be written: {' '.join(str(error).split())}"
        ) from error


@contextlib.contextmanager
def _under_its_name(fresh: Path, target: Path) -> Iterator[None]:
    """Puts the name of `target` into messages that name the temporary folder."""
    try:
        yield
    except Refused as error:
        raise Refused(str(error).replace(str(fresh), str(target))) from error
