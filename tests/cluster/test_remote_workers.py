"""Workers that join over the network: the same tokens, whoever comes, goes or is refused."""

import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
import vision_testing
from cluster.two_hosts import SLOW
from fleet_workers import CONTEXT, model
from hypothesis import given
from hypothesis import strategies as st
from rewarded_runs import REWARD, children, go_on, iterations, sampled, write_files
from transformers import PreTrainedTokenizerFast

import kimi_core
from kimi_core.cluster.handshake import MAGIC, Refused, address_of, greet, read_token
from kimi_core.config import ClusterConfig, RolloutConfig
from kimi_core.models.codec import Codec
from kimi_core.models.scratch import character_tokenizer
from kimi_core.rollout import orders
from kimi_core.rollout.load import load_engine
from kimi_core.rollout.torch.engine import TorchEngine
from kimi_core.types import Prompt, Request, Sampling, StopStrings

WAIT_S = 120
TOKEN = "0123456789abcdef" * 2


class Shown:
    """A tiny model that reads images, and requests of which most have some."""

    def __init__(self) -> None:
        self.model, tokenizer = vision_testing.tiny()
        self.images = vision_testing.table()
        pictures = [vision_testing.picture(seed) for seed in range(3)]
        prompts = [Prompt(n, "1=", "", images=tuple(pictures[:n])) for n in range(4)]
        self.images.add(prompts)
        self.codec = Codec(tokenizer, ["12", "=?"], self.model, self.images)
        self.contexts = [self.codec.encode_prompt(prompt) for prompt in prompts]
        self.twin = TorchEngine(vision_testing.tiny()[0], batch_rows=8, images=self.images)
        self.sampling = Sampling(
            1.0, 5, frozenset(), stream_tokens=2, stop_strings=self.codec.stop_strings
        )

    def requests(self, count: int) -> list[Request]:
        context = [self.contexts[number % 4] for number in range(count)]
        return [Request(i, ids, len(ids), 70, 90) for i, ids in enumerate(context)]

    def expected(self, count: int) -> dict[int, list[int]]:
        return gathered(self.twin.generate(self.requests(count), self.sampling))[0]


def gathered(stream, at_first=lambda: None) -> tuple[dict[int, list[int]], dict[int, int]]:
    """Trajectory → tokens, and worker → number of tokens."""
    tokens, by_worker = defaultdict(list), defaultdict(int)
    for number, segments in enumerate(stream):
        if number == 0:
            at_first()
        by_worker[getattr(segments, "worker", 0)] += sum(map(len, segments))
        for segment in segments:
            tokens[segment.trajectory_id] += segment.token_ids.tolist()
    return dict(tokens), dict(by_worker)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def worker(port: int, token: Path, name: str, *options: str) -> subprocess.Popen:
    kimi = [sys.executable, "-P", "-m", "kimi_core.cli", "worker"]
    where = ["--connect", f"127.0.0.1:{port}", "--token-file", str(token), "--name", name]
    root = str(Path(kimi_core.__file__).parents[1])
    return subprocess.Popen(
        [*kimi, *where, "--threads", "1", *options],
        env=os.environ | {"PYTHONPATH": root},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_until_there(engine, count: int) -> None:
    """Until so many workers are ready, of this host or another."""
    ends = time.monotonic() + WAIT_S
    while sum(one.ready for one in engine._workers) < count:
        assert time.monotonic() < ends
        for one in engine._with_news(0.2):
            engine._take(one)


@pytest.mark.slow
@pytest.mark.nightly
def test_workers_join_work_are_lost_and_join_again(tmp_path):
    token = tmp_path / "token"
    token.write_text(TOKEN)
    port = free_port()
    one = Shown()
    cluster = ClusterConfig(listen=f"127.0.0.1:{port}", token_file=str(token))
    engine, publisher = load_engine(
        one.model,
        RolloutConfig(batch_rows=4, stop=["12", "=?"]),
        128,
        images=one.images,
        cluster=cluster,
        codec=one.codec,
    )
    other = tmp_path / "other"
    other.write_text("f" * 32)
    joined, stranger = worker(port, token, "two"), worker(port, other, "stranger")
    try:
        publisher.publish(one.model.named_parameters(), 0)
        engine.serve(0)
        wait_until_there(engine, 2)
        expected = one.expected(30)
        tokens, by_worker = gathered(engine.generate(one.requests(30), one.sampling))
        assert tokens == expected and min(by_worker.values()) > 0 and len(by_worker) == 2
        stopped = [one.codec.response_text(ids, whole=True)[-2:] for ids in tokens.values()]
        assert {"12", "=?"} <= set(stopped) and len({len(ids) for ids in tokens.values()}) > 5

        with torch.no_grad():
            for parameter in (*one.model.parameters(), *one.twin.model.parameters()):
                parameter.mul_(0.9)
        one.twin.serve(1)
        publisher.publish(one.model.named_parameters(), 1)
        engine.serve(1)
        assert all(w.policy_version == 1 for w in engine._workers) and len(engine._workers) == 2
        expected = one.expected(60)
        (session,) = children(joined.pid, "kimi_core.cli")
        tokens, _ = gathered(
            engine.generate(one.requests(60), one.sampling),
            at_first=lambda: os.kill(session, signal.SIGKILL),
        )
        assert tokens == expected and engine.restarts == 1
        wait_until_there(engine, 2)
        assert [one.number for one in engine._workers] == [0, 1]
        assert stranger.wait(WAIT_S) == 1 and "does not accept this token" in stranger.stdout.read()
    finally:
        engine.close()
        publisher.close()
        stranger.kill()
    assert joined.wait(WAIT_S) == 0
    assert "joining again" in (said := joined.stdout.read()) and "The run is over" in said


@pytest.mark.nightly
def test_weights_of_several_ranks_reach_other_hosts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    Path("reward.py").write_text(REWARD + SLOW)
    Path("token").write_text(TOKEN)
    port = free_port()
    length, rate = "iterations=40", "trainer.learning_rate=1e-4"
    cluster = [f"cluster.listen=127.0.0.1:{port}", "cluster.token_file=token"]
    slowly = "reward.function=reward.py:slow"
    other = worker(port, Path("token"), "other")
    try:
        go_on("name=two", length, rate, slowly, "trainer.ranks=2", *cluster)
        assert other.wait(WAIT_S) == 0
    finally:
        other.kill()
    go_on("name=one", length, rate)
    assert sampled("one") == sampled("two") != []
    found = iterations("two")
    assert sum("1" in one.worker_tokens for one in found) > 10
    assert not any(one.worker_restarts for one in found)


def test_a_run_that_is_not_there_and_a_token_that_is_none(tmp_path, capsys):
    for text in ("10.0.0.1", ":80", "host:99999", "host:x"):
        with pytest.raises(ValueError, match="write HOST:PORT"):
            address_of(text)
    assert address_of("host:80") == ("host", 80)
    with pytest.raises(ValueError, match="openssl rand"):
        read_token(tmp_path / "missing")
    (tmp_path / "short").write_text("abc\n")
    with pytest.raises(ValueError, match="has 3 characters"):
        read_token(tmp_path / "short")
    with pytest.raises(ValueError, match=r"without cluster.token_file"):
        ClusterConfig(listen="127.0.0.1:1")
    cluster = ClusterConfig(listen="127.0.0.1:1", token_file="t")
    with pytest.raises(ValueError, match="run the engine 'torch'"):
        load_engine(model(), RolloutConfig(engine="vllm"), CONTEXT, cluster=cluster)

    class Own(PreTrainedTokenizerFast):
        def _decode(self, *given, **named):
            return super()._decode(*given, **named)

    codec = Codec(Own(tokenizer_object=character_tokenizer("abx").backend_tokenizer), ["x"])
    with pytest.raises(ValueError, match="Own turns tokens into text by code"):
        load_engine(model(), RolloutConfig(stop=["x"]), CONTEXT, cluster=cluster, codec=codec)


@pytest.mark.parametrize(
    ("given", "why"),
    [(TOKEN, ""), ("x" * 32, "another token"), ("nonsense", "another version"), ("", "EOF")],
)
def test_the_master_lets_in_who_knows_the_token(given, why):
    ours, theirs = Pipe()
    found: list[BaseException | None] = []

    def other_side(connection: Connection) -> None:
        try:
            if given == "nonsense":
                connection.send_bytes(MAGIC[:-2] + b"1\n" + bytes(32))
            elif given:
                greet(connection, given.encode(), is_master=False)
        except (Refused, EOFError, OSError) as error:
            found.append(error)
        if not given:
            connection.close()

    thread = Thread(target=other_side, args=(theirs,))
    thread.start()
    refused = pytest.raises((Refused, EOFError, OSError), match=(why if given else None) or None)
    with refused if why else nullcontext():
        greet(ours, TOKEN.encode(), is_master=True)
    ours.close()
    thread.join()
    assert [type(one) for one in found] == [Refused] * (why == "another token")


NUMBERS = st.integers(0, 1 << 30)


@given(
    lengths=st.lists(st.integers(1, 6), max_size=5),
    sampling=st.builds(
        Sampling,
        temperature=st.floats(0, 2),
        seed=st.integers(0, 1 << 62),
        stop_token_ids=st.frozensets(NUMBERS),
        repeat_window=NUMBERS,
        repeat_count=NUMBERS,
        stream_tokens=NUMBERS,
        stop_strings=st.none() | st.just(StopStrings(("$", "漢\n"), str)),
    ),
    call=NUMBERS,
    cut=st.integers(1, 300),
)
def test_orders_come_out_as_they_went_in(lengths, sampling, call, cut):
    rng = np.random.default_rng(0)
    requests = [
        Request(int(rng.integers(1 << 60)), rng.integers(0, 9, n).astype(np.int32), n, 3, 4)
        for n in lengths
    ]
    for order in [("serve", call), ("begin", call, sampling, 7), ("stop",), ("end",)]:
        assert orders.unpacked(orders.packed(order), str) == order
    if sampling.stop_strings:
        with pytest.raises(ValueError, match="without a tokenizer"):
            orders.unpacked(orders.packed(("begin", call, sampling, 7)))
    sent = orders.packed(("feed", requests))
    kind, came = orders.unpacked(sent)
    assert kind == "feed" and len(came) == len(requests)
    for one, two in zip(requests, came, strict=True):
        assert replace(one, token_ids=0) == replace(two, token_ids=0)
        np.testing.assert_array_equal(one.token_ids, two.token_ids)
    if cut < len(sent):
        with pytest.raises((ValueError, struct.error)):
            orders.unpacked(sent[:cut])
    with pytest.raises(ValueError, match="unknown kind"):
        orders.unpacked(b"")


def test_images_come_out_as_they_went_in():
    sent = {
        3: {"pixel_values": torch.randn(1, 3, 4, 4), "sizes": torch.tensor([[4, 4]])},
        0: {"pixel_values": torch.zeros(2, 5, dtype=torch.bfloat16).t()},
    }
    message = orders.packed(("images", sent))
    kind, came = orders.unpacked(message)
    assert kind == "images" and came.keys() == sent.keys()
    for number, pixels in sent.items():
        assert came[number].keys() == pixels.keys()
        assert all(torch.equal(came[number][name], value) for name, value in pixels.items())
    with pytest.raises(ValueError, match="has no images"):
        orders.unpacked(message[:20])
