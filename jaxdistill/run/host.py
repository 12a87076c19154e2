"""What the process asks of the operating system."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import filelock
import jax

from jaxdistill.core.types import Refused

# of glibc's mallopt(3)
M_TRIM_THRESHOLD = -1
M_TOP_PAD = -2
M_MMAP_MAX = -4
M_ARENA_MAX = -8


def keep_freed_memory() -> bool:
    """Lets glibc keep what is freed, where JAX_PLATFORMS says cpu; returns whether it does.

    A program on CPU allocates all its temporaries at every step and frees them again. By default
    glibc maps such blocks anew each time, and the kernel clears every page: a third of the
    processor time of a small training. It takes hold only before JAX has started its backend, whose
    threads have arenas of their own from then on.
    """
    if os.environ.get("JAX_PLATFORMS") != "cpu":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    wanted = {M_ARENA_MAX: 1, M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 2**26}
    return all(mallopt(option, value) for option, value in wanted.items())


_HEARD: list[signal.Signals] = []


def listen() -> None:
    """Makes SIGTERM and Ctrl-C interrupt the process, and remembers them: code that is not ours may
    swallow the interrupt.
    """
    _HEARD.clear()
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _interrupt)


def _interrupt(number: int, frame: object) -> None:
    _HEARD.append(signal.Signals(number))
    raise KeyboardInterrupt


def heard() -> signal.Signals | None:
    """The first signal since `listen`; None where there was none."""
    return _HEARD[0] if _HEARD else None


def check_writable(folder: Path) -> None:
    """Raises Refused where no file can be made in `folder`, which exists."""
    if jax.process_index():
        return
    probe = folder / f".writable.{os.getpid()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise Refused(f"{folder}: cannot be written to ({error.strerror})") from error


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Makes `folder` and holds it, until its end or the process's, with a lock on `folder/.lock`;
    of a run's processes the first does. Raises Refused where it is held already, or cannot be made
    or written to.
    """
    if jax.process_index():
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"{folder}: cannot be made ({error.strerror})") from error
    check_writable(folder)
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout as error:
        raise Refused(
            f"{folder}: another process is at work there; wait for it, or give another --workdir"
        ) from error
    try:
        yield
    finally:
        lock.release()
