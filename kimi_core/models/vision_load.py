"""The table of a run's images, with the processor that the model's name says."""

from collections.abc import Iterable

from transformers import PreTrainedModel

from kimi_core.config import Config
from kimi_core.models.processors import processor_of
from kimi_core.models.vision import Images, has_vision
from kimi_core.types import Prompt


def load_images(
    model: PreTrainedModel, config: Config, prompts: Iterable[Prompt] = ()
) -> Images | None:
    """A table of the images of ``prompts``, in their order; None if the model reads text only.

    Raises:
        ValueError: the engine or the ranks of the config cannot handle images yet.
    """
    if not has_vision(model):
        return None
    trainer = config.trainer
    if trainer.tensor_parallel * trainer.context_parallel > 1:
        raise ValueError(
            f"{type(model).__name__} reads images, which trainer.tensor_parallel = "
            f"{trainer.tensor_parallel} and trainer.context_parallel = {trainer.context_parallel} "
            "cannot divide; set both to 1, and trainer.ranks to as many as you like"
        )
    images = Images(lambda: processor_of(config.model.name, model))
    images.add(prompts)
    return images
