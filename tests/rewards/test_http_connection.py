"""How `http_score` treats connections: retries, deadlines, keep-alive, against a server of bare sockets."""

import json
import os
import socket
import struct
import threading
import time

import pytest

from grpo_jax.config.run import RewardConfig
from grpo_jax.rewards import http_connection
from grpo_jax.rewards.calling import call_rewards
from grpo_jax.rewards.loading import RewardError, load_rewards

SCORES = json.dumps({"scores": [7]}).encode()


def answer(body=SCORES, status="200 OK", *lines):
    head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *lines]
    return "\r\n".join([*head, "", ""]).encode() + body


class Server:
    """Answers each request by the next of its steps, each f(connection), and by SCORES when there is none."""

    def __init__(self):
        self.steps = []
        self.heads: list[str] = []
        self.times: list[float] = []
        self.num_connections = 0
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/score?key=secret"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            self.num_connections += 1
            threading.Thread(target=self.serve, args=[connection], daemon=True).start()

    def serve(self, connection):
        with connection, connection.makefile("rb") as stream:
            while line := stream.readline():
                head = line
                while (line := stream.readline()).strip():
                    head += line
                text = head.decode()
                if text.startswith("HEAD"):
                    connection.sendall(b"HTTP/1.1 405 No\r\nContent-Length: 0\r\n\r\n")
                    continue
                (length,) = (x.split(": ")[1] for x in text.splitlines() if x.startswith("Content-Length"))
                stream.read(int(length))
                self.heads.append(text)
                self.times.append(time.monotonic())
                step = self.steps.pop(0) if self.steps else send(answer())
                try:
                    if step(connection):
                        return
                except OSError:  # the client is gone
                    return


def send(data):
    return lambda connection: connection.sendall(data)


def reset(connection):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return True


def hang_up(connection):
    connection.sendall(answer()[:-4])
    connection.shutdown(socket.SHUT_RDWR)
    return True


def drip_body(connection):
    connection.sendall(answer(SCORES + b" " * 200)[:-200])
    for _ in range(200):
        connection.sendall(b" ")
        time.sleep(0.02)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    server = Server()
    yield server
    server.socket.close()


def load(url, **arguments):
    arguments = {"url": url, "backoff": 0.0, **arguments}
    return load_rewards([RewardConfig(function="http_score", arguments=arguments)])[0]


def score(reward, size=1):
    return call_rewards([reward], ["p"] * size, ["c"] * size, {})[:, 0].tolist()


def failure(reward, size=1):
    with pytest.raises(RewardError) as caught:
        score(reward, size)
    text = str(caught.value)
    assert "\n" not in text and "secret" not in text and "127.0.0.1" in text
    return text


@pytest.mark.parametrize("status", ["429 Too Many Requests", "503 Busy"])
def test_the_server_says_how_long_to_wait(server, status):
    server.steps = [send(answer(b"", status, "Retry-After: 1"))]
    assert score(load(server.url)) == [7]
    assert 1 <= server.times[1] - server.times[0] < 5


@pytest.mark.parametrize("said", ["soon", "Wed, 01 Jan 2020 00:00:00 GMT"])
def test_a_wait_that_is_over_or_says_nothing(server, said):
    server.steps = [send(answer(b"", "503 Busy", f"Retry-After: {said}"))]
    assert score(load(server.url)) == [7]
    assert len(server.heads) == 2


def test_no_wait_is_endless(server, monkeypatch):
    monkeypatch.setattr(http_connection, "LONGEST_RETRY_AFTER", 0.05)
    server.steps = [send(answer(b"", "503 Busy", "Retry-After: 3600"))]
    started = time.monotonic()
    assert score(load(server.url)) == [7]
    assert 0.05 <= time.monotonic() - started < 5


@pytest.mark.parametrize("step", [reset, hang_up])
def test_a_lost_connection_is_tried_again(server, step):
    server.steps = [step, step]
    assert score(load(server.url, retries=2)) == [7]
    assert len(server.heads) == 3
    server.steps = [step, step]
    text = failure(load(server.url, retries=1))
    assert "gives no scores: " in text and "(2 tries)" in text
    assert ("reset" if step is reset else "IncompleteRead") in text


def test_a_deadline_is_for_the_whole_answer(server):
    """Every part comes long before the timeout, and the whole answer would take 4 s."""
    server.steps = [drip_body]
    started = time.monotonic()
    assert "no answer within 0.3 s" in failure(load(server.url, timeout=0.3, retries=0))
    assert 0.3 <= time.monotonic() - started < 2
    server.steps = [drip_body]
    assert score(load(server.url, timeout=0.3, retries=1)) == [7]


def test_calls_share_a_connection(server):
    reward = load(server.url, max_concurrency=1, batch_size=1)
    before = server.num_connections
    for _ in range(3):
        assert score(reward, size=2) == [7, 7]
    assert len(server.heads) == 6
    assert server.num_connections - before <= 1  # the first call may use that of the look at the server


def test_an_error_ends_the_waits_of_other_batches(server):
    """The second batch is refused at once, and nobody waits a minute for the first."""
    busy = send(answer(b"", "503 Busy", "Retry-After: 60"))
    server.steps = [busy, send(answer(b"", "400 Bad"))]
    reward = load(server.url, max_concurrency=2, batch_size=1)
    started = time.monotonic()
    assert "status 400" in failure(reward, size=2)
    for thread in threading.enumerate():
        if thread.name.startswith("ThreadPoolExecutor"):
            thread.join(timeout=30)
    assert time.monotonic() - started < 30


def test_a_netrc_replaces_no_header(server, monkeypatch, tmp_path):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login someone password else\n")
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("REWARD_KEY", "Bearer mine")
    assert score(load(server.url, headers={"Authorization": "REWARD_KEY"})) == [7]
    assert "Authorization: Bearer mine" in server.heads[0]
    assert score(load(server.url)) == [7]
    assert "Authorization" not in server.heads[1]


@pytest.mark.parametrize("value", ["Bearer secret\n", " Bearer secret", "Bearer “secret”"])
def test_a_secret_that_no_header_may_hold_is_not_shown(server, monkeypatch, value):
    monkeypatch.setenv("REWARD_KEY", value)
    with pytest.raises(ValueError, match="REWARD_KEY', which holds what no header may") as caught:
        load(server.url, headers={"Authorization": "REWARD_KEY"})
    assert "secret" not in str(caught.value)


def test_a_proxy_of_the_environment_is_used(server, monkeypatch):
    monkeypatch.delenv("no_proxy")
    monkeypatch.setenv("http_proxy", server.url.split("/score")[0])
    assert score(load("http://judge.invalid/score")) == [7]
    assert server.heads[0].startswith("POST http://judge.invalid/score HTTP/1.1")


def test_a_host_that_does_not_exist(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    started = time.monotonic()
    with pytest.raises(
        ValueError, match=r"http://judge\.invalid/score cannot be reached \(.*is the server up"
    ) as caught:
        load("http://judge.invalid/score?key=secret")
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)
    assert time.monotonic() - started < 60


def test_each_process_has_its_own_connections():
    own = http_connection.session_of(os.getpid(), 3)
    assert own is http_connection.session_of(os.getpid(), 3)
    assert own is not http_connection.session_of(os.getpid() + 1, 3)
