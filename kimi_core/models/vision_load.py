"""What makes a model's input of a picture, from the model's own files."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kimi_core.config import Config
from kimi_core.models import scratch
from kimi_core.models.inputs import has_mrope
from kimi_core.models.vision import (
    PLACE,
    STANDARDISED,
    Images,
    Pixels,
    Processor,
    Standardised,
    has_vision,
)
from kimi_core.types import Prompt

NOT_PIXELS = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}


def load_images(
    model: PreTrainedModel, config: Config, prompts: Iterable[Prompt] = ()
) -> Images | None:
    """A table of the images of ``prompts``, in their order; None if the model reads text only.

    Raises:
        ValueError: the engine or the ranks of the config cannot handle images yet.
    """
    if not has_vision(model):
        return None
    engine, ranks = config.rollout.engine, config.trainer.ranks
    if engine != "torch" or ranks > 1:
        raise ValueError(
            f"{type(model).__name__} reads images, which rollout.engine = {engine!r} with "
            f"trainer.ranks = {ranks} cannot; set them to 'torch' and 1"
        )
    images = Images(lambda: _processor(config.model.name, model))
    images.add(prompts)
    return images


def _processor(name: str, model: PreTrainedModel) -> Processor:
    if name == "scratch":
        return Standardised(scratch.IMAGE_SIZE, scratch.PLACES)
    if (settings := Path(name) / STANDARDISED).is_file():
        return Standardised(**json.loads(settings.read_text()))
    return InPatches(name, model) if has_mrope(model) else Pretrained(name, model)


AROUND = (
    ("vision_start_token_id", "vision_end_token_id"),
    ("image_start_token_id", "image_end_token_id"),
)
"""Names in a config of the tokens that a chat template writes around an image."""


class InPatches:
    """The image processor of a model with M-RoPE, which says how many patches an image has.

    The model's whole processor would bring one of videos, which needs torchvision.

    Raises:
        ValueError: there is none, or it needs a package that is missing.
    """

    def __init__(self, name: str, model: PreTrainedModel) -> None:
        from transformers import AutoImageProcessor  # Loads Pillow.

        self._processor = _loaded(AutoImageProcessor, name)
        config: Any = model.config
        self._merged: int = config.vision_config.spatial_merge_size**2
        found: list[Any] = [[getattr(config, one, None) for one in pair] for pair in AROUND]
        self._around: list[int] = next((pair for pair in found if None not in pair), [])

    def __call__(self, picture: Any) -> tuple[list[int], Pixels]:
        pixels = dict(self._processor(images=[picture], return_tensors="pt"))
        places = int(pixels["image_grid_thw"].prod()) // self._merged
        return [*self._around[:1], *[PLACE] * places, *self._around[1:]], pixels

    def settings(self) -> str:
        return f"{self._around} {self._processor.to_json_string()}"

    def save(self, folder: Path) -> None:
        self._processor.save_pretrained(folder)


def _loaded(kind: Any, name: str) -> Any:
    """The processor of that kind of the model's folder or hub page."""
    try:
        return kind.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(
            f"Cannot load the image processor of {name}: {error}\nA vision-language model's "
            "folder holds preprocessor_config.json or processor_config.json"
        ) from error


class Pretrained:
    """The processor that a model's folder or hub page names.

    Raises:
        ValueError: there is none, or it needs a package that is missing.
    """

    def __init__(self, name: str, model: PreTrainedModel) -> None:
        from transformers import AutoProcessor  # Loads Pillow.

        self._processor = _loaded(AutoProcessor, name)
        if not hasattr(self._processor, "image_token"):
            raise ValueError(
                f"The processor of {name} is {type(self._processor).__name__}, which names no "
                "image token; take a model whose processor puts images into text"
            )
        self._place: int = model.config.image_token_id
        self._name = Path(name).name

    def __call__(self, picture: Any) -> tuple[list[int], Pixels]:
        made = self._processor(
            images=[picture],
            text=[self._processor.image_token],
            add_special_tokens=False,
            return_tensors="pt",
        )
        ids = made["input_ids"][0].tolist()
        pixels = {name: value for name, value in made.items() if name not in NOT_PIXELS}
        return [PLACE if one == self._place else one for one in ids], pixels

    def settings(self) -> str:
        return str(self._processor.image_processor.to_json_string())

    def save(self, folder: Path) -> None:
        self._processor.save_pretrained(folder)
