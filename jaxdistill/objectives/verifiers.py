"""Verifiers of text, and the child processes that they run in. Standard library only: the children import nothing else.

A verifier is any function (prompt, response, answer) -> float or bool that a name "package.file:function" reaches. It may
raise, hang or crash: that costs its process, which is replaced, and its sample, which is reported as failed.
"""

from __future__ import annotations

import importlib
import multiprocessing
import queue
import re
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

START = 60.0  # seconds that a child may take to import its verifier

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def last_number(prompt: str, response: str, answer: str) -> float:
    """1 where the last number of the response equals the last one of the answer ("#### 1,234" of GSM8K), else 0."""
    found, wanted = NUMBER.findall(response), NUMBER.findall(answer)
    value = lambda text: float(text.replace(",", ""))
    return float(bool(found) and value(found[-1]) == value(wanted[-1]))


def exact_text(prompt: str, response: str, answer: str) -> float:
    """1 where response and answer agree, white space aside (runs count as one, ends not at all), else 0."""
    return float(response.split() == answer.split())


def find(name: str) -> Callable:
    """The function called "package.file:function", looked up below `jaxdistill` first. Raises ValueError."""
    file, _, function = name.partition(":")
    for module in (f"jaxdistill.{file}", file):
        try:
            found = getattr(importlib.import_module(module), function, None)
        except ModuleNotFoundError as error:
            if error.name and (module == error.name or module.startswith(error.name + ".")):
                continue
            raise
        if callable(found):
            return found
        raise ValueError(f"{module} has no function {function!r}")
    raise ValueError(f"no module {file!r}")


def _serve(name: str, pipe: Any) -> None:
    """A child's life: import, say so, then answer requests until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair
    call = find(name)
    pipe.send(None)
    while True:
        try:
            sample = pipe.recv()
        except EOFError:
            return
        try:
            answer = float(call(*sample))
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        pipe.send(answer)


class _Child:
    def __init__(self, name: str):
        context = multiprocessing.get_context("spawn")
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=_serve, args=(name, there), daemon=True)
        self.process.start()
        there.close()
        try:
            self.read(START)
        except (TimeoutError, EOFError):
            self.stop()
            raise

    def read(self, timeout: float) -> float | str | None:
        """The child's next message. Raises TimeoutError, or EOFError where it died."""
        if not self.pipe.poll(timeout):
            raise TimeoutError
        return self.pipe.recv()

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


class Pool:
    """Up to `workers` child processes, started when first needed, that score samples with the verifier called `name`."""

    def __init__(self, name: str, timeout: float, workers: int):
        self.name, self.timeout, self.workers = name, timeout, workers
        self.idle: queue.SimpleQueue[_Child | None] = queue.SimpleQueue()
        for _ in range(workers):
            self.idle.put(None)

    def score(self, samples: Sequence[tuple]) -> list[float | str]:
        """For each sample's arguments the verifier's value, or a line that says why there is none."""
        with ThreadPoolExecutor(self.workers) as threads:
            return list(threads.map(self._one, samples))

    def _one(self, sample: tuple) -> float | str:
        child = self.idle.get()
        try:
            child = child or _Child(self.name)
            child.pipe.send(sample)
            return child.read(self.timeout)
        except (TimeoutError, EOFError, OSError) as error:
            if child:
                child.stop()
            child = None
            return f"no answer in {self.timeout:g} s" if isinstance(error, TimeoutError) else "its process died"
        finally:
            self.idle.put(child)

    def close(self) -> None:
        """Ends the processes; the next call starts new ones."""
        for _ in range(self.workers):
            if child := self.idle.get():
                child.stop()
            self.idle.put(None)
