"""Freed memory is kept: a block that has been used before takes no new pages from the kernel."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from jaxdistill.run import host, stop

SCRIPT = """
import ctypes, resource, sys
from jaxdistill.run import host
if len(sys.argv) > 1 and not host.keep_freed_memory():
    raise SystemExit(7)
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def step():
    block = libc.malloc(2**26)
    libc.memset(block, 1, 2**26)
    libc.free(block)

step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10)
"""


# one device, programs as users get them
PLAIN = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}


def pages(*arguments) -> float:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        capture_output=True,
        text=True,
        env=PLAIN,
    )
    if done.returncode == 7:
        pytest.skip("no glibc here")
    assert done.returncode == 0, done.stderr[-2000:]
    return float(done.stdout)


def test_freed_memory_is_given_again():
    """Blocks of 64 MB, as a step's temporaries: mapped anew each time without (16,384 pages, or 32
    huge ones), none with.
    """
    assert pages("keep") < 1 and pages() >= 32


def test_a_signal_that_others_swallow_is_remembered():
    """A run that begins after it stops at once."""
    before = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        host.listen()
        assert host.heard() is None
        with contextlib.suppress(KeyboardInterrupt):  # as a library's callback does
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        assert host.heard() is signal.SIGTERM
        with stop.signals() as asked:
            assert asked.is_set() and asked.reason is signal.SIGTERM
        host.listen()
        assert host.heard() is None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
