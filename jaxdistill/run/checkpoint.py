"""Checkpoints through orbax: asynchronous, whole or not at all, and a damaged one is set aside.

Beside the arrays each holds a checksum of every one of them, and one of its own record, so that a
changed bit is noticed too. What is not known to be damage (a read error, a lack of memory or of
permission) is raised, and nothing is moved. What looks like damage is read once more first: a file
that a network's disk did not find may be there the next moment.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import os
import re
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jaxdistill.core.net import materialise, paths
from jaxdistill.core.types import Array, Params, Refused, State

# How tensorstore says that bytes are missing or wrong: the status before its message, or the
# decoder's words in it.
DAMAGE = re.compile(r"^(DATA_LOSS|OUT_OF_RANGE|NOT_FOUND)\b|Error decoding|ZSTD_|Zstd-compressed")
SYSTEM = re.compile(r"os_error_code='(\d+)'")  # of a call that failed
OUTSIDE = re.compile(
    r"^(UNKNOWN|UNAVAILABLE|PERMISSION_DENIED|UNAUTHENTICATED|RESOURCE_EXHAUSTED|ABORTED|DEADLINE_EXCEEDED|INTERNAL)\b"
)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a line of the log is more than the traceback of an exception that orbax raises, too,
    and that ends in one line here.
    """
    return record.exc_info is None or "orbax" not in record.pathname


logging.getLogger("absl").addFilter(_is_news)


class _Damaged(Exception):
    """Files that are not as they were written."""


def _saved(state: State) -> dict[str, Any]:
    """What a checkpoint holds: everything but the frozen roles, which the start-up loads again."""
    return {k: getattr(state, k) for k in ("step", "count", "params", "opt", "ema", "memory")}


def _architecture(state: State) -> dict[str, str]:
    return {k: f"{v.dtype}{list(v.shape)}" for k, v in paths(state.params).items()}


def _words(x: Array) -> Array:
    """The bits of an array as uint32, 64-bit numbers as two along a last axis."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], -1)
    if x.dtype == bool or x.dtype.itemsize == 1:
        return (
            x.astype(jnp.uint8) if x.dtype == bool else jax.lax.bitcast_convert_type(x, jnp.uint8)
        ).astype(jnp.uint32)
    if x.dtype.itemsize == 2:
        return jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


def checksum(x: Array) -> Array:
    """uint32 []: the sum of an array's 32-bit words, modulo 2^32, each times an odd number of its
    place.

    Exact in any order of the sum, hence the same however the array is sharded. One changed word
    always changes it, since an odd factor is invertible modulo 2^32; several at once do not with
    probability 2^-32.
    """
    words = _words(x)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return jnp.sum(words * (place * jnp.uint32(0x9E3779B1) | jnp.uint32(1)), dtype=jnp.uint32)


_checksums = jax.jit(lambda tree: jax.tree.map(checksum, materialise(tree)))


def checksums(tree: Any) -> dict[str, int]:
    """`checksum` of every leaf, by its path; of several processes each gets all of them."""
    return {path: int(value) for path, value in paths(jax.device_get(_checksums(tree))).items()}


def _stamp(record: dict[str, Any]) -> int:
    """A checksum of a JSON value, whatever the order of its keys."""
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _brief(error: BaseException) -> str:
    """The first words of an exception, on one line."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    text = (
        text
        if isinstance(error, (OSError, _Damaged))
        else f"{type(error).__name__}: {text}"
        if text
        else type(error).__name__
    )
    return text[:200]


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and those that it was raised from, the outermost first."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _of_system(error: BaseException) -> OSError | None:
    """The fault of the machine that an exception reports, as an OSError; None where it reports
    none.
    """
    for e in _chain(error):
        if isinstance(e, OSError) and not isinstance(e, FileNotFoundError):
            return e
        if (found := SYSTEM.search(str(e))) and int(found[1]) != errno.ENOENT:
            return OSError(int(found[1]), os.strerror(int(found[1])))
        if OUTSIDE.match(str(e)):
            return OSError(_brief(e))
    return None


def _is_damage(error: BaseException) -> bool:
    kinds = (_Damaged, json.JSONDecodeError, UnicodeDecodeError, FileNotFoundError)
    return any(isinstance(e, kinds) or DAMAGE.search(str(e)) for e in _chain(error))


def _look_through(folder: Path) -> None:
    """Opens every file under `folder`. Raises OSError where one cannot be read: what libraries call
    missing may be that.
    """
    failed = []
    for at, _, names in os.walk(folder, onerror=failed.append):
        for name in names:
            with open(os.path.join(at, name), "rb") as file:
                file.read(1)
    if failed:
        raise failed[0]


def _judge(error: Exception, folder: Path, advice: str) -> None:
    """Returns where `error`, raised while `folder` was read, is known to mean that its files are
    damaged.

    Raises OSError for a fault of the machine; Refused, which ends with `advice`, where it is not
    known what the matter is.
    """
    if isinstance(error, (Refused, MemoryError)):
        raise error
    fault = _of_system(error)
    if fault is None and _is_damage(error):
        try:
            _look_through(folder)
            return
        except OSError as found:
            fault = found
    if fault is not None:
        text = f"{folder}: cannot be read ({fault.strerror or _brief(fault)}); nothing was changed"
        raise OSError(fault.errno, text) if fault.errno else OSError(text) from error
    if isinstance(error, RuntimeError):  # of the device's memory, or of another process
        raise error
    raise Refused(f"{folder}: cannot be read ({_brief(error)}); {advice}") from error


def _sound(read: Callable[[], Any], folder: Path, advice: str) -> Any:
    """What `read` returns. Raises _Damaged where two reads in a row failed on damaged files; else
    as `_judge` does.
    """
    try:
        return read()
    except Exception as error:
        _judge(error, folder, advice)
    try:
        return read()
    except Exception as error:
        _judge(error, folder, advice)
        raise _Damaged(_brief(error)) from error


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Raises the machine's faults (a full disk) as an OSError of one line that names `folder`."""
    try:
        yield
    except Exception as error:
        fault = _of_system(error)
        if fault is None:
            raise
        text = f"{folder}: cannot be written ({fault.strerror or _brief(fault)})"
        raise OSError(fault.errno, text) if fault.errno else OSError(text) from error


def _record(folder: Path, items: Mapping[str, Any]) -> dict[str, Any]:
    """The host's record, where it is as it was written."""
    record = items["host"]
    for key in ("architecture", "checksums", "stamp"):
        if not isinstance(record, dict) or key not in record:
            raise Refused(
                f"{folder / 'host/metadata'}: has no key {key!r}; it may be another version's"
            )
    stamp = record.pop("stamp")
    if stamp != _stamp(record):
        raise _Damaged("host/metadata: not as written")
    return record


def _arrays(wanted: Mapping[str, int], folder: Path, items: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays, where they have the checksums in `wanted`."""
    found = checksums(items["state"])
    changed = [
        path for path in sorted(found.keys() | wanted.keys()) if found.get(path) != wanted.get(path)
    ]
    if changed:
        more = f" and {len(changed) - 1} more" if changed[1:] else ""
        raise _Damaged(f"{changed[0]}{more}: not as written")
    return items["state"]


class Checkpoints:
    """The checkpoints of one run, by global step, with a JSON record of the host's state beside
    each.
    """

    def __init__(self, folder: Path, keep: int = 2):
        self.folder = Path(folder).absolute()
        self._keep = keep
        self._manager = self._open()

    def _open(self):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep, create=True, step_prefix="step"
        )
        with _writing(self.folder):
            return ocp.CheckpointManager(self.folder, options=options)

    def save(self, step: int, state: State, host: dict[str, Any]) -> None:
        """Starts writing; returns once the device arrays are copied. `host` must be
        JSON-serialisable.

        Raises OSError where this or the one before cannot be written; those that are there stay.
        """
        saved = _saved(state)
        record = {**host, "architecture": _architecture(state), "checksums": checksums(saved)}
        record["stamp"] = _stamp(json.loads(json.dumps(record)))
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(saved), host=ocp.args.JsonSave(record)
        )
        with _writing(self.folder):
            self._manager.save(step, args=args, force=True)

    def wait(self) -> None:
        """Returns when everything is on disk. Raises OSError where it cannot be written."""
        with _writing(self.folder):
            self._manager.wait_until_finished()

    def host(self) -> tuple[int, dict[str, Any]] | None:
        """(step, host record) of the newest checkpoint whose record is sound.

        Those with a damaged one are set aside. Raises OSError on a read error, Refused where the
        record is another version's.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            found = self._read(step, _record, host=ocp.args.JsonRestore())
            if found is not None:
                return step, found
        return None

    def restore(self, abstract: State) -> tuple[int, State, dict[str, Any]] | None:
        """(step, state, host record) of the newest sound checkpoint; None where there is none.

        `abstract` holds ShapeDtypeStructs with shardings; its frozen roles are handed through. A
        damaged checkpoint is moved to `damaged/` with a warning. Raises Refused where the weights
        are those of another architecture, or where it is not known why a checkpoint cannot be read,
        and OSError or MemoryError where the machine cannot read it: nothing is moved then.
        """
        while (found := self.host()) is not None:
            step, host = found
            self.check_architecture(step, host, abstract)
            state = self._read(
                step,
                functools.partial(_arrays, host["checksums"]),
                state=ocp.args.StandardRestore(_saved(abstract)),
            )
            if state is not None:
                return step, abstract.replace(**state), host
        return None

    def _read(self, step: int, check: Callable[..., Any], **items) -> Any:
        """What `check` makes of a checkpoint's folder and its items; None where they are damaged,
        after it was set aside.
        """
        folder = self.folder / f"step_{step}"
        read = lambda: check(folder, self._manager.restore(step, args=ocp.args.Composite(**items)))
        try:
            return _sound(
                read, folder, "it may be damaged; to go on from the one before, move it away"
            )
        except _Damaged as error:
            self._set_aside(step, error)
            return None

    def check_architecture(self, step: int, host: Mapping[str, Any], abstract: State) -> None:
        """Raises Refused where the weights of a checkpoint, by its host record, are not those of
        `abstract`.
        """
        saved = host["architecture"]
        expected = _architecture(abstract)
        for path in sorted(saved.keys() | expected.keys()):
            if saved.get(path) != expected.get(path):
                raise Refused(
                    f"{self.folder}: checkpoint {step} is of another architecture: {path} is"
                    f" {saved.get(path, 'absent')}, "
                    f"expected {expected.get(path, 'absent')}"
                )

    def _set_aside(self, step: int, error: Exception) -> None:
        reason = _brief(error)[:120]
        warnings.warn(
            f"{self.folder}: checkpoint {step} is damaged and was moved to damaged/ ({reason})",
            stacklevel=4,
        )
        self._manager.close()
        aside = self.folder.parent / "damaged"
        aside.mkdir(parents=True, exist_ok=True)
        for entry in self.folder.glob(f"step_{step}") if jax.process_index() == 0 else ():
            os.replace(entry, aside / f"{entry.name}_{os.getpid()}")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("set_aside")
        self._manager = self._open()

    def close(self) -> None:
        with _writing(self.folder):
            self._manager.close()


def save_params(folder: Path, params: dict[str, Params]) -> None:
    """Writes `{role: params}` to `folder`, whole or not at all."""
    folder = Path(folder).absolute()
    with _writing(folder), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(
            folder, params, force=True, custom_metadata={"checksums": checksums(params)}
        )


def load_params(folder: Path, abstract: dict[str, Params]) -> dict[str, Params]:
    """Reads the roles in `abstract` (ShapeDtypeStructs with shardings) from what `save_params`
    wrote.

    Each process reads its own shards. Raises Refused where a weight is missing, has another shape
    or is damaged, and OSError where the machine cannot read it.
    """
    folder = Path(folder).absolute()
    if not folder.exists():
        raise Refused(f"{folder}: no such result; has that run finished?")
    try:
        return _load_params(folder, abstract)
    except Exception as error:
        _judge(error, folder, "expected the result of a stage")
        raise Refused(f"{folder}: is damaged ({_brief(error)})") from error


def _load_params(folder: Path, abstract: dict[str, Params]) -> dict[str, Params]:
    with ocp.PyTreeCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(folder)
        if metadata.item_metadata is None:
            raise _Damaged("its _METADATA, or what it names, cannot be read")
        saved = paths(metadata.item_metadata.tree)
        for path, want in paths(abstract).items():
            have = saved.get(path)
            if have is None or tuple(have.shape) != tuple(want.shape):
                found = "absent" if have is None else list(have.shape)
                raise Refused(f"{folder}: {path} is {found}, expected {list(want.shape)}")
        restore = ocp.args.PyTreeRestore(
            item=abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            partial_restore=True,
        )
        params = checkpointer.restore(folder, args=restore)
    written = (metadata.custom_metadata or {}).get("checksums")
    same = {
        path for path, want in paths(abstract).items() if saved[path].dtype == want.dtype
    }  # another dtype has other bits
    for path, found in checksums(params).items() if written else ():
        if path in same and found != written.get(path):
            raise _Damaged(f"{path}: not as written")
    return params


def write_json(path: Path, value: Any) -> None:
    """Writes JSON whole or not at all; by one process only."""
    if jax.process_index():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temp.write_text(json.dumps(value, indent=1, default=str) + "\n")
        os.replace(temp, path)
    except OSError:
        temp.unlink(missing_ok=True)
        raise
