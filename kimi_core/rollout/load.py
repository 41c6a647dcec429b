"""From settings to an engine, with the publisher that takes a model's weights to it."""

from transformers import PreTrainedModel

from kimi_core.config import RolloutConfig
from kimi_core.rollout.engine import Engine
from kimi_core.rollout.torch.engine import TorchEngine
from kimi_core.rollout.vllm.engine import VLLMEngine
from kimi_core.weights.publish import ArenaPublisher, InPlace, Publisher, module_to_read


def load_engine(
    model: PreTrainedModel, rollout: RolloutConfig, longest: int | None
) -> tuple[Engine, Publisher]:
    """The engine that ``rollout.engine`` names. It samples once a version was published.

    Args:
        longest: tokens of the longest sequence that the engine will see; None: not known.
    """
    if rollout.engine == "torch":
        read = module_to_read(model)
        return TorchEngine(read, batch_rows=rollout.batch_rows, longest=longest), InPlace()
    size = rollout.vllm.args.get("tensor_parallel_size", 1)
    publisher = ArenaPublisher(model.config, model.dtype, tp_size=size)
    # vLLM is neither loaded nor started before the first response is asked for.
    engine = VLLMEngine(
        model.config,
        model.dtype,
        lambda: publisher.paths,
        batch_rows=rollout.batch_rows,
        options=rollout.vllm.args,
        timeout_s=rollout.vllm.timeout_s,
    )
    return engine, publisher
