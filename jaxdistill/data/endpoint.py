"""Teachers behind an HTTP endpoint that speaks OpenAI's chat completions: retries, a rate limit,
resumption, a bill.

The server is not trusted: no redirect is followed, an answer has a bound in bytes and in seconds,
nothing that it sends is unpacked, and what it says in an error becomes one short line without the
key.
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

Messages = Sequence[Mapping[str, str]]  # {"role": "system" | "user" | "assistant", "content": text}

SHOWN = 400  # characters of an error's line, what a server says included
WINDOW = 8  # characters in a row that are recognised as the key's
AGAIN = (408, 409, 429)  # statuses below 500 that are worth a further attempt
COUNTS = ("prompt_tokens", "completion_tokens")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where to ask and how. `clock` and `sleep` are there for tests. Raises Refused on a field out
    of range.
    """

    url: str  # up to and without /chat/completions
    model: str
    key_variable: str = (
        "OPENAI_API_KEY"  # environment variable that holds the key; sent where it is set
    )
    temperature: float = 0.0
    max_tokens: int = 1024
    # seconds that a whole request may take, from its connection to the last byte of its answer
    timeout: float = 120.0
    max_bytes: int = 16 * 2**20  # of an answer, its headers included
    # after the first attempt, on 408, 409, 429, 5xx, broken connections and answers that are none
    retries: Natural = 6
    # seconds before the first retry, doubled for each further one, unless the server names a time
    backoff: float = 1.0
    max_wait: float = 300.0  # seconds before a retry, whatever the server names
    per_minute: float = 0.0  # requests a minute at most; 0: no limit
    price_in: float = 0.0  # per million prompt tokens
    price_out: float = 0.0  # per million tokens of answers
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self):
        if not re.fullmatch(
            r"[A-Za-z_][A-Za-z0-9_]*", self.key_variable
        ):  # which may be the key itself: it is not repeated
            raise Refused(
                "endpoint.key_variable: expected the name of an environment variable, as OPENAI_API_KEY"
            )
        _check_url(self.url)
        least = {
            "temperature": 0.0,
            "max_tokens": 1,
            "max_bytes": 1,
            "retries": 0,
            "backoff": 0.0,
            "max_wait": 0.0,
        }
        for name, low in {**least, "per_minute": 0.0, "price_in": 0.0, "price_out": 0.0}.items():
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not low <= value < math.inf:
                raise Refused(f"endpoint.{name}={value!r}: expected a number of at least {low:g}")
        if not isinstance(self.timeout, (int, float)) or not 0 < self.timeout < math.inf:
            raise Refused(f"endpoint.timeout={self.timeout!r}: expected seconds above 0")

    def chat(self, messages: Messages) -> dict[str, Any]:
        """{"text", "prompt_tokens", "completion_tokens"} of one answer.

        Raises Refused where the server refuses the request, sends it elsewhere or answers without
        end, ConnectionError where all attempts have failed.
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
                wait = self.backoff * 2.0 ** min(attempt, 60) if wait is None else wait
                self.sleep(min(wait, self.max_wait))
        attempts = f"{self.retries + 1} attempts failed, the last with {what}"
        raise ConnectionError(_line(f"{self.url}: {attempts}", key))

    def _key(self) -> str:
        """The key, white space around it aside; "" where there is none. Raises Refused, which does
        not repeat it.
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
                _line(f"messages: {error}; expected a list of role and content", key)
            ) from None
        headers = {"Content-Type": "application/json"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        return urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", data, headers)

    def _attempt(self, request: urllib.request.Request, key: str) -> dict[str, Any]:
        """One exchange. Raises Refused, or _Failed where a further one may help."""
        try:
            with _opener(self.max_bytes).open(request, timeout=self.timeout) as reply:
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
            raise Refused(
                _line(
                    f"{self.url}: HTTP {status}: sent on to {self._host(headers)}, not followed",
                    key,
                )
            )
        said = _line(body.decode(errors="replace"), key)
        if status >= 500 or status in AGAIN:
            raise _Failed(f"HTTP {status}: {said}", _seconds(headers.get("Retry-After", "")))
        if status >= 400:
            raise Refused(_line(f"{self.url}: HTTP {status}: {said}", key))
        try:
            return self._answer(body, key)
        except Refused:
            raise
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            kind = f"HTTP {status}, {headers.get('Content-Type', 'no type')}, {headers.get('Content-Encoding', 'not packed')}"
            raise _Failed(
                f"{type(error).__name__}: {error} in an answer ({kind}): {said}"
            ) from None

    def _host(self, headers: http.client.HTTPMessage) -> str:
        """The host that a redirect names."""
        try:
            return (
                urllib.parse.urlsplit(urllib.parse.urljoin(self.url, headers["Location"])).hostname
                or "nowhere"
            )
        except (ValueError, TypeError):
            return "nowhere"

    def _answer(self, body: bytes, key: str) -> dict[str, Any]:
        reply = json.loads(body)
        error = reply.get("error") if isinstance(reply, dict) and "choices" not in reply else None
        code = error.get("code") if isinstance(error, dict) else None
        if type(code) is int and 400 <= code < 500 and code not in AGAIN:
            raise Refused(_line(f"{self.url}: HTTP 200 with an error: {json.dumps(error)}", key))
        text = reply["choices"][0]["message"]["content"]
        if not isinstance(text, str):
            raise ValueError("no text")
        return {"text": text, **self._counts(reply.get("usage"), key)}

    def _counts(self, usage: Any, key: str) -> dict[str, int]:
        """Tokens that an answer has used; 0 where the server does not say, or, with a warning,
        where it says no count.
        """
        said = usage if isinstance(usage, dict) else {}
        counts = {name: said[name] if _is_count(said.get(name)) else 0 for name in COUNTS}
        sound = usage is None or (
            usage is said and all(said.get(name) in (None, count) for name, count in counts.items())
        )
        if not sound:  # the answer has been paid for: it is kept
            logging.warning(
                "%s", _line(f"{self.url}: usage {usage!r} has no counts: 0 in the bill", key)
            )
        return counts


class _Failed(Exception):
    """An attempt that another may follow; `wait`: seconds that the server asks for, None where it
    does not.
    """

    def __init__(self, what: str, wait: float | None = None):
        super().__init__(what)
        self.wait = wait


class _TooLong(Exception):
    """More bytes than an answer may have."""


class _Reader(io.RawIOBase):
    """What a socket receives, until a time and up to a number of bytes."""

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
    """A connected socket as http.client uses it, with one deadline for all that goes through it."""

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
    """Before a connection of http.client: its `timeout` is that of the whole exchange, and `most`
    its bytes.
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
    """Opens http and https. Every status is an answer: none is followed, none raised."""

    def __init__(self, most: int):
        super().__init__()
        self.most = most

    def _open(self, kind: type, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(type(kind.__name__, (kind,), {"most": self.most}), request)

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self._open(_Http, request)

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self._open(_Https, request)

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_


def _opener(most: int) -> urllib.request.OpenerDirector:
    """http and https, through the environment's proxy where it names one, and nothing else."""
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
    """All of it; of an error its beginning, as much as came."""
    if reply.status < 300:
        return b"".join(iter(functools.partial(reply.read, 65536), b""))
    text = bytearray()
    with contextlib.suppress(OSError, http.client.HTTPException, ValueError, _TooLong):
        while len(text) < 20 * SHOWN and (byte := reply.read(1)):
            text += byte
    return bytes(text)


def _line(text: str, key: str) -> str:
    """`text` as one short line of printable characters, without any part of the key."""
    text = _redacted(text[: 20 * SHOWN], key)
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} ..."


def _redacted(text: str, key: str) -> str:
    """`text` with [key] in place of each run of characters of the key, as it is or as JSON, Python
    or a URL write it.
    """
    if not key:
        return text
    size = min(len(key), WINDOW)
    forms = {key, json.dumps(key)[1:-1], repr(key)[1:-1], urllib.parse.quote(key, safe="")}
    windows = {re.escape(form[i : i + size]) for form in forms for i in range(len(form) - size + 1)}
    hidden = bytearray(len(text))
    for found in re.finditer(f"(?=({'|'.join(windows)}))", text, re.IGNORECASE):
        hidden[found.start() : found.start() + size] = b"\1" * size
    pieces = itertools.groupby(zip(hidden, text), key=lambda pair: pair[0])
    return "".join("[key]" if secret else "".join(c for _, c in run) for secret, run in pieces)


def _seconds(text: str) -> float | None:
    """Retry-After, seconds or a date (RFC 9110, section 10.2.3), in seconds; None where it says
    nothing that can be waited for.
    """
    if re.fullmatch(r"[0-9]+(\.[0-9]*)?", text.strip()):
        return float(text)
    try:
        date = email.utils.parsedate_to_datetime(text)
        wait = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
    return wait if wait > 0 else None


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _check_url(url: str) -> None:
    """Raises Refused where `url` is not http(s)://host[:port][/path]; a password in it is not
    repeated.
    """
    expected = "expected http(s)://host[:port][/path]"
    try:
        parts = urllib.parse.urlsplit(url)
        sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        sound = False
    if not sound or not all("!" <= c <= "~" for c in url):
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
    """Asks every (id, messages) whose id `file` does not have yet; each answer becomes a JSON line
    {"id", "text", ...} at once.

    Run again after an interruption it asks what is missing and no id twice. Returns the bill of the
    whole file: requests, prompt_tokens, completion_tokens, cost. The first error stops it, and what
    was answered stays. Raises Refused before the first request where `file` holds something else,
    or where one id has two questions.
    """
    if workers < 1:
        raise Refused(f"workers={workers}: expected at least 1")
    file = Path(file)
    lock = threading.Lock()
    due = [endpoint.clock()]
    answered = {record["id"] for record in read(file)}
    fresh = _fresh(questions, answered)

    def turn() -> None:
        """Waits until the rate limit lets the next request go."""
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
                turn()
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
            stop.set()  # an interruption, too, asks nothing more
    return bill(endpoint, file)


def _fresh(questions: Iterable[tuple[str, Messages]], answered: set[str]) -> dict[str, Messages]:
    """The questions without an answer, by id. Raises Refused."""
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
    """`file`, open for more lines. Raises Refused."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        return file.open("a", encoding="ascii")
    except OSError as error:
        raise Refused(f"{file}: {error.strerror or error}") from None


def read(file: str | Path) -> list[dict[str, Any]]:
    """The answers in a file. A last line that was cut off is removed from it, so that what follows
    is whole.

    Raises Refused, naming the line, where another is no answer; the file is then left as it is.
    """
    file = Path(file)
    try:
        data = file.read_bytes() if file.exists() else b""
        *lines, last = data.split(b"\n")
        if last and _parsed(last) is None and not _began(last):
            raise Refused(
                f"{file}: line {len(lines) + 1} is no answer; expected a JSON object with id, text and counts"
            )
        records = []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            if (record := _parsed(line)) is None:
                raise Refused(
                    f"{file}: line {number} is no answer; expected a JSON object with id, text and counts"
                )
            records.append(record)
        if last and (record := _parsed(last)) is not None:  # whole but for its end
            records.append(record)
            with file.open("ab") as out:
                out.write(b"\n")
        elif last:
            logging.warning("%s: line %d was cut off and is removed", file, len(lines) + 1)
            with file.open("r+b") as out:
                out.truncate(len(data) - len(last))
    except OSError as error:
        raise Refused(f"{file}: {error.strerror or error}") from None
    return records


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A record, or None where the line holds none."""
    try:
        record = json.loads(line)
        whole = all(isinstance(record[name], str) for name in ("id", "text"))
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return record if whole and all(_is_count(record.get(name)) for name in COUNTS) else None


def _began(line: bytes) -> bool:
    """Whether a line may be the beginning of a record; a crash of the machine may leave zeros at
    its end.
    """
    head = b'{"id": "'
    text = line.rstrip(b"\0")
    return text[: len(head)] == head[: len(text)]


def bill(endpoint: Endpoint, file: str | Path) -> dict[str, float]:
    """What the answers in `file` have used, and cost at the endpoint's prices."""
    records = read(file)
    used = {name: sum(record[name] for record in records) for name in COUNTS}
    cost = (
        used["prompt_tokens"] * endpoint.price_in + used["completion_tokens"] * endpoint.price_out
    ) / 1e6
    return {"requests": len(records), **used, "cost": cost}
