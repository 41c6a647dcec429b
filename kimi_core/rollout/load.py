"""From settings to an engine, with the publisher that takes a model's weights to it."""

import json
import os

import torch
from transformers import PreTrainedModel

from kimi_core.cluster.handshake import address_of, read_token
from kimi_core.cluster.listener import Listener, RemoteStart
from kimi_core.config import ClusterConfig, RolloutConfig
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
) -> tuple[Engine, Publisher]:
    """The engine that ``rollout`` describes. It samples once a version was published.

    Args:
        longest: tokens of the longest sequence that the engine will see; None: not known.
        publisher: takes weights to the engine; None: one for a trainer in this process.
        exact: as for ``Fleet``.
        images: the images of prompts, if the model reads some; then there is one worker.
        cluster: workers of other hosts may join; None: there are none.

    Raises:
        ValueError: the engine cannot run the model, or workers are asked for on a GPU.
    """
    cluster = cluster or ClusterConfig()
    if publisher is None and reads_trainer(rollout, cluster):
        publisher = InPlace()
    elif publisher is None:
        publisher = ArenaPublisher(model.config, model.dtype, tp_size=tensor_parallel(rollout))
    if cluster.listen and (rollout.engine != "torch" or rollout.stop or images):
        raise ValueError(
            f"cluster.listen = {cluster.listen!r} with rollout.engine = {rollout.engine!r}, "
            f"rollout.stop = {rollout.stop} and {'' if images else 'no '}images: workers of other "
            "hosts run the engine 'torch', know no stop strings and read no images yet"
        )
    if cluster.hybrid and reads_trainer(rollout, cluster):
        raise ValueError(
            "cluster.hybrid = true with one worker of the engine 'torch', which samples with the "
            "trainer's own parameters: nothing can sleep; leave it out, or set rollout.workers = 2"
        )
    return _engine(model, rollout, longest, publisher, exact, images, cluster), publisher


def reads_trainer(rollout: RolloutConfig, cluster: ClusterConfig) -> bool:
    """Whether the engine can read the parameters of a trainer that is one process."""
    return rollout.engine == "torch" and rollout.workers == 1 and not cluster.listen


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
) -> Engine:
    if rollout.engine == "torch":
        read, rows = module_to_read(model), rollout.batch_rows
        if rollout.workers > 1 or cluster.listen:
            assert isinstance(publisher, ArenaPublisher)
            return _fleet(read, rollout, longest, publisher, exact, cluster)
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
        options=rollout.vllm.args,
        timeout_s=rollout.vllm.timeout_s,
        hybrid=cluster.hybrid,
    )


def _fleet(
    model: PreTrainedModel,
    rollout: RolloutConfig,
    longest: int | None,
    publisher: ArenaPublisher,
    exact: bool,
    cluster: ClusterConfig,
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
    listener = _listener(model, rollout, longest, publisher, cluster) if cluster.listen else None

    def close() -> None:
        nursery.close()
        if listener:
            listener.close()

    return Fleet(
        [ProcessWorker(i, nursery, start, timeout_s=timeout_s) for i in range(rollout.workers)],
        batch_rows=rollout.batch_rows,
        vocabulary=engine.embedding.num_embeddings,
        context=engine.max_positions,
        exact=exact and not listener,  # Who is there when is not known beforehand.
        arrivals=listener,
        hybrid=cluster.hybrid,
        on_close=close,
    )


def _listener(
    model: PreTrainedModel,
    rollout: RolloutConfig,
    longest: int | None,
    publisher: ArenaPublisher,
    cluster: ClusterConfig,
) -> Listener:
    """Lets workers of other hosts in, from now on."""
    host, port = address_of(cluster.listen)
    token = read_token(cluster.token_file)
    settings = BroadcastSettings(answer_s=cluster.silent_s, transfer_s=cluster.transfer_s)
    start = RemoteStart(
        model=json.loads(model.config.to_json_string(use_diff=False)),
        architecture=type(model).__name__,
        dtype=str(model.dtype).removeprefix("torch."),
        layout=publisher.layout.hash.hex(),
        weights=publisher.listen(host, settings),
        batch_rows=rollout.batch_rows,
        longest=longest,
        linger_s=linger_s(rollout.workers),
        silent_s=cluster.silent_s,
    )
    return Listener(
        (host, port),
        token,
        start,
        first=rollout.workers,
        forget=publisher.forget,
        timeout_s=rollout.worker_timeout_s,
    )
