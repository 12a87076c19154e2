"""Host to device ahead of time: one thread reads and places batches while the current step runs."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any


class DevicePrefetch(Iterator):
    """Yields `(put(batch), loader state after that batch)`, at most `depth` batches ahead.

    The state is that of what has been yielded, not of what has been read ahead, so a checkpoint may store it. An
    exception in the thread is raised at the consumer. Use as a context manager, or call `close`.
    """

    def __init__(self, loader: Any, put: Callable[[Any], Any], depth: int = 2):
        self._queue: queue.Queue = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(loader, put), name="prefetch", daemon=True)
        self._thread.start()

    def _work(self, loader, put) -> None:
        while not self._stop.is_set():
            try:
                item = (put(next(loader)), loader.get_state(), None)
            except BaseException as error:
                item = (None, None, error)
            while not self._stop.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if item[2] is not None:
                return

    def __next__(self):
        batch, state, error = self._queue.get()
        if error is not None:
            self._stop.set()
            raise error
        return batch, state

    def close(self) -> None:
        """Stops the thread and waits for it."""
        self._stop.set()
        self._thread.join()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
