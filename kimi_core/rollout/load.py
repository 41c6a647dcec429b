"""From settings to an engine, with the publisher that takes a model's weights to it."""

from transformers import PreTrainedModel

from kimi_core.config import RolloutConfig
from kimi_core.models.vision import Images
from kimi_core.rollout.engine import Engine
from kimi_core.rollout.torch.arena_engine import ArenaEngine
from kimi_core.rollout.torch.engine import TorchEngine
from kimi_core.rollout.vllm.engine import VLLMEngine
from kimi_core.weights.publish import ArenaPublisher, InPlace, Publisher, module_to_read


def load_engine(
    model: PreTrainedModel,
    rollout: RolloutConfig,
    longest: int | None,
    publisher: Publisher | None = None,
    images: Images | None = None,
) -> tuple[Engine, Publisher]:
    """The engine that ``rollout.engine`` names. It samples once a version was published.

    Args:
        longest: tokens of the longest sequence that the engine will see; None: not known.
        publisher: takes weights to the engine; None: one for a trainer in this process.
        images: the images of prompts, if the model reads some.
    """
    if publisher is None and rollout.engine == "torch":
        publisher = InPlace()
    elif publisher is None:
        publisher = ArenaPublisher(model.config, model.dtype, tp_size=tensor_parallel(rollout))
    return _engine(model, rollout, longest, publisher, images), publisher


def tensor_parallel(rollout: RolloutConfig) -> int:
    """The ranks of the engine, each of which reads an arena."""
    return rollout.vllm.args.get("tensor_parallel_size", 1) if rollout.engine == "vllm" else 1


def _engine(
    model: PreTrainedModel,
    rollout: RolloutConfig,
    longest: int | None,
    publisher: Publisher,
    images: Images | None,
) -> Engine:
    if rollout.engine == "torch":
        read, rows = module_to_read(model), rollout.batch_rows
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
