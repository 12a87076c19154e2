"""Runs that are asked to stop: SIGTERM, Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

import jax

from jaxdistill.run.host import heard


class Stopped(Exception):
    """The run was asked to stop by `reason` (SIGTERM, SIGINT). It saved; run it again to go on."""

    def __init__(self, reason: signal.Signals, done: str):
        super().__init__(f"{reason.name}: {done}; run again to go on")
        self.reason = reason


@contextlib.contextmanager
def signals() -> Iterator[threading.Event]:
    """Context with an Event that SIGTERM and Ctrl-C set. A second Ctrl-C interrupts at once.

    `event.reason` is the signal. In threads other than the main one no signal is caught.
    """
    stop = threading.Event()
    main = threading.current_thread() is threading.main_thread()

    def handle(number, frame):
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()
        stop.reason = signal.Signals(number)

    caught = (signal.SIGTERM, signal.SIGINT)
    if jax.process_count() > 1:  # JAX itself handles SIGTERM
        caught = (signal.SIGINT,)
    before = {s: signal.signal(s, handle) for s in caught} if main else {}
    early = heard()
    if early is not None:  # a signal from before the run began
        stop.reason = early
        stop.set()
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
