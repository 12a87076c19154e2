"""Calls to the operating system: memory allocation, signals, locks on folders."""

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

# Options of glibc's mallopt(3).
M_TRIM_THRESHOLD = -1
M_TOP_PAD = -2
M_MMAP_MAX = -4
M_ARENA_MAX = -8


def keep_freed_memory() -> bool:
    """Makes glibc keep freed memory where JAX_PLATFORMS=cpu; returns whether it does.

    A program on CPU allocates all its temporaries at every step and frees them again. By default
    glibc maps such blocks anew each time, and the kernel clears every page: a third of the
    processor time of a small training. The call must come before JAX starts its backend, whose
    threads have arenas of their own.
    """
    if os.environ.get("JAX_PLATFORMS") != "cpu":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # a C library without mallopt
        return False
    wanted = {
        M_ARENA_MAX: 1,
        M_MMAP_MAX: 0,
        M_TRIM_THRESHOLD: 2**31 - 1,
        M_TOP_PAD: 2**26,
    }
    return all(mallopt(option, value) for option, value in wanted.items())


_received: list[signal.Signals] = []


def listen() -> None:
    """Makes SIGTERM and Ctrl-C raise KeyboardInterrupt, and records them for `heard`.

    The record is needed because other libraries may catch the exception.
    """
    _received.clear()
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _interrupt)


def _interrupt(number: int, frame: object) -> None:
    _received.append(signal.Signals(number))
    raise KeyboardInterrupt


def heard() -> signal.Signals | None:
    """The first signal since the call of `listen`; None where there was none."""
    return _received[0] if _received else None


def check_writable(folder: Path) -> None:
    """Raises Refused where no file can be made in the existing `folder`."""
    if jax.process_index():
        return
    probe = folder / f".writable.{os.getpid()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise Refused(
            f"{folder}: cannot be written to ({error.strerror})"
        ) from error


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Makes `folder` and locks it (`folder/.lock`) for the duration of the context.

    Only the first process of a run does so. The lock ends with the process, too.

    Raises:
        Refused: Another process has the lock, or the folder cannot be made or written to.
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
