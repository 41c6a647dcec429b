"""From settings to an engine, with the publisher that takes a model's weights to it."""

import os

import torch
from transformers import PreTrainedModel

from kimi_core.config import RolloutConfig
from kimi_core.models.vision import Images
from kimi_core.rollout.engine import Engine
from kimi_core.rollout.fleet import Fleet, linger_s
from kimi_core.rollout.torch.arena_engine import ArenaEngine
from kimi_core.rollout.torch.engine import TorchEngine
from kimi_core.rollout.torch.process import Nursery, ProcessWorker, without_weights
from kimi_core.rollout.torch.worker import Start
from kimi_core.rollout.vllm.engine import VLLMEngine
from kimi_core.weights.publish import ArenaPublisher, InPlace, Publisher, module_to_read


def load_engine(
    model: PreTrainedModel,
    rollout: RolloutConfig,
    longest: int | None,
    publisher: Publisher | None = None,
    *,
    exact: bool = True,
    images: Images | None = None,
) -> tuple[Engine, Publisher]:
    """The engine that ``rollout`` describes. It samples once a version was published.

    Args:
        longest: tokens of the longest sequence that the engine will see; None: not known.
        publisher: takes weights to the engine; None: one for a trainer in this process.
        exact: as for ``Fleet``.
        images: the images of prompts, if the model reads some; then there is one worker.

    Raises:
        ValueError: the engine cannot run the model, or workers are asked for on a GPU.
    """
    if publisher is None and reads_trainer(rollout):
        publisher = InPlace()
    elif publisher is None:
        publisher = ArenaPublisher(model.config, model.dtype, tp_size=tensor_parallel(rollout))
    return _engine(model, rollout, longest, publisher, exact, images), publisher


def reads_trainer(rollout: RolloutConfig) -> bool:
    """Whether the engine can read the parameters of a trainer that is one process."""
    return rollout.engine == "torch" and rollout.workers == 1


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
) -> Engine:
    if rollout.engine == "torch":
        read, rows = module_to_read(model), rollout.batch_rows
        if rollout.workers > 1:
            assert isinstance(publisher, ArenaPublisher)
            return _fleet(read, rollout, longest, publisher, exact)
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
    )


def _fleet(
    model: PreTrainedModel,
    rollout: RolloutConfig,
    longest: int | None,
    publisher: ArenaPublisher,
    exact: bool,
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
    return Fleet(
        [ProcessWorker(i, nursery, start, timeout_s=timeout_s) for i in range(rollout.workers)],
        batch_rows=rollout.batch_rows,
        vocabulary=engine.embedding.num_embeddings,
        context=engine.max_positions,
        exact=exact,
        on_close=nursery.close,
    )
