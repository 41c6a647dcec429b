"""From settings to an engine, with the publisher that takes a model's weights to it."""

import json
import os
import secrets
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from kimi_core.cluster.handshake import address_of, read_token
from kimi_core.cluster.listener import Listener, RemoteStart
from kimi_core.cluster.placement import RayWorkers
from kimi_core.config import ClusterConfig, RolloutConfig
from kimi_core.models.codec import Codec
from kimi_core.models.vision import Images
from kimi_core.rollout.engine import Engine
from kimi_core.rollout.fleet import Fleet, linger_s
from kimi_core.rollout.torch.arena_engine import ArenaEngine
from kimi_core.rollout.torch.engine import TorchEngine
from kimi_core.rollout.torch.process import Nursery, ProcessWorker, without_weights
from kimi_core.rollout.torch.worker import Start
from kimi_core.rollout.vllm.engine import VLLMEngine
from kimi_core.weights.broadcast.rounds import BroadcastSettings
from kimi_core.weights.publish import ArenaPublisher, InPlace, Publisher, module_to_read


def load_engine(
    model: PreTrainedModel,
    rollout: RolloutConfig,
    longest: int | None,
    publisher: Publisher | None = None,
    *,
    exact: bool = True,
    images: Images | None = None,
    cluster: ClusterConfig | None = None,
    codec: Codec | None = None,
) -> tuple[Engine, Publisher]:
    """The engine that ``rollout`` describes. It samples once a version was published.

    Args:
        longest: tokens of the longest sequence that the engine will see; None: not known.
        publisher: takes weights to the engine; None: one for a trainer in this process.
        exact: as for ``Fleet``.
        images: the images of prompts, if the model reads some.
        cluster: workers of other hosts may join; None: there are none.
        codec: the run's, from which such workers learn how tokens become text; needed with both
            ``cluster.listen`` and ``rollout.stop``.

    Raises:
        ValueError: the engine cannot run the model, workers are asked for on a GPU, or the
            tokenizer cannot be sent to other hosts.
    """
    cluster = cluster or ClusterConfig()
    if publisher is None and reads_trainer(rollout, cluster):
        publisher = InPlace()
    elif publisher is None:
        publisher = ArenaPublisher(model.config, model.dtype, tp_size=tensor_parallel(rollout))
    if cluster.is_open and rollout.engine != "torch":
        raise ValueError(
            f"cluster.listen = {cluster.listen!r} and cluster.address = {cluster.address!r} with "
            f"rollout.engine = {rollout.engine!r}: workers of other hosts run the engine 'torch'"
        )
    text = None
    if cluster.is_open and rollout.stop:
        assert codec is not None, "stop strings on other hosts need the codec"
        text = codec.text_as_json()
    return _engine(model, rollout, longest, publisher, exact, images, cluster, text), publisher


def reads_trainer(rollout: RolloutConfig, cluster: ClusterConfig) -> bool:
    """Whether the engine can read the parameters of a trainer that is one process."""
    one = rollout.engine == "torch" and rollout.workers == 1
    return one and not (cluster.is_open or cluster.hybrid)


def tensor_parallel(rollout: RolloutConfig) -> int:
    """The ranks of the engine, each of which reads an arena."""
    return rollout.vllm.args.get("tensor_parallel_size", 1) if rollout.engine == "vllm" else 1


def _engine(
    model: PreTrainedModel,
    rollout: RolloutConfig,
    longest: int | None,
    publisher: Publisher,
    exact: bool,
    images: Images | None,
    cluster: ClusterConfig,
    text: dict[str, Any] | None,
) -> Engine:
    if rollout.engine == "torch":
        read, rows = module_to_read(model), rollout.batch_rows
        if not reads_trainer(rollout, cluster):
            assert isinstance(publisher, ArenaPublisher)
            return _fleet(read, rollout, longest, publisher, exact, images, cluster, text)
        if isinstance(publisher, ArenaPublisher):
            arenas = publisher.arenas
            return ArenaEngine(
                read, lambda: arenas[0], batch_rows=rows, longest=longest, images=images
            )
        return TorchEngine(read, batch_rows=rows, longest=longest, images=images)
    assert isinstance(publisher, ArenaPublisher)
    # vLLM is neither loaded nor started before the first response is asked for.
    return VLLMEngine(
        model.config,
        model.dtype,
        lambda: publisher.paths,
        batch_rows=rollout.batch_rows,
        instances=rollout.workers,
        options=rollout.vllm.args,
        timeout_s=rollout.vllm.timeout_s,
        hybrid=cluster.hybrid,
        images=images,
    )


def _fleet(
    model: PreTrainedModel,
    rollout: RolloutConfig,
    longest: int | None,
    publisher: ArenaPublisher,
    exact: bool,
    images: Images | None,
    cluster: ClusterConfig,
    text: dict[str, Any] | None,
) -> Fleet:
    if model.device.type != "cpu":
        raise ValueError(
            f"rollout.workers = {rollout.workers} with a model on {model.device}: workers sample "
            "on a CPU so far; set model.device to cpu, or rollout.workers to 1"
        )
    engine = TorchEngine(model, batch_rows=rollout.batch_rows, longest=longest)  # Checks the model.
    skeleton = without_weights(model)
    threads = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, threads // rollout.workers)

    def start() -> Start:
        (arena,) = publisher.paths
        return Start(
            model=skeleton,
            arena=arena,
            batch_rows=rollout.batch_rows,
            longest=longest,
            threads=threads,
            linger_s=linger_s(rollout.workers),
        )

    timeout_s = rollout.worker_timeout_s
    nursery = Nursery()
    listener, closes = _arrivals(model, rollout, longest, publisher, images, cluster, text)
    here = 0 if cluster.address else rollout.workers

    def close() -> None:
        for end in (nursery.close, *closes):
            end()

    return Fleet(
        [
            ProcessWorker(number, nursery, start, timeout_s=timeout_s, images=images)
            for number in range(here)
        ],
        batch_rows=rollout.batch_rows,
        vocabulary=engine.embedding.num_embeddings,
        context=engine.max_positions,
        exact=exact and not listener,  # Who is there when is not known beforehand.
        arrivals=listener,
        images=() if images is None else images,
        hybrid=cluster.hybrid,
        on_close=close,
    )


def _arrivals(
    model: PreTrainedModel,
    rollout: RolloutConfig,
    longest: int | None,
    publisher: ArenaPublisher,
    images: Images | None,
    cluster: ClusterConfig,
    text: dict[str, Any] | None,
) -> tuple[Listener | None, list[Callable[[], None]]]:
    """What lets workers of other hosts in, from now on, and what is to be called at the end."""
    if not cluster.is_open:
        return None, []
    placed = RayWorkers(cluster.address, cpus=cluster.worker_cpus) if cluster.address else None
    host = placed.host if placed else ""
    where = address_of(cluster.listen) if cluster.listen else (host, 0)
    token = read_token(cluster.token_file) if cluster.listen else secrets.token_bytes(32)
    settings = BroadcastSettings(answer_s=cluster.silent_s, transfer_s=cluster.transfer_s)
    weights = publisher.listen(where[0], settings, token)
    listener = Listener(
        where,
        token,
        _remote_start(model, rollout, longest, publisher, weights, cluster, text),
        first=0 if placed else rollout.workers,
        forget=publisher.forget,
        timeout_s=rollout.worker_timeout_s,
        images=images,
        missing=placed.missing if placed else lambda: "",
    )
    if not placed:
        return listener, [listener.close]
    placed.start(listener.address, token, rollout.workers)
    return listener, [placed.close, listener.close]


def _remote_start(
    model: PreTrainedModel,
    rollout: RolloutConfig,
    longest: int | None,
    publisher: ArenaPublisher,
    weights: tuple[str, int],
    cluster: ClusterConfig,
    text: dict[str, Any] | None,
) -> RemoteStart:
    """What workers of other hosts are told; ``weights`` is where these are sent from."""
    return RemoteStart(
        model=json.loads(model.config.to_json_string(use_diff=False)),
        architecture=type(model).__name__,
        dtype=str(model.dtype).removeprefix("torch."),
        text=text,
        layout=publisher.layout.hash.hex(),
        weights=weights,
        batch_rows=rollout.batch_rows,
        longest=longest,
        linger_s=linger_s(rollout.workers),
        silent_s=cluster.silent_s,
    )
