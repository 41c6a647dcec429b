"""The HTTP service and its client, with a real server on a port that the system chooses."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from plain_run import plain_run, result

pytest.importorskip("fastapi", reason="the service needs pip install 'kimi-core[sandbox]'")
pytest.importorskip("uvicorn", reason="the service needs pip install 'kimi-core[sandbox]'")

import httpx2
import uvicorn

from kimi_core.reward.base import InfrastructureError
from kimi_core.reward.code.reward import CodeReward
from kimi_core.sandbox import Limits, SandboxUnavailable, Status
from kimi_core.sandbox.client import SandboxClient
from kimi_core.sandbox.program import TOKEN_VARIABLE, Program
from kimi_core.sandbox.protocol import PROGRAM, RESULT
from kimi_core.sandbox.service import BODY_S, check_binding, clamp, create_app
from kimi_core.types import Prompt

PROMPT = Prompt(0, "?", "!", tags={"tests": '[{"stdin": "2", "stdout": "4"}]'})
DOUBLER = "print(2 * int(input()))"


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen within 20 s"
        time.sleep(0.01)


@contextmanager
def serving(run=plain_run, *, slots=2, queue=64, **settings) -> Iterator[str]:
    """A service in a thread; gives its URL."""
    config = uvicorn.Config(
        create_app(run, slots=slots, queue=queue, **settings), log_level="warning", lifespan="off"
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            until(lambda: server.started, "the start of the service")
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)


class Held:
    """A run that lasts until it is let go."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.running = 0

    def __call__(self, program, **_):
        self.running += 1
        assert self.open.wait(20)
        return result(Status.OK, b"4")


def post(url: str, body: dict, **settings) -> httpx2.Response:
    return httpx2.post(url, json=body, timeout=20, **settings)


RUN = PROGRAM.dump_python(Program(DOUBLER, b"2"), mode="json")


class TestRuns:
    def test_one(self):
        with serving() as url, SandboxClient(url) as client:
            done = client.run(
                "import sys; sys.stdout.buffer.write(b'\\xff' + open('a', 'rb').read())",
                files={"a": b"\x00\x01"},
            )
            assert (done.status, done.stdout) == (Status.OK, b"\xff\x00\x01")
            assert client.run([sys.executable, "-c", "exit(3)"]).exit_code == 3

    def test_a_batch_comes_back_in_order(self):
        with serving() as url, SandboxClient(url) as client:
            runs = [Program(DOUBLER, str(n).encode()) for n in range(5)]
            done = client.run_batch(runs)
            assert [int(one.stdout) for one in done] == [0, 2, 4, 6, 8]

    def test_limits_are_cut_to_the_servers(self):
        seen = []

        def watched(program, *, limits, **_):
            seen.append(limits)
            return result(Status.OK)

        most = Limits(wall_s=2, cpu_s=1)
        with serving(watched, maxima=most) as url, SandboxClient(url) as client:
            client.run("1", limits=Limits(wall_s=1e9, cpu_s=0.5, memory_bytes=1 << 50))
        assert (seen[0].wall_s, seen[0].cpu_s) == (2, 0.5)
        assert seen[0].memory_bytes == most.memory_bytes

    def test_64_at_once_all_come_through(self):
        with serving(slots=2, queue=8) as url:
            with SandboxClient(url, deadline_s=120) as client, ThreadPoolExecutor(64) as threads:
                futures = [
                    threads.submit(client.run, DOUBLER, stdin=str(n).encode()) for n in range(64)
                ]
                assert [int(one.result(120).stdout) for one in futures] == list(range(0, 128, 2))
            health = SandboxClient(url).health()
        assert health == {"status": "ok", "slots": 2, "running": 0, "waiting": 0, "queue": 8}

    @pytest.mark.parametrize(
        "body",
        [
            {},
            {"program": ""},
            {"program": []},
            {"program": 3},
            {"program": "1", "stdin": "not base64!"},
            {"program": "1", "limits": {"wall_s": -1}},
            {"program": "1", "limits": {"wall": 1}},
            {"program": "1", "allow_weak": True},
        ],
    )
    def test_what_is_no_run_is_refused(self, body):
        with serving() as url:
            assert post(f"{url}/run", body).status_code == 422


class TestBackPressure:
    def test_429_with_retry_after_then_room_again(self):
        held = Held()
        with serving(held, slots=1, queue=1) as url, ThreadPoolExecutor(2) as threads:
            first = [threads.submit(post, f"{url}/run", RUN) for _ in range(2)]
            health = f"{url}/health"
            until(lambda: httpx2.get(health).json()["waiting"] == 1, "a full queue")
            refused = post(f"{url}/run", RUN)
            assert refused.status_code == 429
            assert int(refused.headers["Retry-After"]) >= 1
            held.open.set()
            assert [one.result(20).status_code for one in first] == [200, 200]
            assert post(f"{url}/run", RUN).status_code == 200
        assert held.running == 3

    def test_the_client_waits_it_out(self):
        held, pauses = Held(), []

        def sleep(seconds):
            pauses.append(seconds)
            held.open.set()

        with serving(held, slots=1, queue=0) as url, ThreadPoolExecutor(1) as threads:
            first = threads.submit(post, f"{url}/run", RUN)
            until(lambda: held.running == 1, "the first run")
            with SandboxClient(url, retries=0, sleep=sleep) as client:
                # The place is given up a moment after the first run ends: one refusal or several.
                assert client.run("1").stdout == b"4"
            assert first.result(20).status_code == 200
        assert pauses and set(pauses) == {1.0}

    def test_until_the_deadline(self):
        held = Held()
        with serving(held, slots=1, queue=0) as url, ThreadPoolExecutor(1) as threads:
            first = threads.submit(post, f"{url}/run", RUN)
            until(lambda: held.running == 1, "the first run")
            client = SandboxClient(url, deadline_s=0.3)
            with pytest.raises(SandboxUnavailable, match=r"no result within 0\.3 s.*429"):
                client.run("1")
            held.open.set()
            first.result(20)

    def test_a_batch_takes_a_place_for_each_run_or_none(self):
        held = Held()
        with serving(held, slots=1, queue=3) as url, ThreadPoolExecutor(2) as threads:
            first = threads.submit(post, f"{url}/run_batch", {"runs": [RUN] * 3})
            until(lambda: httpx2.get(f"{url}/health").json()["waiting"] == 2, "the batch")
            assert post(f"{url}/run_batch", {"runs": [RUN] * 2}).status_code == 429
            second = threads.submit(post, f"{url}/run", RUN)
            until(lambda: httpx2.get(f"{url}/health").json()["waiting"] == 3, "one more")
            held.open.set()
            assert first.result(20).status_code == second.result(20).status_code == 200
            assert post(f"{url}/run_batch", {"runs": [RUN] * 5}).status_code == 413


class TestGuard:
    def test_token(self):
        with serving(token="s3cret") as url:
            for headers in ({}, {"Authorization": "Bearer s3cre"}, {"Authorization": "s3cret"}):
                refused = post(f"{url}/run", RUN, headers=headers)
                assert refused.status_code == 401
                assert refused.headers["WWW-Authenticate"] == "Bearer"
            assert post(f"{url}/run", RUN, headers={"Authorization": "Bearer s3cret"}).is_success
            assert httpx2.get(f"{url}/health").is_success
            with SandboxClient(url, token="s3cret") as client:
                assert client.run("1").status is Status.OK
            with pytest.raises(ValueError, match="refused /run: status 401"):
                SandboxClient(url, token="other").run("1")

    def test_oversized_bodies_said_and_unsaid(self):
        def chunks():
            for _ in range(100):
                yield b"x" * 1000

        with serving(max_body_bytes=10_000) as url:
            said = httpx2.post(f"{url}/run", content=b"x" * 10_001, timeout=20)
            unsaid = httpx2.post(f"{url}/run", content=chunks(), timeout=20)
            assert (said.status_code, unsaid.status_code) == (413, 413)
            client = SandboxClient(url)
            with pytest.raises(ValueError, match=r"413.*split the batch"):
                client.run("1", stdin=b"x" * 10_000)
            assert client.run("print(4)").stdout == b"4\n"

    def test_a_body_that_does_not_come(self, monkeypatch):
        monkeypatch.setattr("kimi_core.sandbox.service.BODY_S", 0.1)
        assert BODY_S == 30
        with serving() as url:
            host, port = url.removeprefix("http://").split(":")
            with socket.create_connection((host, int(port)), timeout=20) as line:
                line.sendall(b"POST /run HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n")
                line.sendall(b"Content-Type: application/json\r\n\r\n{")
                assert b" 408 " in line.recv(100)

    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "example.org"])
    def test_beyond_loopback_only_with_a_token(self, host):
        with pytest.raises(ValueError, match=r"without a bearer token.*KIMI_SANDBOX_TOKEN"):
            check_binding(host, None)
        with pytest.raises(ValueError, match="without a bearer token"):
            check_binding(host, "")
        check_binding(host, "s3cret")

    @pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.8.8"])
    def test_loopback(self, host):
        check_binding(host, None)


class TestFailures:
    def test_nobody_there(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        pauses = []
        with SandboxClient(f"http://127.0.0.1:{port}", retries=2, sleep=pauses.append) as client:
            with pytest.raises(SandboxUnavailable, match="failed 3 times: ConnectError"):
                client.run("1")
            assert pauses == [0.2, 0.4]
            with pytest.raises(SandboxUnavailable, match="No sandbox service at"):
                client.health()

    def test_a_server_that_accepts_and_says_nothing(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            with pytest.raises(SandboxUnavailable, match=r"no result within 0\.3 s.*Timeout"):
                SandboxClient(url, deadline_s=0.3).run("1")

    def test_a_pool_that_fails_is_retried_then_said(self):
        calls = []

        def failing(program, **_):
            calls.append(program)
            raise SandboxUnavailable("bwrap has gone")

        with serving(failing) as url:
            client = SandboxClient(url, retries=1, sleep=lambda _: None)
            with pytest.raises(SandboxUnavailable, match=r"failed 2 times: status 503.*bwrap has"):
                client.run("1")
        assert len(calls) == 2

    @pytest.mark.parametrize("body", [b"{}", b"[]", b"<html>", b'{"status": "FINE"}'])
    def test_an_answer_that_is_no_result(self, body):
        with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as threads:
            threads.submit(answer_once, listener, body)
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            with pytest.raises(SandboxUnavailable, match="gave no result"):
                SandboxClient(url, deadline_s=20).run("1")

    def test_a_file_name_that_leaves_the_work_folder(self):
        with serving() as url:
            refused = post(f"{url}/run", {"program": "1", "files": {"../x": ""}})
            assert refused.status_code == 422 and "File name '../x'" in refused.text
            with pytest.raises(ValueError, match=r"File name '\.\./x'"):
                SandboxClient(url).run("1", files={"../x": b""})

    def test_a_program_that_the_pool_refuses(self):
        def picky(program, **_):
            raise ValueError("This Pool is closed")

        with serving(picky) as url, pytest.raises(ValueError, match=r"status 422.*is closed"):
            SandboxClient(url).run("1")

    def test_a_server_killed_in_mid_request(self, tmp_path):
        """kill -9 of the server: no verdict, never a wrong answer."""
        started = tmp_path / "started"
        server = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(started)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        try:
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            client = SandboxClient(url, retries=2, sleep=lambda _: None)
            reward = CodeReward(client.run)
            with ThreadPoolExecutor(1) as threads:
                verdict = threads.submit(reward, PROMPT, DOUBLER)
                until(started.exists, "the run")
                os.kill(server.pid, signal.SIGKILL)
                with pytest.raises(InfrastructureError, match="failed 3 times"):
                    verdict.result(60)
            assert reward.counts == {Status.INFRA: 1}
        finally:
            server.kill()
            server.wait(20)


def answer_once(listener: socket.socket, body: bytes) -> None:
    line, _ = listener.accept()
    with line:
        line.settimeout(20)
        while b"limits" not in line.recv(65536):
            pass
        line.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))


KILLED = """
import pathlib, socket, sys, threading, time
import uvicorn
from kimi_core.sandbox.service import create_app

def run(program, **_):
    pathlib.Path(sys.argv[1]).touch()
    time.sleep(600)

listener = socket.create_server(("127.0.0.1", 0))
server = uvicorn.Server(uvicorn.Config(create_app(run, slots=1, queue=0), log_level="warning"))

def announce():
    while not server.started:
        time.sleep(0.01)
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)

threading.Thread(target=announce, daemon=True).start()
server.run([listener])
"""


@pytest.mark.slow
def test_from_the_shell():
    """The real thing: a pool behind the service, a token, and the reward in front of it."""
    server = subprocess.Popen(
        [sys.executable, "-m", "kimi_core.sandbox", "serve", "--port", "0", "--slots", "1"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), TOKEN_VARIABLE: "s3cret"},
    )
    try:
        assert server.stderr is not None
        said = []
        while not (found := re.search(r"running on (http://\S+)", "".join(said[-1:]))):
            said.append(server.stderr.readline())
            if not said[-1]:
                pytest.skip(f"no sandbox on this machine: {''.join(said)}")
        url = found[1]
        with SandboxClient(url, token="s3cret") as client:
            reward = CodeReward(client.run)
            assert (reward(PROMPT, DOUBLER), reward(PROMPT, "print(5)")) == (1.0, 0.0)
            done = client.run("import os; print(os.environ, os.listdir('/home'))")
            assert b"s3cret" not in done.stdout + done.stderr
        server.send_signal(signal.SIGTERM)
        server.wait(40)
    finally:
        server.kill()
        server.wait(20)


def test_the_code_reward_takes_a_client():
    with serving() as url, SandboxClient(url) as client:
        reward = CodeReward(client.run)
        assert reward(PROMPT, DOUBLER) == 1.0
        assert reward(PROMPT, "print(5)") == 0.0
        assert reward.counts == {Status.OK: 1, Status.WRONG: 1}


def test_results_survive_the_wire():
    before = result(Status.OUTPUT, b"\xff\x00", b"e", exit_code=None)
    assert RESULT.validate_json(RESULT.dump_json(before)) == before


def test_clamp_takes_the_smaller_of_each():
    cut = clamp(Limits(wall_s=5, cpu_s=5), Limits(wall_s=1, cpu_s=9))
    assert (cut.wall_s, cut.cpu_s) == (1, 5)
