"""Checkpoints through orbax: written asynchronously and atomically; damaged ones are moved away.

A checkpoint holds a checksum of each of its arrays and one of its host record, so that a changed
bit is noticed. Errors that are not known to mean damage (a read error, no memory, no permission)
are raised, and nothing is moved. Files that look damaged are read a second time before they are
moved, since a network file system may not find a file at first.
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

# Tensorstore's messages about missing or wrong bytes: the status before its message, or the
# decoder's words in it.
DAMAGE = re.compile(
    r"^(DATA_LOSS|OUT_OF_RANGE|NOT_FOUND)\b|Error decoding|ZSTD_|Zstd-compressed"
)
# The error number of a system call that failed, in a message of tensorstore.
SYSTEM = re.compile(r"os_error_code='(\d+)'")
# Statuses of tensorstore that say nothing about the files.
OUTSIDE = re.compile(
    r"^(UNKNOWN|UNAVAILABLE|PERMISSION_DENIED|UNAUTHENTICATED|RESOURCE_EXHAUSTED|ABORTED"
    r"|DEADLINE_EXCEEDED|INTERNAL)\b"
)


def _is_news(record: logging.LogRecord) -> bool:
    """False for orbax's log of a traceback whose exception it raises, too."""
    return record.exc_info is None or "orbax" not in record.pathname


logging.getLogger("absl").addFilter(_is_news)


class _Damaged(Exception):
    """Files differ from what was written."""


def _saved(state: State) -> dict[str, Any]:
    """The parts of the state in a checkpoint: all but weights at rest, which have a source."""
    names = ["step", "count", "params", "opt", "ema", "memory"]
    if state.statistics:
        names.append("statistics")
    return {name: getattr(state, name) for name in names}


def _architecture(state: State) -> dict[str, str]:
    """Path of each trained weight -> dtype and shape."""
    return {k: f"{v.dtype}{list(v.shape)}" for k, v in paths(state.params).items()}


def _words(x: Array) -> Array:
    """The bits of an array as uint32; a 64-bit number gives two along a new last axis."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], -1)
    if x.dtype == bool:
        return x.astype(jnp.uint8).astype(jnp.uint32)
    if x.dtype.itemsize == 1:
        return jax.lax.bitcast_convert_type(x, jnp.uint8).astype(jnp.uint32)
    if x.dtype.itemsize == 2:
        return jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


def checksum(x: Array) -> Array:
    """uint32 []: the sum of an array's 32-bit words modulo 2^32, each times an odd number that
    depends on its index.

    The sum is exact in any order, hence the same for every sharding. One changed word always
    changes it, since an odd factor is invertible modulo 2^32; several changed words leave it as it
    was with probability 2^-32.
    """
    words = _words(x)
    index = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(
            jnp.uint32, words.shape, axis
        )
    factor = index * jnp.uint32(0x9E3779B1) | jnp.uint32(1)
    return jnp.sum(words * factor, dtype=jnp.uint32)


@jax.jit
def _checksums(tree: Any) -> Any:
    return jax.tree.map(checksum, materialise(tree))


def checksums(tree: Any) -> dict[str, int]:
    """Path of each leaf -> its `checksum`, on every process."""
    sums = jax.device_get(_checksums(tree))
    return {path: int(value) for path, value in paths(sums).items()}


def _stamp(record: dict[str, Any]) -> int:
    """A checksum of a JSON value that does not depend on the order of its keys."""
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _brief(error: BaseException) -> str:
    """An exception's first line, with its type where that says more."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    if not isinstance(error, (OSError, _Damaged)):
        name = type(error).__name__
        text = f"{name}: {text}" if text else name
    return text[:200]


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and those that it was raised from, the outermost first."""
    while error is not None:
        yield error
        error = error.__cause__ or (
            None if error.__suppress_context__ else error.__context__
        )


def _system_error(error: BaseException) -> OSError | None:
    """The failure of the machine that an exception reports; None where it reports none."""
    for e in _chain(error):
        if isinstance(e, OSError) and not isinstance(e, FileNotFoundError):
            return e
        found = SYSTEM.search(str(e))
        number = int(found[1]) if found else errno.ENOENT
        if number != errno.ENOENT:
            return OSError(number, os.strerror(number))
        if OUTSIDE.match(str(e)):
            return OSError(_brief(e))
    return None


def _is_damage(error: BaseException) -> bool:
    """Whether an exception reports missing or changed files."""
    kinds = (_Damaged, json.JSONDecodeError, UnicodeDecodeError, FileNotFoundError)
    return any(isinstance(e, kinds) or DAMAGE.search(str(e)) for e in _chain(error))


def _read_a_byte_of_each(folder: Path) -> None:
    """Raises OSError where a file under `folder` cannot be read.

    Libraries report such files as missing, which would be taken for damage.
    """
    failed = []
    for at, _, names in os.walk(folder, onerror=failed.append):
        for name in names:
            with open(os.path.join(at, name), "rb") as file:
                file.read(1)
    if failed:
        raise failed[0]


def _raise_unless_damage(error: Exception, folder: Path, advice: str) -> None:
    """Returns where `error`, raised while `folder` was read, means that its files are damaged.

    Args:
        error: The exception.
        folder: The folder of a checkpoint or of a stage's result.
        advice: The end of the message for an unknown cause.

    Raises:
        OSError: The machine failed.
        Refused: The cause is unknown.
    """
    if isinstance(error, (Refused, MemoryError)):
        raise error
    failure = _system_error(error)
    if failure is None and _is_damage(error):
        try:
            _read_a_byte_of_each(folder)
            return
        except OSError as found:
            failure = found
    if failure is not None:
        reason = failure.strerror or _brief(failure)
        raise _os_error(
            failure, f"{folder}: cannot be read ({reason}); nothing was changed"
        ) from error
    if isinstance(
        error, RuntimeError
    ):  # no memory on the device, or another process failed
        raise error
    raise Refused(
        f"{folder}: cannot be read ({_brief(error)}); {advice}"
    ) from error


def _os_error(failure: OSError, text: str) -> OSError:
    """An OSError with the number of `failure`, where it has one, and another text."""
    return OSError(failure.errno, text) if failure.errno else OSError(text)


def _read_twice(read: Callable[[], Any], folder: Path, advice: str) -> Any:
    """The result of `read`, called a second time where the files seem damaged.

    Raises:
        _Damaged: Both calls found damage.
        OSError, Refused: As `_raise_unless_damage` does.
    """
    try:
        return read()
    except Exception as error:
        _raise_unless_damage(error, folder, advice)
    try:
        return read()
    except Exception as error:
        _raise_unless_damage(error, folder, advice)
        raise _Damaged(_brief(error)) from error


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Raises failures of the machine (a full disk) as an OSError of one line with `folder`."""
    try:
        yield
    except Exception as error:
        failure = _system_error(error)
        if failure is None:
            raise
        reason = failure.strerror or _brief(failure)
        raise _os_error(
            failure, f"{folder}: cannot be written ({reason})"
        ) from error


def _verified_record(folder: Path, items: Mapping[str, Any]) -> dict[str, Any]:
    """The host record of a checkpoint, without its stamp.

    Raises:
        Refused: A key is missing.
        _Damaged: The record differs from what was written.
    """
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


def _verified_arrays(
    wanted: Mapping[str, int], folder: Path, items: Mapping[str, Any]
) -> dict[str, Any]:
    """The arrays of a checkpoint. Raises _Damaged where their checksums are not `wanted`."""
    found = checksums(items["state"])
    names = sorted(found.keys() | wanted.keys())
    changed = [path for path in names if found.get(path) != wanted.get(path)]
    if changed:
        more = f" and {len(changed) - 1} more" if changed[1:] else ""
        raise _Damaged(f"{changed[0]}{more}: not as written")
    return items["state"]


class Checkpoints:
    """The checkpoints of one run, by global step, each with a JSON record of the host's state."""

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
        """Starts to write a checkpoint; returns once the arrays are copied from the device.

        Args:
            step: The global step.
            state: The training state.
            host: The host's state, of types that JSON has.

        Raises:
            OSError: This checkpoint or the previous one cannot be written. Older ones stay.
        """
        saved = _saved(state)
        record = {
            **host,
            "architecture": _architecture(state),
            "checksums": checksums(saved),
        }
        record["stamp"] = _stamp(json.loads(json.dumps(record)))
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(saved), host=ocp.args.JsonSave(record)
        )
        with _writing(self.folder):
            self._manager.save(step, args=items, force=True)

    def wait(self) -> None:
        """Returns when everything is on disk. Raises OSError where it cannot be written."""
        with _writing(self.folder):
            self._manager.wait_until_finished()

    def host(self) -> tuple[int, dict[str, Any]] | None:
        """(step, host record) of the newest checkpoint with an undamaged record; None: no such.

        Checkpoints with a damaged record are moved to `damaged/`, with a warning.

        Raises:
            OSError: The machine cannot read it.
            Refused: The record is that of another version of this library.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            found = self._read(step, _verified_record, host=ocp.args.JsonRestore())
            if found is not None:
                return step, found
        return None

    def restore(self, abstract: State) -> tuple[int, State, dict[str, Any]] | None:
        """(step, state, host record) of the newest undamaged checkpoint; None: there is none.

        Damaged checkpoints are moved to `damaged/`, with a warning. Where it raises, nothing is
        moved.

        Args:
            abstract: ShapeDtypeStructs with shardings. Its frozen roles are those of the result.

        Raises:
            Refused: The weights are those of another architecture, or the checkpoint cannot be
                read for an unknown reason.
            OSError, MemoryError: The machine cannot read it.
        """
        found = self.host()
        while found is not None:
            step, host = found
            self.check_architecture(step, host, abstract)
            verify = functools.partial(_verified_arrays, host["checksums"])
            wanted = ocp.args.StandardRestore(_saved(abstract))
            state = self._read(step, verify, state=wanted)
            if state is not None:
                return step, abstract.replace(**state), host
            found = self.host()
        return None

    def _read(self, step: int, verify: Callable[..., Any], **items) -> Any:
        """verify(folder, items of the checkpoint); None where they are damaged and moved away."""
        folder = self.folder / f"step_{step}"

        def read() -> Any:
            return verify(
                folder,
                self._manager.restore(step, args=ocp.args.Composite(**items)),
            )

        advice = "it may be damaged; to go on from the one before, move it away"
        try:
            return _read_twice(read, folder, advice)
        except _Damaged as error:
            self._set_aside(step, error)
            return None

    def check_architecture(
        self, step: int, host: Mapping[str, Any], abstract: State
    ) -> None:
        """Raises Refused where weights of a checkpoint have other names or shapes than those of
        `abstract`; `host` is the checkpoint's record.
        """
        saved = host["architecture"]
        expected = _architecture(abstract)
        for path in sorted(saved.keys() | expected.keys()):
            have = saved.get(path, "absent")
            want = expected.get(path, "absent")
            if have != want:
                raise Refused(
                    f"{self.folder}: checkpoint {step} is of another architecture: {path} is"
                    f" {have}, expected {want}"
                )

    def _set_aside(self, step: int, error: Exception) -> None:
        """Moves a damaged checkpoint to `damaged/`, with a warning."""
        reason = _brief(error)[:120]
        warnings.warn(
            f"{self.folder}: checkpoint {step} is damaged and was moved to damaged/ ({reason})",
            stacklevel=4,
        )
        self._manager.close()
        aside = self.folder.parent / "damaged"
        aside.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            for entry in self.folder.glob(f"step_{step}"):
                os.replace(entry, aside / f"{entry.name}_{os.getpid()}")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("set_aside")
        self._manager = self._open()

    def close(self) -> None:
        with _writing(self.folder):
            self._manager.close()


def save_params(folder: Path, params: dict[str, Params]) -> None:
    """Writes `{role: params}` to `folder`, atomically."""
    folder = Path(folder).absolute()
    with _writing(folder), ocp.StandardCheckpointer() as checkpointer:
        metadata = {"checksums": checksums(params)}
        checkpointer.save(folder, params, force=True, custom_metadata=metadata)


def load_params(folder: Path, abstract: dict[str, Params]) -> dict[str, Params]:
    """Reads weights that `save_params` wrote; each process reads its own shards.

    Args:
        folder: Where they are.
        abstract: ShapeDtypeStructs with shardings, of the roles to read.

    Raises:
        Refused: A weight is missing, has another shape or is damaged.
        OSError: The machine cannot read it.
    """
    folder = Path(folder).absolute()
    if not folder.exists():
        raise Refused(f"{folder}: no such result; has that run finished?")
    try:
        return _load_params(folder, abstract)
    except Exception as error:
        _raise_unless_damage(error, folder, "expected the result of a stage")
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
                raise Refused(
                    f"{folder}: {path} is {found}, expected {list(want.shape)}"
                )
        _check_factors(folder, saved, abstract)
        restore = ocp.args.PyTreeRestore(
            item=abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            partial_restore=True,
        )
        params = checkpointer.restore(folder, args=restore)
    written = (metadata.custom_metadata or {}).get("checksums")
    if not written:
        return params
    wanted = paths(abstract)
    for path, found in checksums(params).items():
        # Weights that were converted to another dtype have other bits.
        same_dtype = path in wanted and saved[path].dtype == wanted[path].dtype
        if same_dtype and found != written.get(path):
            raise _Damaged(f"{path}: not as written")
    return params


def _check_factors(
    folder: Path, saved: Mapping[str, Any], abstract: dict[str, Params]
) -> None:
    """Raises Refused where a role has stored adapters that it would lose, since it has none now on
    that matrix.
    """
    wanted = paths(abstract)
    for path in saved:
        is_factor = path.endswith(("/a", "/b"))
        if is_factor and path.partition("/")[0] in abstract and path not in wanted:
            raise Refused(
                f"{folder}: has {path}, expected no adapter on that weight"
            )


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically, on the first process only."""
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
