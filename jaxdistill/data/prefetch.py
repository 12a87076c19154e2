"""Prefetch: a thread reads batches and copies them to the device while a step runs."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

from jaxdistill.core.types import Refused


class DevicePrefetch:
    """Yields `(put(batch), state)` for every batch of `loader`, in order.

    `state` is `loader.get_state()` right after the batch. Saved with the step that consumes the
    batch, it resumes there, even where more batches have been read.

    `next(loader)` and `put` run in the thread, where the caller's context managers (a mesh, a
    default device) have no effect. Their exceptions, the end of the loader included, are raised
    again by `next`. Leaving the `with` block, or `close()`, ends the thread after its current
    batch.

    Args:
        loader: an iterator with `get_state`.
        put: from a batch of the loader to one on the device.
        depth: the most batches that are read ahead.
    """

    def __init__(self, loader: Iterator, put: Callable[[Any], Any], depth: int = 2):
        if depth < 1:
            raise Refused(f"depth={depth}: expected at least 1 batch")
        self._loader = loader
        self._put = put
        self._slots = threading.Semaphore(depth)
        self._ready = queue.SimpleQueue()
        self._closed = threading.Event()
        self._end = None
        self._thread = threading.Thread(
            target=self._work, name="device-prefetch", daemon=True
        )
        self._thread.start()

    def _work(self):
        try:
            while True:
                self._slots.acquire()
                if self._closed.is_set():
                    return
                self._ready.put(
                    (self._put(next(self._loader)), self._loader.get_state())
                )
        except BaseException as error:  # raised again in the consumer's thread
            self._ready.put(error)

    def __iter__(self):
        return self

    def __next__(self) -> tuple[Any, Any]:
        if self._end is None:
            item = self._ready.get()
            if not isinstance(item, BaseException):
                self._slots.release()
                return item
            self._end = item
        raise self._end

    def close(self):
        """Ends the thread and drops the batches that were read ahead; `next` finds no more."""
        self._closed.set()
        self._slots.release()
        self._thread.join()
        self._ready = queue.SimpleQueue()
        self._end = self._end or StopIteration()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
