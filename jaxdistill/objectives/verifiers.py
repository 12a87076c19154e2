"""Verifiers of text, and the child processes that they are called in.

This file uses the standard library alone, since it is all that a child process imports before its
verifier. A verifier is any function (prompt, response, answer) -> float or bool, known by its name
"package.file:function". It may raise, hang or crash: its process is then replaced, and its sample
is reported as failed.
"""

from __future__ import annotations

import collections
import difflib
import importlib
import importlib.util
import multiprocessing
import queue
import re
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction
from typing import Any

START = 60.0  # seconds that a child may take to import its verifier
SHOWN = 200  # characters of an exception that are reported

# No group is possessive: Python 3.11.2 loses what such groups match.
NUMBER = re.compile(
    r"""
    # of "is -5", but not of "3-5", "(3)-5" or "x-5"
    (?P<sign>(?<![\w.)\]}%])[-\u2212\u2013\uff0d\u2011])?
    (?:\\?[$\u20ac\u00a3\u00a5\u20b9])?
    (?P<whole>
        \d{1,3}(?:[,_'\u2019\u00a0\u2009\u202f]\d{3}){1,999}          # 1,234,567
          (?!\d|[,_'\u2019\u00a0\u2009\u202f]\d{3})
        | \d{1,2}(?:,\d{2}(?=,)){1,99},\d{3}(?!\d)                    # 12,34,567, as in India
        | \d++
        | (?=(?<![\w.])\.\d)                                          # .5
    )
    (?:
        /(?P<below>\d++)(?![/\d]|[.,]\d)                              # 1/2, but not 1/2/2024
        | (?P<decimals>\.\d++)?
          (?:[eE](?P<power>[-+\u2212]?\d++)(?!\w)
             | [ ]?(?:[x\u00d7*]|\\times|\\cdot)
               [ ]?10[ ]?(?:\^|\*\*)[ ]?\{?(?P<tens>[-\u2212]?\d++))?
    )
    """,
    re.VERBOSE,
)
FRACTION = re.compile(r"\\[dt]?frac\{([^{}]*+)\}\{([^{}]*+)\}")  # of LaTeX


def number(text: str) -> Decimal | Fraction | None:
    """The exact last number of a text, or None.

    Separators of thousands and signs of percent and currencies are ignored, 1/2 and LaTeX's
    \frac{1}{2} are a half, 1.5e3 and 1.5 x 10^3 are 1500. A minus sign counts unless a number or a
    word ends right before it: the last number of "3-5" is 5.
    """
    text = FRACTION.sub(r"\1/\2", text)
    last = collections.deque(NUMBER.finditer(text), maxlen=1)
    if not last:
        return None
    found = last[0]
    sign = "-" if found["sign"] else ""
    whole = re.sub(r"\D", "", found["whole"])
    below = found["below"]
    power = (found["power"] or found["tens"] or "0").replace("\u2212", "-")
    before = text[: found.start()]
    is_date = before.endswith("/") and before[-2:-1].isdigit()
    try:
        if below and is_date:
            return Decimal(below)
        if below and int(below):
            return Fraction(int(sign + whole), int(below))
        return Decimal(
            below or f"{sign}{whole or 0}{found['decimals'] or ''}e{power}"
        )
    except (
        ArithmeticError,
        ValueError,
    ):  # more digits, or a larger exponent, than Python reads
        return None


def last_number(prompt: str, response: str, answer: str) -> float:
    """1 where the last number of the response equals that of the answer ("#### 1,234" in GSM8K),
    else 0.
    """
    found = number(response)
    return float(found is not None and found == number(answer))


def exact_text(prompt: str, response: str, answer: str) -> float:
    """1 where response and answer have the same words, whatever the white space between and around
    them, else 0.
    """
    return float(response.split() == answer.split())


def find(name: str) -> Callable:
    """The function called "package.file:function", looked up below `jaxdistill` first.

    Raises:
      ValueError: where there is none.
    """
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", name):
        raise ValueError("no name of a function in a file")
    file, _, function = name.partition(":")
    for module in (f"jaxdistill.{file}", file):
        try:
            within = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name and (
                module == error.name or module.startswith(error.name + ".")
            ):
                continue
            raise
        found = getattr(within, function, None)
        if callable(found):
            return found
        functions = [n for n, value in vars(within).items() if callable(value)]
        public = [name for name in functions if not name.startswith("_")]
        near = difflib.get_close_matches(function, public, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{module} has no function {function!r}{hint}")
    raise ValueError(f"no module {file!r}")


def check(name: str, start: float = START) -> None:
    """Raises ValueError where a child process cannot import the function called `name` within
    `start` seconds.

    Each name is tried once; the library's own functions are looked up without a child process.
    """
    file = name.partition(":")[0]
    if name in _IMPORTED:
        return
    if _exists(f"jaxdistill.{file}") or not _exists(file.partition(".")[0]):
        find(name)
    else:
        _Child(name, start).stop()
    _IMPORTED.add(name)


_IMPORTED: set[str] = set()


def _exists(module: str) -> bool:
    """Whether a module can be found; only the packages that it is in are imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _one_line(error: BaseException) -> str:
    """An exception in one short line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:SHOWN]


def _serve(name: str, pipe: Any) -> None:
    """What a child process does: it imports the verifier, reports that, then answers requests until
    the pipe closes.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    try:
        call = find(name)
    except BaseException as error:
        pipe.send(
            str(error)
            if type(error) is ValueError
            else f"its import raises {_one_line(error)}"
        )
        return
    pipe.send(None)
    while True:
        try:
            sample = pipe.recv()
        except EOFError:
            return
        try:
            value = call(*sample)
            # text has no __float__, even where it could be read as a number
            if hasattr(value, "__float__"):
                answer = float(value)
            else:
                answer = f"returned {value!r:.{SHOWN}}, no number"
        except BaseException as error:
            answer = _one_line(error)
        pipe.send(answer)


class _Child:
    """A process that has imported a verifier.

    Raises ValueError where it cannot within `start` seconds.
    """

    def __init__(self, name: str, start: float):
        context = multiprocessing.get_context("spawn")
        self.pipe, there = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(name, there), daemon=True
        )
        self.process.start()
        there.close()
        try:
            wrong = self.read(start)
        except TimeoutError:
            wrong = f"its import takes longer than {start:g} s"
        except (EOFError, OSError):
            wrong = "its import ends the process"
        if wrong is not None:
            self.stop()
            raise ValueError(wrong)

    def read(self, timeout: float) -> float | str | None:
        """The child's next message.

        Raises TimeoutError, and EOFError where the process has ended.
        """
        if not self.pipe.poll(timeout):
            raise TimeoutError
        return self.pipe.recv()

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


class Pool:
    """Up to `workers` child processes that score samples with the verifier called `name`.

    They are started when they are first needed.
    """

    def __init__(
        self, name: str, timeout: float, workers: int, start: float = START
    ):
        self.name = name
        self.timeout = timeout
        self.workers = workers
        self.start = start
        self.broken = ""  # why no child could be started, in the present call
        self.idle: queue.SimpleQueue[_Child | None] = queue.SimpleQueue()
        for _ in range(workers):
            self.idle.put(None)

    def score(self, samples: Sequence[tuple]) -> list[float | str]:
        """The verifier's value for the arguments of each sample, or the cause of a failure."""
        self.broken = ""
        with ThreadPoolExecutor(self.workers) as threads:
            return list(threads.map(self._one, samples))

    def _one(self, sample: tuple) -> float | str:
        child = self.idle.get()
        try:
            if child is None:
                if self.broken:  # another start would take as long as the first
                    return self.broken
                child = _Child(self.name, self.start)
            child.pipe.send(sample)
            return child.read(self.timeout)
        except ValueError as error:
            self.broken = str(error)
            return self.broken
        except (TimeoutError, EOFError, OSError) as error:
            if child:
                child.stop()
            child = None
            if isinstance(error, TimeoutError):
                return f"no answer in {self.timeout:g} s"
            return "its process died"
        finally:
            self.idle.put(child)

    def close(self) -> None:
        """Ends the processes; the next call starts new ones."""
        for _ in range(self.workers):
            child = self.idle.get()
            if child is not None:
                child.stop()
            self.idle.put(None)
