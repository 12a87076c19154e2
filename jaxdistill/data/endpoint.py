"""Teachers behind an HTTP endpoint that speaks OpenAI's chat completions: retries, a rate limit, resumption, a bill."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jaxdistill.core.types import Refused

Messages = Sequence[Mapping[str, str]]  # {"role": "system" | "user" | "assistant", "content": text}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where to ask and how. `clock` and `sleep` are there for tests."""

    url: str  # up to and without /chat/completions
    model: str
    key_variable: str = "OPENAI_API_KEY"  # environment variable that holds the key; sent where it is set
    temperature: float = 0.0
    max_tokens: int = 1024
    timeout: float = 120.0  # seconds that a request may take
    retries: int = 6  # after the first attempt, on 408, 409, 429, 5xx and broken connections
    backoff: float = 1.0  # seconds before the first retry, doubled for each further one, unless the server names a time
    per_minute: float = 0.0  # requests a minute at most; 0: no limit
    price_in: float = 0.0  # per million prompt tokens
    price_out: float = 0.0  # per million tokens of answers
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def chat(self, messages: Messages) -> dict[str, Any]:
        """{"text", "prompt_tokens", "completion_tokens"} of one answer.

        Raises Refused where the server refuses the request, ConnectionError where all attempts have failed.
        """
        body = {"model": self.model, "messages": list(messages), "temperature": self.temperature, "max_tokens": self.max_tokens}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers)
        for attempt in range(self.retries + 1):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                    return _answer(json.load(reply))
            except urllib.error.HTTPError as error:
                with error:
                    if error.code < 500 and error.code not in (408, 409, 429):
                        raise Refused(f"{self.url}: HTTP {error.code}: {error.read(300).decode(errors='replace').strip()}") from None
                    what, wait = f"HTTP {error.code}", error.headers.get("Retry-After", "")
            except (OSError, ValueError, LookupError, TypeError) as error:  # no connection, or an answer that is none
                what, wait = f"{type(error).__name__}: {error}", ""
            if attempt < self.retries:
                self.sleep(float(wait) if wait.replace(".", "", 1).isdigit() else self.backoff * 2**attempt)
        raise ConnectionError(f"{self.url}: {self.retries + 1} attempts failed, the last with {what}")


def _answer(reply: Mapping[str, Any]) -> dict[str, Any]:
    text, usage = reply["choices"][0]["message"]["content"], reply.get("usage") or {}
    if not isinstance(text, str):
        raise ValueError("an answer without text")
    return {"text": text, **{name: int(usage.get(name, 0)) for name in ("prompt_tokens", "completion_tokens")}}


def ask_all(endpoint: Endpoint, questions: Iterable[tuple[str, Messages]], file: str | Path, workers: int = 8) -> dict[str, float]:
    """Asks every (id, messages) whose id `file` does not have yet; each answer becomes a JSON line {"id", "text", ...} at once.

    Run again after an interruption it asks what is missing and no id twice. Returns the bill of the whole file: requests,
    prompt_tokens, completion_tokens, cost. The first error stops it, and what was answered stays.
    """
    file, lock, due = Path(file), threading.Lock(), [endpoint.clock()]
    answered = {record["id"] for record in read(file)}
    file.parent.mkdir(parents=True, exist_ok=True)

    def turn() -> None:
        """Waits until the rate limit lets the next request go."""
        if endpoint.per_minute:
            with lock:
                now = endpoint.clock()
                wait, due[0] = max(0.0, due[0] - now), max(due[0], now) + 60.0 / endpoint.per_minute
            if wait:
                endpoint.sleep(wait)

    with file.open("a") as out, ThreadPoolExecutor(workers) as pool:
        stop = threading.Event()

        def work(item: tuple[str, Messages]) -> None:
            if stop.is_set():
                return
            try:
                turn()
                record = {"id": item[0], **endpoint.chat(item[1])}
            except BaseException:
                stop.set()
                raise
            with lock:
                out.write(json.dumps(record) + "\n")
                out.flush()

        fresh = {name: messages for name, messages in questions if name not in answered}
        for job in [pool.submit(work, item) for item in fresh.items()]:
            job.result()
    return bill(endpoint, file)


def read(file: str | Path) -> list[dict[str, Any]]:
    """The answers in a file. A last line that was cut off is removed from it, so that what follows is whole."""
    file = Path(file)
    data = file.read_bytes() if file.exists() else b""
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        with file.open("r+b") as out:
            out.truncate(len(whole))
    return [json.loads(line) for line in whole.splitlines()]


def bill(endpoint: Endpoint, file: str | Path) -> dict[str, float]:
    """What the answers in `file` have used, and cost at the endpoint's prices."""
    records = read(file)
    used = {name: sum(r[name] for r in records) for name in ("prompt_tokens", "completion_tokens")}
    cost = (used["prompt_tokens"] * endpoint.price_in + used["completion_tokens"] * endpoint.price_out) / 1e6
    return {"requests": len(records), **used, "cost": cost}
