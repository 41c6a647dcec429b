"""The life of an engine over HTTP: a real service, its token, its deadlines, its states."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import vision_testing
from cluster.test_remote_workers import TOKEN, free_port
from rewarded_runs import children, write_files

import kimi_core
from kimi_core.config import ModelConfig
from kimi_core.models.load import load_model
from kimi_core.rollout.texts import complete
from kimi_core.rollout.torch.engine import TorchEngine
from kimi_core.types import Sampling

WAIT_S = 600
NURSERY = "kimi_core.rollout.torch.worker"
CONTEXTS = [[2, 3, 4], [5, 6], [2, 3, 4]]


class Service:
    """``kimi engine`` in another process, and what it answers."""

    def __init__(self, folder: Path) -> None:
        (folder / "token").write_text(TOKEN)
        self.port = free_port()
        kimi = [sys.executable, "-P", "-m", "kimi_core.cli", "engine", "tiny.toml"]
        where = ["--http", f"127.0.0.1:{self.port}", "--token-file", "token"]
        root = str(Path(kimi_core.__file__).parents[1])
        self.process = subprocess.Popen(
            [*kimi, "rollout.workers=1", *where],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        )

    def ask(self, path: str, body: object = None, token: str = TOKEN) -> tuple[int, dict]:
        """GET without a body, or POST."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            None if body is None else json.dumps(body).encode(),
            {"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def wait_until(self, **wanted: str) -> dict:
        """The state, once it has these values."""
        ends = time.monotonic() + WAIT_S
        while True:
            try:
                status, state = self.ask("/state")
                assert status == 200
            except urllib.error.URLError:  # It does not listen yet.
                state = {}
            if state.items() >= wanted.items():
                return state
            assert time.monotonic() < ends, f"waited for {wanted}, the state is {state}"
            time.sleep(0.05)


def save(folder: Path, seed: int) -> TorchEngine:
    """A checkpoint, and an engine with its weights in this process."""
    sizes = vision_testing.SIZES.model_copy(update={"vision_layers": 0})
    given = ModelConfig(scratch=sizes, device="cpu")
    model, tokenizer = load_model(given, alphabet=vision_testing.ALPHABET, seed=seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return TorchEngine(model, batch_rows=8)


def expected(engine: TorchEngine) -> list[list[int]]:
    contexts = [np.array(one, np.int32) for one in CONTEXTS]
    made = complete(engine, contexts, Sampling(1.0, 7, frozenset()), max_tokens=20)
    return [one.token_ids.tolist() for one in made]


def sampled(service: Service, version: int) -> list[list[int]]:
    status, said = service.ask("/generate", {"contexts": CONTEXTS, "max_tokens": 20, "seed": 7})
    assert status == 200 and said["version"] == version
    assert {one["version"] for one in said["responses"]} == {version}
    assert all(len(one["logprobs"]) == len(one["token_ids"]) for one in said["responses"])
    return [one["token_ids"] for one in said["responses"]]


@pytest.mark.nightly
def test_an_engine_is_started_woken_and_ended_over_http(tmp_path):
    write_files(tmp_path)
    first, second = (save(tmp_path / name, seed) for seed, name in enumerate(("one", "two")))
    service = Service(tmp_path)
    try:
        service.wait_until(state="stopped")
        for wrong in ("", "f" * 32):
            status, said = service.ask("/stop", {}, token=wrong)
            assert status == 401 and "missing or wrong" in said["detail"]
        status, said = service.ask("/wake", {})
        assert status == 409 and "is stopped, and has to be asleep" in said["detail"]
        status, said = service.ask("/start", {"model": "./nowhere", "version": 0})
        assert status == 422 and "nowhere" in said["detail"]
        assert "nowhere" in service.ask("/state")[1]["fault"]
        assert service.ask("/start", {"model": "./one"})[0] == 422
        status, said = service.ask("/start", {"model": "./one", "version": 3})
        assert status == 200 and said["state"] == "asleep" and said["version"] == 3

        # The workers' imports take seconds; meanwhile nothing else is done.
        status, said = service.ask("/wake?timeout_s=0.01", {})
        assert status == 504 and "wake has not ended in 0.01 s and goes on" in said["detail"]
        service.wait_until(doing="wake", state="asleep")
        status, said = service.ask("/sleep", {})
        assert status == 409 and "busy (wake)" in said["detail"]
        service.wait_until(state="awake", doing="")
        assert sampled(service, 3) == expected(first)
        (nursery,) = children(service.process.pid, NURSERY)
        assert len(children(nursery, NURSERY)) == 1

        assert service.ask("/serve", {"model": "./two", "version": 4})[0] == 200
        assert sampled(service, 4) == expected(second) != expected(first)
        status, said = service.ask("/serve", {"model": "./one", "version": 2})
        assert status == 422 and "versions only grow" in said["detail"]

        assert service.ask("/sleep", {})[1]["state"] == "asleep"
        assert children(nursery, NURSERY) == []
        assert service.ask("/generate", {"contexts": CONTEXTS, "max_tokens": 1})[0] == 409
        assert service.ask("/serve", {"model": "./one", "version": 5})[0] == 200
        assert service.ask("/wake", {})[1]["state"] == "awake"
        assert sampled(service, 5) == expected(first)
        assert service.ask("/stop", {})[1]["state"] == "stopped"
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(WAIT_S) in (0, -signal.SIGTERM, 143)
    finally:
        service.process.kill()
        service.process.wait()
