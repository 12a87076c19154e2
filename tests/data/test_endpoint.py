import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from jaxdistill.core.types import Refused
from jaxdistill.data.endpoint import Endpoint, ask_all, bill, read


class Server(ThreadingHTTPServer):
    """Answers every question with its own text in capitals, after the statuses that `script` lists."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.seen, self.headers = [], [], []


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append(body)
        self.server.headers.append(dict(self.headers))
        status, extra, reply = self.server.script.pop(0) if self.server.script else (200, {}, None)
        text = body["messages"][-1]["content"].upper()
        usage = {"prompt_tokens": len(text), "completion_tokens": 2}
        reply = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}], "usage": usage}) if reply is None else reply
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
    thread = threading.Thread(target=server.serve_forever, daemon=True)
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
    return Endpoint(url=url, model="m", key_variable="NO_SUCH_KEY", retries=3, sleep=waits.append, price_in=1.0, price_out=3.0)


def say(text):
    return [{"role": "user", "content": text}]


def test_request_and_answer(server, endpoint, monkeypatch):
    assert endpoint.chat(say("hello")) == {"text": "HELLO", "prompt_tokens": 5, "completion_tokens": 2}
    assert server.seen == [{"model": "m", "messages": say("hello"), "temperature": 0.0, "max_tokens": 1024}]
    assert "Authorization" not in server.headers[0]
    monkeypatch.setenv("NO_SUCH_KEY", "secret")
    endpoint.chat(say("x"))
    assert server.headers[1]["Authorization"] == "Bearer secret"


def test_retries_wait_longer_each_time_or_as_told(server, endpoint, waits):
    server.script = [(500, {}, ""), (429, {"Retry-After": "7"}, ""), (200, {}, "not JSON")]
    assert endpoint.chat(say("a"))["text"] == "A"
    assert waits == [1.0, 7.0, 4.0] and len(server.seen) == 4


def test_gives_up(server, endpoint, waits):
    server.script = [(503, {}, "")] * 4
    with pytest.raises(ConnectionError, match="4 attempts failed, the last with HTTP 503"):
        endpoint.chat(say("a"))
    assert waits == [1.0, 2.0, 4.0]


def test_what_the_server_refuses_is_not_tried_again(server, endpoint, waits):
    server.script = [(401, {}, "bad key")]
    with pytest.raises(Refused, match="HTTP 401: bad key"):
        endpoint.chat(say("a"))
    assert waits == [] and len(server.seen) == 1


def test_an_endpoint_that_is_not_there(waits):
    with pytest.raises(ConnectionError, match="2 attempts failed"):
        Endpoint(url="http://127.0.0.1:9", model="m", retries=1, sleep=waits.append).chat(say("a"))


def test_resumes_without_asking_twice(server, endpoint, tmp_path):
    questions = [(f"q{i}", say(f"text {i}")) for i in range(12)]
    server.script = [(200, {}, None)] * 5 + [(400, {}, "no")]
    with pytest.raises(Refused):
        ask_all(endpoint, questions, tmp_path / "out.jsonl", workers=1)
    assert len(read(tmp_path / "out.jsonl")) == 5
    with (tmp_path / "out.jsonl").open("a") as file:
        file.write('{"id": "q7", "te')  # killed while writing
    total = ask_all(endpoint, [*questions, questions[0]], tmp_path / "out.jsonl", workers=4)
    records = read(tmp_path / "out.jsonl")
    assert sorted(r["id"] for r in records) == sorted(name for name, _ in questions)
    assert {r["id"]: r["text"] for r in records} == {f"q{i}": f"TEXT {i}" for i in range(12)}
    assert len(server.seen) == 12 + 1  # every question once, and the one that was refused
    tokens = sum(len(f"text {i}") for i in range(12))
    assert total == bill(endpoint, tmp_path / "out.jsonl")
    assert total == {"requests": 12, "prompt_tokens": tokens, "completion_tokens": 24, "cost": pytest.approx((tokens + 3 * 24) / 1e6)}


def test_rate_limit_spaces_requests(server, tmp_path):
    now, waits = [100.0], []

    def sleep(seconds):
        waits.append(seconds)
        now[0] += seconds

    limited = Endpoint(url=f"http://127.0.0.1:{server.server_port}", model="m", per_minute=30, clock=lambda: now[0], sleep=sleep)
    ask_all(limited, [(str(i), say("x")) for i in range(4)], tmp_path / "out.jsonl", workers=1)
    assert waits == [2.0, 2.0, 2.0]
