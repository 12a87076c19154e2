"""Teachers behind an HTTP endpoint with OpenAI's chat completions.

Requests are retried and limited in their rate; interrupted work is resumed; costs are counted.

The server is not trusted: redirects are not followed, an answer is limited in bytes and seconds,
its content is never decompressed, and its error messages become one short line without the key.
"""

from __future__ import annotations

import contextlib
import dataclasses
import email.utils
import functools
import http.client
import io
import itertools
import json
import math
import os
import re
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC
from pathlib import Path
from typing import Any

from absl import logging

from jaxdistill.core.fields import Natural
from jaxdistill.core.types import Refused

# {"role": "system" | "user" | "assistant", "content": text}
Messages = Sequence[Mapping[str, str]]

SHOWN = 400  # characters of an error's line, what a server says included
WINDOW = 8  # length of the parts of the key that are recognised
AGAIN = (408, 409, 429)  # statuses below 500 after which a request is retried
COUNTS = ("prompt_tokens", "completion_tokens")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A server and the settings of its requests.

    Raises Refused on a field out of range.
    """

    url: str  # without /chat/completions at the end
    model: str
    # environment variable with the key; may be unset
    key_variable: str = "OPENAI_API_KEY"
    temperature: float = 0.0
    max_tokens: int = 1024
    # Seconds of a complete request, from its connection to the last byte of its answer.
    timeout: float = 120.0
    max_bytes: int = 16 * 2**20  # of an answer, headers included
    # Attempts after the first, on the statuses 408, 409, 429 and 5xx, on broken connections, and on
    # answers that cannot be read.
    retries: Natural = 6
    # Seconds before the first retry, doubled for each further one, unless the server gives a time.
    backoff: float = 1.0
    # the most seconds before a retry, also where the server gives a time
    max_wait: float = 300.0
    per_minute: float = 0.0  # the most requests a minute; 0: no limit
    price_in: float = 0.0  # per million prompt tokens
    price_out: float = 0.0  # per million tokens of answers
    # For tests.
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self):
        # The value may be the key itself, and is not repeated in the message.
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key_variable):
            raise Refused(
                "endpoint.key_variable: expected the name of an environment variable, "
                "as OPENAI_API_KEY"
            )
        _check_url(self.url)
        least = {
            "temperature": 0.0,
            "max_tokens": 1,
            "max_bytes": 1,
            "retries": 0,
            "backoff": 0.0,
            "max_wait": 0.0,
            "per_minute": 0.0,
            "price_in": 0.0,
            "price_out": 0.0,
        }
        for name, low in least.items():
            value = vars(self)[name]
            if not isinstance(value, (int, float)) or not low <= value < math.inf:
                raise Refused(
                    f"endpoint.{name}={value!r}: expected a number of at least {low:g}"
                )
        if (
            not isinstance(self.timeout, (int, float))
            or not 0 < self.timeout < math.inf
        ):
            raise Refused(
                f"endpoint.timeout={self.timeout!r}: expected seconds above 0"
            )

    def chat(self, messages: Messages) -> dict[str, Any]:
        """One answer: {"text", "prompt_tokens", "completion_tokens"}.

        Raises:
            Refused: where the server refuses the request, redirects it, or answers without end.
            ConnectionError: where all attempts have failed.
        """
        key = self._key()
        request = self._request(messages, key)
        for attempt in range(self.retries + 1):
            try:
                return self._attempt(request, key)
            except _Failed as failed:
                what = str(failed)
                wait = failed.wait
            if attempt < self.retries:
                wait = (
                    self.backoff * 2.0 ** min(attempt, 60) if wait is None else wait
                )
                self.sleep(min(wait, self.max_wait))
        attempts = f"{self.retries + 1} attempts failed, the last with {what}"
        raise ConnectionError(_line(f"{self.url}: {attempts}", key))

    def _key(self) -> str:
        """The key without white space around it; "" where there is none.

        Raises:
            Refused: where it cannot be a key; the message does not repeat it.
        """
        key = os.environ.get(self.key_variable, "").strip()
        if not all("!" <= c <= "~" for c in key):
            where = f"endpoint.key_variable={self.key_variable}"
            raise Refused(
                f"{where}: expected a key of printable ASCII in it, without white space inside"
            )
        return key

    def _request(self, messages: Messages, key: str) -> urllib.request.Request:
        body = {
            "model": self.model,
            "messages": messages,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }
        try:
            data = json.dumps({**body, "messages": list(messages)}).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise Refused(
                _line(
                    f"messages: {error}; expected a list of role and content", key
                )
            ) from None
        headers = {"Content-Type": "application/json"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        return urllib.request.Request(
            f"{self.url.rstrip('/')}/chat/completions", data, headers
        )

    def _attempt(self, request: urllib.request.Request, key: str) -> dict[str, Any]:
        """One attempt. Raises Refused, or _Failed where another attempt may succeed."""
        try:
            with _opener(self.max_bytes).open(
                request, timeout=self.timeout
            ) as reply:
                status = reply.status
                headers = reply.headers
                body = _body(reply)
        except _TooLong:
            raise Refused(
                f"{self.url}: more than max_bytes={self.max_bytes} in one answer"
            ) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _Failed(f"{type(error).__name__}: {error}") from None
        if 300 <= status < 400:
            what = f"sent on to {self._host(headers)}, not followed"
            raise Refused(_line(f"{self.url}: HTTP {status}: {what}", key))
        said = _line(body.decode(errors="replace"), key)
        if status >= 500 or status in AGAIN:
            raise _Failed(
                f"HTTP {status}: {said}", _seconds(headers.get("Retry-After", ""))
            )
        if status >= 400:
            raise Refused(_line(f"{self.url}: HTTP {status}: {said}", key))
        try:
            return self._answer(body, key)
        except Refused:
            raise
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            content = headers.get("Content-Type", "no type")
            encoding = headers.get("Content-Encoding", "not packed")
            where = f"an answer (HTTP {status}, {content}, {encoding})"
            raise _Failed(
                f"{type(error).__name__}: {error} in {where}: {said}"
            ) from None

    def _host(self, headers: http.client.HTTPMessage) -> str:
        """The host that a redirect names."""
        try:
            target = urllib.parse.urljoin(self.url, headers["Location"])
            return urllib.parse.urlsplit(target).hostname or "nowhere"
        except (ValueError, TypeError):
            return "nowhere"

    def _answer(self, body: bytes, key: str) -> dict[str, Any]:
        """The text and the counts in the body of an answer."""
        reply = json.loads(body)
        error = (
            reply.get("error")
            if isinstance(reply, dict) and "choices" not in reply
            else None
        )
        code = error.get("code") if isinstance(error, dict) else None
        if type(code) is int and 400 <= code < 500 and code not in AGAIN:
            raise Refused(
                _line(
                    f"{self.url}: HTTP 200 with an error: {json.dumps(error)}", key
                )
            )
        text = reply["choices"][0]["message"]["content"]
        if not isinstance(text, str):
            raise ValueError("no text")
        return {"text": text, **self._counts(reply.get("usage"), key)}

    def _counts(self, usage: Any, key: str) -> dict[str, int]:
        """Tokens that an answer has used; 0 where the server does not say.

        Where the server says something that is no count, it is 0 with a warning: the answer has
        been paid for, and is kept.
        """
        said = usage if isinstance(usage, dict) else {}
        counts = {
            name: said[name] if _is_count(said.get(name)) else 0 for name in COUNTS
        }
        as_said = all(
            said.get(name) in (None, count) for name, count in counts.items()
        )
        if usage is not None and not (usage is said and as_said):
            logging.warning(
                "%s",
                _line(
                    f"{self.url}: usage {usage!r} has no counts: 0 in the bill", key
                ),
            )
        return counts


class _Failed(Exception):
    """An attempt that may be repeated, after `wait` seconds where the server gives a time."""

    def __init__(self, what: str, wait: float | None = None):
        super().__init__(what)
        self.wait = wait


class _TooLong(Exception):
    """More bytes than an answer may have."""


class _Reader(io.RawIOBase):
    """The bytes that a socket receives, up to a point in time and a number of bytes."""

    def __init__(self, sock: Any, until: float, most: int):
        self.sock = sock
        self.raw = sock.makefile("rb", buffering=0)
        self.until = until
        self.left = most

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        self.sock.settimeout(_left(self.until))
        count = self.raw.readinto(buffer)
        self.left -= count
        if self.left < 0:
            raise _TooLong
        return count

    def close(self) -> None:
        self.raw.close()
        super().close()


class _Socket:
    """A connected socket as http.client uses it, with one deadline for the complete exchange."""

    def __init__(self, sock: Any, until: float, most: int):
        self.sock = sock
        self.until = until
        self.most = most

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Reader(self.sock, self.until, self.most))

    def sendall(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            self.sock.settimeout(_left(self.until))
            view = view[self.sock.send(view[:65536]) :]

    def close(self) -> None:
        self.sock.close()


class _Bounded:
    """Mixin for connections of http.client, with limits of the complete exchange.

    `timeout` are its seconds, and `most` its bytes.
    """

    most = 0

    def connect(self) -> None:
        until = time.monotonic() + self.timeout
        super().connect()
        self.sock = _Socket(self.sock, until, self.most)


class _Http(_Bounded, http.client.HTTPConnection):
    pass


class _Https(_Bounded, http.client.HTTPSConnection):
    pass


class _Handler(urllib.request.AbstractHTTPHandler):
    """Opens http and https; every status is an answer, which is neither followed nor raised."""

    def __init__(self, most: int):
        super().__init__()
        self.most = most

    def _open(
        self, kind: type, request: urllib.request.Request
    ) -> http.client.HTTPResponse:
        return self.do_open(
            type(kind.__name__, (kind,), {"most": self.most}), request
        )

    def http_open(
        self, request: urllib.request.Request
    ) -> http.client.HTTPResponse:
        return self._open(_Http, request)

    def https_open(
        self, request: urllib.request.Request
    ) -> http.client.HTTPResponse:
        return self._open(_Https, request)

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_


def _opener(most: int) -> urllib.request.OpenerDirector:
    """An opener for http and https alone, through the environment's proxy where there is one."""
    opener = urllib.request.OpenerDirector()
    opener.add_handler(urllib.request.ProxyHandler())
    opener.add_handler(_Handler(most))
    return opener


def _left(until: float) -> float:
    """Seconds from now. Raises TimeoutError where there are none."""
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError("the time for a request is over")
    return left


def _body(reply: http.client.HTTPResponse) -> bytes:
    """The body of an answer; for an error, as much of its beginning as can be read."""
    if reply.status < 300:
        return b"".join(iter(functools.partial(reply.read, 65536), b""))
    text = bytearray()
    with contextlib.suppress(
        OSError, http.client.HTTPException, ValueError, _TooLong
    ):
        while len(text) < 20 * SHOWN and (byte := reply.read(1)):
            text += byte
    return bytes(text)


def _line(text: str, key: str) -> str:
    """`text` as one short line of printable characters, without any part of the key."""
    text = _redacted(text[: 20 * SHOWN], key)
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} ..."


def _redacted(text: str, key: str) -> str:
    """`text` with "[key]" in the place of parts of the key.

    The key is recognised as it is, and as JSON, Python or a URL write it.
    """
    if not key:
        return text
    size = min(len(key), WINDOW)
    forms = {
        key,
        json.dumps(key)[1:-1],
        repr(key)[1:-1],
        urllib.parse.quote(key, safe=""),
    }
    windows = {
        re.escape(form[i : i + size])
        for form in forms
        for i in range(len(form) - size + 1)
    }
    hidden = bytearray(len(text))
    for found in re.finditer(f"(?=({'|'.join(windows)}))", text, re.IGNORECASE):
        hidden[found.start() : found.start() + size] = b"\1" * size
    pieces = itertools.groupby(zip(hidden, text), key=lambda pair: pair[0])
    return "".join(
        "[key]" if secret else "".join(c for _, c in run) for secret, run in pieces
    )


def _seconds(text: str) -> float | None:
    """Seconds from a header Retry-After, which holds seconds or a date.

    None where it holds neither, or a date that has passed.

    Source: RFC 9110, section 10.2.3.
    """
    if re.fullmatch(r"[0-9]+(\.[0-9]*)?", text.strip()):
        return float(text)
    try:
        date = email.utils.parsedate_to_datetime(text)
        wait = (
            date if date.tzinfo else date.replace(tzinfo=UTC)
        ).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
    return wait if wait > 0 else None


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _check_url(url: str) -> None:
    """Raises Refused where `url` is not http(s)://host[:port][/path].

    The message does not repeat a password in it.
    """
    expected = "expected http(s)://host[:port][/path]"
    try:
        parts = urllib.parse.urlsplit(url)
        valid = (
            parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        )
    except ValueError:
        valid = False
    if not valid or not all("!" <= c <= "~" for c in url):
        raise Refused(f"endpoint.url={url.rpartition('@')[2]!r}: {expected}")
    if parts.username is not None or parts.query or parts.fragment:
        raise Refused(
            f"endpoint.url: {expected} on {parts.hostname}, without user, query or fragment"
        )


def ask_all(
    endpoint: Endpoint,
    questions: Iterable[tuple[str, Messages]],
    file: str | Path,
    workers: int = 8,
) -> dict[str, float]:
    """Asks every question whose id `file` does not have yet.

    Each answer is appended at once as a JSON line {"id", "text", ...}. The first error stops the
    work, and answers so far stay; a further call asks the missing questions, and none twice.

    Args:
        questions: (id, messages) of each.
        file: where the answers are.
        workers: requests at the same time.

    Returns:
        The bill of the complete file: requests, prompt_tokens, completion_tokens, cost.

    Raises:
        Refused: before the first request, where `file` holds something else, or where one id has
            two questions.
    """
    if workers < 1:
        raise Refused(f"workers={workers}: expected at least 1")
    file = Path(file)
    lock = threading.Lock()
    due = [endpoint.clock()]
    answered = {record["id"] for record in read(file)}
    fresh = _fresh(questions, answered)

    def wait_for_rate() -> None:
        """Waits until the rate limit allows the next request."""
        if endpoint.per_minute:
            with lock:
                now = endpoint.clock()
                wait = max(0.0, due[0] - now)
                due[0] = max(due[0], now) + 60.0 / endpoint.per_minute
            if wait:
                endpoint.sleep(wait)

    with _appending(file) as out, ThreadPoolExecutor(workers) as pool:
        stop = threading.Event()

        def work(item: tuple[str, Messages]) -> None:
            if stop.is_set():
                return
            try:
                wait_for_rate()
                record = {"id": item[0], **endpoint.chat(item[1])}
                with lock:
                    out.write(json.dumps(record) + "\n")
                    out.flush()
            except BaseException:
                stop.set()
                raise

        try:
            for job in [pool.submit(work, item) for item in fresh.items()]:
                job.result()
        finally:
            stop.set()  # after an interruption, too, no more is asked
    return bill(endpoint, file)


def _fresh(
    questions: Iterable[tuple[str, Messages]], answered: set[str]
) -> dict[str, Messages]:
    """The questions without an answer, by id. Raises Refused where an id has two."""
    fresh: dict[str, Messages] = {}
    for name, messages in questions:
        if not isinstance(name, str):
            raise Refused(f"questions: id {name!r}: expected a text")
        if name in answered:
            continue
        if fresh.setdefault(name, messages) != messages:
            raise Refused(f"questions: two with the id {name!r}")
    return fresh


def _appending(file: Path) -> io.TextIOBase:
    """`file`, opened to append lines. Raises Refused where that cannot be done."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        return file.open("a", encoding="ascii")
    except OSError as error:
        raise Refused(f"{file}: {error.strerror or error}") from None


def read(file: str | Path) -> list[dict[str, Any]]:
    """The answers in a file.

    A last line that was cut off is removed from the file, so that the next line can follow.

    Raises:
        Refused: where another line is no answer; the message names it. The file then stays as it
            is.
    """
    file = Path(file)
    try:
        data = file.read_bytes() if file.exists() else b""
        *lines, last = data.split(b"\n")
        if last and _parsed(last) is None and not _began(last):
            raise _no_answer(file, len(lines) + 1)
        records = []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            if (record := _parsed(line)) is None:
                raise _no_answer(file, number)
            records.append(record)
        if (
            last and (record := _parsed(last)) is not None
        ):  # complete but for its line end
            records.append(record)
            with file.open("ab") as out:
                out.write(b"\n")
        elif last:
            logging.warning(
                "%s: line %d was cut off and is removed", file, len(lines) + 1
            )
            with file.open("r+b") as out:
                out.truncate(len(data) - len(last))
    except OSError as error:
        raise Refused(f"{file}: {error.strerror or error}") from None
    return records


def _no_answer(file: Path, line: int) -> Refused:
    """The refusal of a line that is no answer."""
    expected = "expected a JSON object with id, text and counts"
    return Refused(f"{file}: line {line} is no answer; {expected}")


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The record in a line; None where it holds none."""
    try:
        record = json.loads(line)
        texts = all(isinstance(record[name], str) for name in ("id", "text"))
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    counts = all(_is_count(record.get(name)) for name in COUNTS) if texts else False
    return record if counts else None


def _began(line: bytes) -> bool:
    """Whether a line may be the beginning of a record.

    A crash of the machine may leave zeros at its end.
    """
    head = b'{"id": "'
    text = line.rstrip(b"\0")
    return text[: len(head)] == head[: len(text)]


def bill(endpoint: Endpoint, file: str | Path) -> dict[str, float]:
    """Requests and tokens of the answers in `file`, and their cost at the endpoint's prices."""
    records = read(file)
    used = {name: sum(record[name] for record in records) for name in COUNTS}
    price = used["prompt_tokens"] * endpoint.price_in
    price += used["completion_tokens"] * endpoint.price_out
    cost = price / 1e6
    return {"requests": len(records), **used, "cost": cost}
