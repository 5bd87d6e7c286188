"""Rewards from an HTTP endpoint, against a server in a thread."""

import datetime
import json
import socket
import threading
import time
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from grpo_jax.config.run import RewardConfig
from grpo_jax.rewards.calling import call_rewards
from grpo_jax.rewards.loading import RewardError, check_columns, check_rows, load_rewards
from grpo_jax.types import Example


class Endpoint:
    """A server that judges completions. It keeps the requests, and a test sets its answers."""

    def __init__(self):
        self.requests: list[dict] = []
        self.headers: list[dict] = []
        self.failures: list[int] = []  # statuses of the next answers
        self.answer = lambda asked: {"scores": [float(len(text)) for text in asked["completions"]]}
        self.delay = 0.0
        self.running = self.most_running = 0
        self.lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                endpoint.handle(self)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/score"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def handle(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            self.requests.append(body)
            self.headers.append(dict(handler.headers))
            self.running += 1
            self.most_running = max(self.most_running, self.running)
            status = self.failures.pop(0) if self.failures else 200
        time.sleep(self.delay)
        answer = self.answer(body) if status == 200 else {}
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        with self.lock:
            self.running -= 1
        try:
            handler.send_response(status)
            if status == 302:
                handler.send_header("Location", self.url)
            handler.send_header("Content-Length", str(len(content)))
            handler.end_headers()
            handler.wfile.write(content)
        except OSError:  # the client is gone
            pass

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    endpoint = Endpoint()
    yield endpoint
    endpoint.close()


def load(url, **arguments):
    arguments = {"url": url, "backoff": 0.01, **arguments}
    return load_rewards([RewardConfig(function="http_score", arguments=arguments)])[0]


def scored(reward, completions, prompts=None, **columns):
    return call_rewards([reward], prompts or ["p"] * len(completions), completions, columns)[:, 0].tolist()


def test_a_batch_in_order_with_its_columns(endpoint):
    reward = load(endpoint.url, batch_size=2, max_concurrency=3)
    check_columns([reward], ["answer", "timeout"])  # an argument's name is also that of a column
    texts = ["a" * n for n in (3, 1, 4, 1, 5)]
    assert scored(reward, texts, answer=[1, 2, 3, 4, 5]) == [3, 1, 4, 1, 5]
    sizes = sorted(len(asked["completions"]) for asked in endpoint.requests)
    assert sizes == [1, 2, 2]
    (last,) = (asked for asked in endpoint.requests if len(asked["completions"]) == 1)
    assert last == {"prompts": ["p"], "completions": ["aaaaa"], "answer": [5]}
    assert endpoint.headers[0]["Content-Type"] == "application/json"


def test_messages_and_null(endpoint):
    endpoint.answer = lambda asked: {"scores": [None, 1], "model": "x"}
    chat = [[{"role": "user", "content": "q"}]] * 2
    values = scored(load(endpoint.url), ["a", "b"], chat)
    assert np.isnan(values[0]) and values[1] == 1
    assert endpoint.requests[0]["completions"][1] == [{"role": "assistant", "content": "b"}]


def test_no_more_requests_at_a_time_than_allowed(endpoint):
    endpoint.delay = 0.05
    assert scored(load(endpoint.url, batch_size=1, max_concurrency=2), ["a"] * 6) == [1] * 6
    assert endpoint.most_running == 2


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_failure_is_tried_again(endpoint, status):
    endpoint.failures = [status, status]
    assert scored(load(endpoint.url, retries=2), ["abc"]) == [3]
    assert len(endpoint.requests) == 3


def test_pauses_double(endpoint):
    endpoint.failures = [500, 500, 500]
    started = time.perf_counter()
    assert scored(load(endpoint.url, retries=3, backoff=0.05), ["abc"]) == [3]
    assert 0.05 + 0.1 + 0.2 <= time.perf_counter() - started < 2


def failure(reward, completions=("a", "b"), **columns) -> str:
    with pytest.raises(RewardError) as caught:
        scored(reward, list(completions), **columns)
    text = str(caught.value)
    assert text.startswith("reward `http_score` (built in)") and "\n" not in text and len(text) < 300
    return text


def test_an_endpoint_that_keeps_failing(endpoint):
    endpoint.failures = [503] * 10
    text = failure(load(endpoint.url, retries=2))
    assert f"{endpoint.url} gives no scores: status 503" in text and "(3 tries)" in text
    assert len(endpoint.requests) == 3  # no row was tried alone


@pytest.mark.parametrize("status", [400, 404, 401, 302])
def test_errors_that_are_not_retried(endpoint, status):
    endpoint.failures = [status]
    assert f"answers with status {status}" in failure(load(endpoint.url))
    assert len(endpoint.requests) == 1


def test_a_server_that_is_down():
    """It is an error before anything compiles if it is down at the start, and after the retries later on."""
    endpoint = Endpoint()
    url = endpoint.url + "?key=secret"
    reward = load(url, retries=1)
    assert endpoint.requests == []  # only a look at the server
    endpoint.close()
    text = failure(reward)
    assert "refused" in text and "(2 tries)" in text and "secret" not in text
    with pytest.raises(
        ValueError, match=r"http_score.*cannot be reached \(.*refused.*is the server up"
    ) as error:
        load(url)
    assert "secret" not in str(error.value)


def test_a_busy_server_counts_as_up(monkeypatch):
    """A server that accepts a connection but does not answer is no reason not to start."""
    monkeypatch.setattr("grpo_jax.rewards.http_connection.PATIENCE", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        load(f"http://127.0.0.1:{server.getsockname()[1]}/")


def test_a_slow_answer(endpoint):
    endpoint.delay = 0.5
    text = failure(load(endpoint.url, timeout=0.1, retries=1))
    assert "no answer within 0.1 s (2 tries)" in text


@pytest.mark.parametrize(
    "answer, match",
    [
        ({"scores": [1]}, "answers with 1 scores for 2 completions"),
        ({"scores": [1, 2, 3]}, "answers with 3 scores for 2 completions"),
        ({"scores": [1, "2"]}, "score 1 is '2', not a number or null"),
        ({"scores": [True, 2]}, "score 0 is 'True', not a number"),
        ({"scores": [[1], 2]}, "score 0 is"),
        ({"scores": 1}, 'not {"scores"'),
        ({"rewards": [1, 2]}, 'not {"scores"'),
        ([1, 2], 'not {"scores"'),
        (b"<html>", "but not with JSON: b'<html>'"),
        (b'{"scores": [NaN, 1]}', "nan for row 0"),
        (b'{"scores": [1e999, 1]}', "inf for row 0"),
    ],
)
def test_a_wrong_answer(endpoint, answer, match):
    endpoint.answer = lambda asked: answer
    assert match in failure(load(endpoint.url, retries=0))


ODD = [datetime.date(2026, 1, 1), b"\x00", {1, 2}, Decimal("1.5"), [b"x"], {"a": {2: 3}}]  # unknown to JSON


@pytest.mark.parametrize("value", ODD, ids=str)
def test_a_column_that_has_no_form_in_json(endpoint, value):
    # case data-21: nobody asked for it, so it is left out
    reward = load(endpoint.url)
    check_columns([reward], ["answer", "made"])
    examples = [Example("p", {"answer": 1, "made": None}), Example("p", {"answer": 2, "made": value})]
    assert check_rows([reward], examples) == []
    assert scored(reward, ["a", "b"], answer=[1, 2], made=[None, value]) == [1, 1]
    assert endpoint.requests[-1] == {"prompts": ["p", "p"], "completions": ["a", "b"], "answer": [1, 2]}
    # asked for, it is found at the start, with its column and row
    reward = load(endpoint.url, columns=["made"])
    ((row, reason),) = check_rows([reward], examples)
    assert row == 1 and reason.startswith(
        "reward `http_score`: column `made` cannot be sent as JSON: it has "
    )
    assert "column `made` cannot be sent as JSON" in failure(reward, made=[None, value])


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_number_that_has_no_form_in_json(endpoint, value):
    level = [0.5, value]
    assert scored(load(endpoint.url), ["a", "b"], level=level, info=[{"a": [value]}] * 2) == [1, 1]
    assert endpoint.requests[-1]["level"] == [0.5, None]
    assert endpoint.requests[-1]["info"] == [{"a": [None]}] * 2
    reward = load(endpoint.url, columns=["level"])
    ((row, reason),) = check_rows([reward], [Example("p", {"level": each}) for each in level])
    assert row == 1 and f"column `level` cannot be sent as JSON: it has {value}" in reason


def test_only_the_columns_asked_for_are_sent(endpoint):
    reward = load(endpoint.url, columns=["level"])
    assert scored(reward, ["a"], answer=[1], level=[(2, True)]) == [1]
    assert endpoint.requests[-1] == {"prompts": ["p"], "completions": ["a"], "level": [[2, True]]}
    scored(load(endpoint.url, columns=[]), ["a"], answer=[1])
    assert endpoint.requests[-1] == {"prompts": ["p"], "completions": ["a"]}
    with pytest.raises(ValueError, match="its argument `columns` names `level`; columns: `answer`"):
        check_columns([reward], ["answer"])
    for wrong in ("answer", [1]):
        with pytest.raises(ValueError, match="give a list of names of columns"):
            load(endpoint.url, columns=wrong)


def test_headers_come_from_the_environment(endpoint, monkeypatch):
    monkeypatch.setenv("REWARD_KEY", "Bearer topsecret")
    reward = load(endpoint.url, headers={"Authorization": "REWARD_KEY"})
    assert "topsecret" not in repr(reward)
    assert scored(reward, ["a"]) == [1]
    assert endpoint.headers[0]["Authorization"] == "Bearer topsecret"
    endpoint.failures = [403]
    assert "topsecret" not in failure(reward)


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"url": "localhost:8000"}, "url='localhost:8000': give an address like"),
        ({"url": 3}, "url=3"),
        ({"url": "ftp://x/y"}, "give an address"),
        ({"url": "http://me:word@x/y"}, "holds a user or password"),
        ({"timeout": 0}, "timeout=0"),
        ({"backoff": -1}, "backoff=-1"),
        ({"retries": -1}, "retries=-1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_concurrency": 0}, "max_concurrency=0"),
        ({"headers": {"Authorization": "NO_SUCH_VARIABLE"}}, "environment variable 'NO_SUCH_VARIABLE'"),
        ({"timout": 1}, "takes no argument `timout`; did you mean `timeout`"),
    ],
)
def test_wrong_arguments_are_found_at_load_time(arguments, match):
    with pytest.raises(ValueError, match=match) as caught:
        load(**{"url": "http://localhost/", **arguments})
    assert "\n" not in str(caught.value) and ":word" not in str(caught.value)


def test_a_url_is_needed():
    with pytest.raises(ValueError, match=r"http_score.*needs the argument `url`"):
        load_rewards([RewardConfig(function="http_score")])
