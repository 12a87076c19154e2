import concurrent.futures
import contextlib
import dataclasses
import gzip
import json
import socket
import struct
import threading
import time
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from absl import logging

from jaxdistill.core.types import Refused
from jaxdistill.data.endpoint import Endpoint, ask_all, bill, read


class Server(ThreadingHTTPServer):
    """Answers each question with its text in capitals, after the statuses that `script` lists."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script = []
        self.seen = []
        self.headers = []


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append(body)
        self.server.headers.append(dict(self.headers))
        status, extra, reply = (
            self.server.script.pop(0) if self.server.script else (200, {}, None)
        )
        text = body["messages"][-1]["content"].upper()
        usage = {"prompt_tokens": len(text), "completion_tokens": 2}
        reply = (
            json.dumps(
                {
                    "choices": [
                        {"message": {"role": "assistant", "content": text}}
                    ],
                    "usage": usage,
                }
            )
            if reply is None
            else reply
        )
        self.send_response(status)
        for name, value in extra.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(reply.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(
        target=server.serve_forever, args=(0.01,), daemon=True
    )
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def waits():
    return []


@pytest.fixture
def endpoint(server, waits):
    url = f"http://127.0.0.1:{server.server_port}/v1"
    return Endpoint(
        url=url,
        model="m",
        key_variable="NO_SUCH_KEY",
        retries=3,
        sleep=waits.append,
        price_in=1.0,
        price_out=3.0,
    )


def say(text):
    return [{"role": "user", "content": text}]


def test_request_and_answer(server, endpoint, monkeypatch):
    assert endpoint.chat(say("hello")) == {
        "text": "HELLO",
        "prompt_tokens": 5,
        "completion_tokens": 2,
    }
    assert server.seen == [
        {
            "model": "m",
            "messages": say("hello"),
            "temperature": 0.0,
            "max_tokens": 1024,
        }
    ]
    assert "Authorization" not in server.headers[0]
    monkeypatch.setenv("NO_SUCH_KEY", "secret")
    endpoint.chat(say("x"))
    assert server.headers[1]["Authorization"] == "Bearer secret"


def test_retries_wait_longer_each_time_or_as_told(server, endpoint, waits):
    server.script = [
        (500, {}, ""),
        (429, {"Retry-After": "7"}, ""),
        (200, {}, "not JSON"),
    ]
    assert endpoint.chat(say("a"))["text"] == "A"
    assert waits == [1.0, 7.0, 4.0] and len(server.seen) == 4


def test_gives_up(server, endpoint, waits):
    server.script = [(503, {}, "")] * 4
    with pytest.raises(
        ConnectionError, match="4 attempts failed, the last with HTTP 503"
    ):
        endpoint.chat(say("a"))
    assert waits == [1.0, 2.0, 4.0]


def test_what_the_server_refuses_is_not_tried_again(server, endpoint, waits):
    server.script = [(401, {}, "bad key")]
    with pytest.raises(Refused, match="HTTP 401: bad key"):
        endpoint.chat(say("a"))
    assert waits == [] and len(server.seen) == 1


def test_an_endpoint_that_is_not_there(waits):
    with pytest.raises(ConnectionError, match="2 attempts failed"):
        Endpoint(
            url="http://127.0.0.1:9", model="m", retries=1, sleep=waits.append
        ).chat(say("a"))


def test_resumes_without_asking_twice(server, endpoint, tmp_path):
    questions = [(f"q{i}", say(f"text {i}")) for i in range(12)]
    server.script = [(200, {}, None)] * 5 + [(400, {}, "no")]
    with pytest.raises(Refused):
        ask_all(endpoint, questions, tmp_path / "out.jsonl", workers=1)
    assert len(read(tmp_path / "out.jsonl")) == 5
    with (tmp_path / "out.jsonl").open("a") as file:
        file.write('{"id": "q7", "te')  # killed while writing
    total = ask_all(
        endpoint, [*questions, questions[0]], tmp_path / "out.jsonl", workers=4
    )
    records = read(tmp_path / "out.jsonl")
    assert sorted(r["id"] for r in records) == sorted(name for name, _ in questions)
    assert {r["id"]: r["text"] for r in records} == {
        f"q{i}": f"TEXT {i}" for i in range(12)
    }
    # every question once, and the one that was refused
    assert len(server.seen) == 12 + 1
    tokens = sum(len(f"text {i}") for i in range(12))
    assert total == bill(endpoint, tmp_path / "out.jsonl")
    assert total == {
        "requests": 12,
        "prompt_tokens": tokens,
        "completion_tokens": 24,
        "cost": pytest.approx((tokens + 3 * 24) / 1e6),
    }


def test_rate_limit_spaces_requests(server, tmp_path):
    now = [100.0]
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        now[0] += seconds

    limited = Endpoint(
        url=f"http://127.0.0.1:{server.server_port}",
        model="m",
        per_minute=30,
        clock=lambda: now[0],
        sleep=sleep,
    )
    ask_all(
        limited,
        [(str(i), say("x")) for i in range(4)],
        tmp_path / "out.jsonl",
        workers=1,
    )
    assert waits == [2.0, 2.0, 2.0]


OK = (
    b'{"choices": [{"message": {"content": "A"}}], '
    b'"usage": {"prompt_tokens": 1, "completion_tokens": 2}}'
)
KEY = 'sk-test-1"2\\3/abcdefghijklmnop'


def http(body=b"", status="200 OK", **headers):
    lines = [
        f"HTTP/1.1 {status}",
        *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items()),
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def drip(piece, pause=0.05):
    """Sends `piece` again and again until nobody listens."""

    def behave(connection):
        for _ in range(200):
            connection.sendall(piece)
            time.sleep(pause)

    return behave


def after(head, then):
    return lambda connection: (connection.sendall(head), then(connection))


def reset(connection):
    connection.setsockopt(
        socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
    )


def echo(status, shown=lambda key: key):
    """A server that repeats the request's key."""

    def behave(connection, request):
        key = request.partition(b"Bearer ")[2].partition(b"\r\n")[0].decode()
        connection.sendall(http(shown(key).encode(), status))

    return behave


class Faulty:
    """Behaves as told once it has read a request: bytes to send, or a function of the connection
    (and the request).
    """

    def __init__(self):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.behave = b""
        self.seen = []
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/v1"
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(
                target=self.answer, args=(connection,), daemon=True
            ).start()

    def answer(self, connection):
        request = b""
        with connection, contextlib.suppress(OSError):
            while b"\r\n\r\n" not in request:
                request += connection.recv(65536)
            length = int(
                request.lower()
                .partition(b"content-length: ")[2]
                .partition(b"\r\n")[0]
            )
            while len(request.partition(b"\r\n\r\n")[2]) < length:
                request += connection.recv(65536)
            self.seen.append(request)
            if isinstance(self.behave, bytes):
                connection.sendall(self.behave)
            else:
                self.behave(
                    *(connection, request)[: self.behave.__code__.co_argcount]
                )


@pytest.fixture
def faulty():
    server = Faulty()
    yield server
    server.listener.close()


def shortly(server, waits, **fields):
    small = {
        "timeout": 20.0,
        "retries": 1,
        "max_bytes": 20_000,
        "key_variable": "THE_KEY",
    }
    return Endpoint(
        url=server.url, model="m", sleep=waits.append, **{**small, **fields}
    )


GZIP = gzip.compress(b" " * 2**24 + OK)
FAULTS = {  # name -> (behaviour, error, what its line says)
    "closes at once": (lambda c: None, ConnectionError, "RemoteDisconnected"),
    "resets": (reset, ConnectionError, "ConnectionReset|RemoteDisconnected"),
    "says nothing": (
        lambda c: time.sleep(1),
        ConnectionError,
        "timed out|time for a request is over",
    ),
    "no status line": (b"hello\r\n\r\n", ConnectionError, "BadStatusLine"),
    "status without number": (http(OK, "abc"), ConnectionError, "BadStatusLine"),
    "status of six digits": (
        http(OK, "200000 OK"),
        ConnectionError,
        "BadStatusLine",
    ),
    "binary status line": (
        b"\x00\xff\x1b[31m\x07\n" * 20,
        ConnectionError,
        "BadStatusLine",
    ),
    "status line without end": (
        drip(b"H" * 4000, 0),
        Refused,
        "max_bytes=20000|LineTooLong",
    ),
    "status line that drips": (drip(b"H"), ConnectionError, "timed out|is over"),
    "headers without end": (
        after(b"HTTP/1.1 200 OK\r\n", drip(b"A: b\r\n" * 500, 0)),
        ConnectionError,
        "headers",
    ),
    "one header without end": (
        after(b"HTTP/1.1 200 OK\r\nA: ", drip(b"a" * 4000, 0)),
        Refused,
        "max_bytes=20000",
    ),
    "headers that drip": (
        after(b"HTTP/1.1 200 OK\r\nA: ", drip(b"a")),
        ConnectionError,
        "timed out|is over",
    ),
    "100 for ever": (
        drip(b"HTTP/1.1 100 Continue\r\n\r\n"),
        ConnectionError,
        "timed out|is over",
    ),
    "body without end": (
        after(http(b'{"'), drip(b"a" * 4000, 0)),
        Refused,
        "more than max_bytes=20000 in one answer",
    ),
    "600 MB announced": (
        after(http(Content_Length=600_000_000), drip(b" " * 4000, 0)),
        Refused,
        "max_bytes=20000",
    ),
    "body that drips": (
        after(http(Content_Length=len(OK)), drip(b" ")),
        ConnectionError,
        "timed out|is over",
    ),
    "body that stops": (
        after(http(OK[:20], Content_Length=len(OK)), lambda c: time.sleep(1)),
        ConnectionError,
        "timed out|is over",
    ),
    "body cut off": (
        http(OK[:20], Content_Length=len(OK)),
        ConnectionError,
        "JSONDecodeError",
    ),
    "negative length": (
        after(http(Content_Length=-5), drip(b" " * 4000, 0)),
        Refused,
        "max_bytes",
    ),
    "chunks of garbage": (
        http(b"zz\r\nhello\r\n", Transfer_Encoding="chunked"),
        ConnectionError,
        "IncompleteRead|ValueError",
    ),
    "a chunk of -1": (
        after(http(b"-1\r\n", Transfer_Encoding="chunked"), drip(b" " * 4000, 0)),
        (Refused, ConnectionError),
        "max_bytes|IncompleteRead|ValueError",
    ),
    "chunks without end": (
        after(
            http(Transfer_Encoding="chunked"),
            drip(b"fff\r\n" + b" " * 4095 + b"\r\n", 0),
        ),
        Refused,
        "max_bytes",
    ),
    "a gzip bomb": (
        http(GZIP, Content_Encoding="gzip"),
        (ConnectionError, Refused),
        "gzip|max_bytes",
    ),
    "HTML": (
        http(b"<html>\n\x1b[31mhello\n</html>", Content_Type="text/html"),
        ConnectionError,
        "text/html.*<html> .*hello </html>",
    ),
    "nothing": (http(), ConnectionError, "JSONDecodeError"),
    "no content": (
        http(status="204 No Content"),
        ConnectionError,
        "JSONDecodeError",
    ),
    "not UTF-8": (
        http(b'{"choices": "\xff\xfe\xff"}'),
        ConnectionError,
        "UnicodeDecodeError",
    ),
    "brackets": (
        http(b"[" * 19_000),
        ConnectionError,
        "RecursionError|JSONDecodeError",
    ),
    "a list": (http(b"[1, 2]"), ConnectionError, "TypeError"),
    "a number": (http(b"1"), ConnectionError, "TypeError"),
    "no choices": (http(b'{"choices": []}'), ConnectionError, "IndexError"),
    "choices of another kind": (
        http(b'{"choices": {"0": 1}}'),
        ConnectionError,
        "KeyError",
    ),
    "no text": (
        http(b'{"choices": [{"message": {"content": null}}]}'),
        ConnectionError,
        "no text",
    ),
    "an error that is called 200": (
        http(b'{"error": {"code": 402, "message": "pay\\nfirst"}}'),
        Refused,
        "HTTP 200 with an error.*pay",
    ),
    "a passing error that is called 200": (
        http(b'{"error": {"code": 429}}'),
        ConnectionError,
        "429",
    ),
    "an error without a code": (http(b'{"error": "so"}'), ConnectionError, "so"),
    "400 without end": (
        after(http(b"so", "400 No"), drip(b"\n" + b"a" * 4000, 0)),
        Refused,
        "HTTP 400: so aaa",
    ),
    "400 that drips": (
        after(http(b"so", "400 No"), drip(b"a")),
        Refused,
        "HTTP 400: soa",
    ),
    "300 without a location": (
        http(status="302 Found"),
        Refused,
        "HTTP 302: sent on to 127.0.0.1|nowhere",
    ),
    "a location that is none": (
        http(status="302 Found", Location="http://[::1"),
        Refused,
        "HTTP 302: sent on to nowhere",
    ),
    "a file as location": (
        http(status="302 Found", Location="file:///etc/passwd"),
        Refused,
        "HTTP 302: sent on to nowhere",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_server_costs_bounded_time_and_one_line(
    name, faulty, waits, monkeypatch
):
    monkeypatch.setenv("THE_KEY", KEY)
    faulty.behave, error, says = FAULTS[name]
    slow = "is over" in says or "drips" in name
    with pytest.raises(error, match=says) as caught:
        shortly(faulty, waits, timeout=0.5 if slow else 20.0).chat(say("a"))
    line = str(caught.value)
    assert line.isprintable() and len(line) <= 410 and line.startswith(faulty.url)
    assert (
        KEY[:12] not in line
        and not traceback.format_exception(caught.value, limit=0)[1:]
    )
    assert (
        len(faulty.seen) == (1 if caught.type is Refused else 2)
        and len(waits) == len(faulty.seen) - 1
    )


@pytest.mark.parametrize("status", [300, 301, 302, 303, 307, 308])
def test_the_key_goes_to_no_other_host(status, faulty, waits, monkeypatch):
    monkeypatch.setenv("THE_KEY", KEY)
    other = Faulty()
    other.behave = http(OK)
    faulty.behave = http(
        status=f"{status} There",
        Location=other.url.replace("127.0.0.1", "localhost"),
    )
    with pytest.raises(
        Refused, match=f"HTTP {status}: sent on to localhost, not followed"
    ):
        shortly(faulty, waits).chat(say("a"))
    assert other.seen == [] and len(faulty.seen) == 1
    other.listener.close()


@pytest.mark.parametrize(
    "shown",
    [
        lambda key: f"no such key: {key}",
        lambda key: json.dumps({"error": {"message": key, "code": 401}}),
        lambda key: repr(key),
        lambda key: key.upper(),
        lambda key: "x" * 380 + key,  # the line ends within it
        lambda key: f"bad {key[:-3]}",  # the server's own text ends within it
        lambda key: " " * 7_990 + key,
    ],
)
@pytest.mark.parametrize("status", ["200 OK", "401 No", "503 Busy"])
def test_a_server_that_repeats_the_key_does_not_get_it_into_an_error(
    shown, status, faulty, waits, monkeypatch
):
    monkeypatch.setenv("THE_KEY", KEY)
    faulty.behave = echo(status, shown)
    with pytest.raises((Refused, ConnectionError)) as caught:
        shortly(faulty, waits).chat(say("a"))
    text = str(caught.value).lower().replace("\\", "")
    parts = {
        KEY.lower().replace("\\", "")[i : i + 10] for i in range(len(KEY) - 12)
    }
    assert not [part for part in parts if part in text]


def test_a_location_or_a_status_line_with_the_key(faulty, waits, monkeypatch):
    monkeypatch.setenv("THE_KEY", "abcdefghijklmnop")
    for behave in (
        http(status="302 x", Location="http://abcdefghijklmnop.com"),
        b"abcdefghijklmnop\r\n\r\n",
    ):
        faulty.behave = behave
        with pytest.raises((Refused, ConnectionError), match=r"\[key\]") as caught:
            shortly(faulty, waits).chat(say("a"))
        assert "abcdefghijklmnop" not in str(caught.value)


def test_white_space_around_the_key_goes(server, endpoint, monkeypatch):
    monkeypatch.setenv("NO_SUCH_KEY", " \tsecret\r\n")
    endpoint.chat(say("x"))
    assert server.headers[0]["Authorization"] == "Bearer secret"
    monkeypatch.setenv("NO_SUCH_KEY", "\n")
    endpoint.chat(say("x"))
    assert "Authorization" not in server.headers[1]
    assert "secret" not in repr(endpoint)


@pytest.mark.parametrize(
    "key", ["secret\nX-Other: 1", "secret key", "sécret", "secret\x00", "“secret”"]
)
def test_a_key_that_is_none_is_refused_without_repeating_it(
    key, server, endpoint, monkeypatch
):
    with contextlib.suppress(ValueError):  # zeros are no part of an environment
        monkeypatch.setenv("NO_SUCH_KEY", key)
        with pytest.raises(
            Refused,
            match="NO_SUCH_KEY: expected a key of printable ASCII in it, without white space",
        ) as caught:
            endpoint.chat(say("x"))
        assert "cret" not in str(caught.value) and server.seen == []


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        (
            "key_variable",
            "sk-abcdef",
            "key_variable: expected the name of an environment variable",
        ),
        (
            "url",
            "https://me:secret@host/v1",
            "expected http.* on host, without user, query or fragment",
        ),
        ("url", "https://me:secret@[/v1", "expected http"),
        ("url", "https://host/v1?key=secret", "without user, query or fragment"),
        ("url", "file:///etc/passwd", "expected http"),
        ("url", "host:8000/v1", "expected http"),
        ("url", "http://host:99999/v1", "expected http"),
        ("url", "http://ho st/v1", "expected http"),
        ("url", "", "expected http"),
        ("timeout", 0, "timeout=0: expected seconds above 0"),
        ("timeout", float("inf"), "timeout=inf"),
        (
            "temperature",
            float("nan"),
            "temperature=nan: expected a number of at least 0",
        ),
        ("retries", -1, "retries=-1"),
        ("retries", "6", "retries='6': expected a number of at least 0"),
        ("max_tokens", 0, "max_tokens=0: expected a number of at least 1"),
        ("price_in", -1.0, "price_in=-1.0"),
    ],
)
def test_fields_are_checked(field, value, says):
    with pytest.raises(Refused, match=says) as caught:
        Endpoint(**{"url": "http://host/v1", "model": "m", field: value})
    assert "secret" not in str(caught.value) and "sk-abcdef" not in str(
        caught.value
    )


def test_messages_that_are_no_json_are_refused(endpoint, server):
    for messages in ([{"role": {1, 2}}], 5):
        with pytest.raises(Refused, match="messages: "):
            endpoint.chat(messages)
    assert server.seen == []


@pytest.mark.parametrize(
    ("text", "wait"),
    [
        ("7", 7.0),
        ("0", 0.0),
        ("2.5", 2.5),
        (str(10**9), 300.0),
        ("9" * 400, 300.0),
        ("-5", 1.0),
        ("soon", 1.0),
        ("", 1.0),
        ("nan", 1.0),
        ("inf", 1.0),
        ("1e9", 1.0),
        ("\xb2", 1.0),  # a digit to str.isdigit, no number
        ("Wed, 21 Oct 2015 07:28:00 GMT", 1.0),  # gone
        ("Fri, 31 Dec 9999 23:59:59 GMT", 300.0),
        ("Fri, 31 Dec 99999 23:59:59 GMT", 1.0),
    ],
)
def test_what_retry_after_says_is_bounded(text, wait, server, endpoint, waits):
    server.script = [(429, {"Retry-After": text}, "")]
    assert endpoint.chat(say("a"))["text"] == "A"
    assert waits == [wait]


def test_waits_have_a_bound_of_their_own(server, endpoint, waits):
    endpoint = dataclasses.replace(
        endpoint, retries=1100, backoff=1.0, max_wait=8.0
    )
    server.script = [(503, {}, "")] * 6
    assert endpoint.chat(say("a"))["text"] == "A"
    assert waits == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
    assert dataclasses.replace(endpoint, max_wait=0.0).chat(say("a"))["text"] == "A"


def test_a_slow_answer_within_the_deadline_arrives(faulty, waits):
    def slowly(connection):
        for i in range(0, len(answer := http(OK, Content_Length=len(OK))), 30):
            connection.sendall(answer[i : i + 30])
            time.sleep(0.01)

    faulty.behave = slowly
    assert shortly(faulty, waits).chat(say("a"))["text"] == "A"


def test_chunks_and_other_types_of_content_are_read(faulty, waits):
    faulty.behave = http(
        b"%x\r\n%s\r\n0\r\n\r\n" % (len(OK), OK),
        Transfer_Encoding="chunked",
        Content_Type="text/plain",
    )
    assert shortly(faulty, waits).chat(say("a")) == {
        "text": "A",
        "prompt_tokens": 1,
        "completion_tokens": 2,
    }


@pytest.mark.parametrize(
    "usage",
    [
        "7",
        "[1]",
        '{"prompt_tokens": NaN, "completion_tokens": -3}',
        '{"prompt_tokens": 1e999}',
        '{"prompt_tokens": true}',
    ],
)
def test_an_answer_whose_counts_are_none_is_kept_and_said(
    usage, faulty, waits, monkeypatch
):
    lines = []
    monkeypatch.setattr(
        logging, "warning", lambda message, *args: lines.append(message % args)
    )
    faulty.behave = http(
        b'{"choices": [{"message": {"content": "A"}}], "usage": %s}'
        % usage.encode()
    )
    assert shortly(faulty, waits).chat(say("a")) == {
        "text": "A",
        "prompt_tokens": 0,
        "completion_tokens": 0,
    }
    assert len(faulty.seen) == 1 and "has no counts: 0 in the bill" in lines[0]


LINE = '{"id": "a", "text": "A", "prompt_tokens": 1, "completion_tokens": 2}'


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        (f"{LINE}\n", ["a"]),
        (f"{LINE}\n\n", ["a"]),
        (f"{LINE}", ["a"]),  # whole but for its end: it has been paid for
        (f'{LINE}\n{{"id": "b", "te', ["a"]),
        (f"{LINE}\n{{", ["a"]),
        (f'{LINE}\n{{"id": "b", "t\0\0\0', ["a"]),
        (f"{LINE}\n\0\0\0", ["a"]),
        ("", []),
    ],
)
def test_a_line_that_was_cut_off_is_asked_again(
    text, ids, server, endpoint, tmp_path, monkeypatch
):
    lines = []
    monkeypatch.setattr(
        logging, "warning", lambda message, *args: lines.append(message % args)
    )
    (tmp_path / "out.jsonl").write_text(text)
    total = ask_all(
        endpoint, [("a", say("x")), ("b", say("y"))], tmp_path / "out.jsonl"
    )
    assert sorted(r["id"] for r in read(tmp_path / "out.jsonl")) == ["a", "b"]
    assert len(server.seen) == 2 - len(ids) and total["requests"] == 2
    assert len(lines) == bool(text.strip() and text[-1] not in "\n}") and all(
        "was cut off and is removed" in line for line in lines
    )


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (f'{LINE}\n{{"id": "b", "te{LINE}\n{LINE}\n', 2),
        (f"{LINE}\nnotes of mine", 2),
        ("[1, 2]\n", 1),
        ("[" * 100_000 + "\n", 1),
        ('{"id": "a"}\n', 1),
        ('{"id": 1, "text": "A", "prompt_tokens": 1, "completion_tokens": 2}\n', 1),
        (
            '{"id": "a", "text": "A", "prompt_tokens": "1", "completion_tokens": 2}\n',
            1,
        ),
        (
            '{"id": "a", "text": "A", "prompt_tokens": NaN, "completion_tokens": 2}\n',
            1,
        ),
        (f"{LINE}\n\xff\xfe\n", 2),
    ],
)
def test_a_file_with_another_line_is_refused_and_left_alone(
    text, line, server, endpoint, tmp_path
):
    file = tmp_path / "out.jsonl"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(
        Refused,
        match=f"out.jsonl: line {line} is no answer; "
        "expected a JSON object with id, text and counts",
    ):
        ask_all(endpoint, [("b", say("y"))], file)
    assert file.read_bytes() == text.encode("latin-1") and server.seen == []


def test_a_file_that_cannot_be_is_refused_before_anything_is_asked(
    server, endpoint, tmp_path
):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "file/out.jsonl"):
        with pytest.raises(Refused, match=str(path)):
            ask_all(endpoint, [("a", say("x"))], path)
    with pytest.raises(Refused, match="two with the id 'a'"):
        ask_all(
            endpoint, [("a", say("x")), ("a", say("y"))], tmp_path / "out.jsonl"
        )
    with pytest.raises(Refused, match="workers=0"):
        ask_all(endpoint, [], tmp_path / "out.jsonl", workers=0)
    assert server.seen == []


def test_an_interruption_asks_nothing_more(server, endpoint, tmp_path, monkeypatch):
    """Ctrl-C while the main thread waits: what is under way is kept, what waits is not asked."""
    wait = concurrent.futures.Future.result
    done = []

    def result(self, timeout=None):
        done.append(wait(self, timeout))
        raise KeyboardInterrupt

    monkeypatch.setattr(concurrent.futures.Future, "result", result)
    slow = dataclasses.replace(endpoint, per_minute=60 / 0.02, sleep=time.sleep)
    with pytest.raises(KeyboardInterrupt):
        ask_all(
            slow,
            [(f"q{i}", say("x")) for i in range(200)],
            tmp_path / "out.jsonl",
            workers=1,
        )
    assert len(server.seen) < 100 and len(read(tmp_path / "out.jsonl")) == len(
        server.seen
    )
