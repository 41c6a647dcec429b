"""What makes a model's input of a picture: of a scratch model, or from a model's own files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kimi_core.models import scratch
from kimi_core.models.inputs import has_mrope

NOT_PIXELS = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}

PLACE = -1
"""Stands for a position of the image in what a processor returns."""

STANDARDISED = "standardised_images.json"
"""File of a checkpoint whose images are processed by `Standardised`: its arguments."""

Pixels = Mapping[str, Tensor]
"""What ``get_image_features`` takes for one image, by name."""


class Processor(Protocol):
    """Makes a model's input of a picture."""

    short: list[int] | None
    """What stands for a picture in a text for transformers' own processor, ``PLACE`` once; None:
    transformers has no such processor."""

    def __call__(self, picture: Any) -> tuple[list[int], Pixels]:
        """Token ids that stand for the picture, ``PLACE`` in its positions; and its pixels."""
        ...

    def settings(self) -> str:
        """What decides the result."""
        ...

    def save(self, folder: Path) -> None:
        """Write what `processor_of` makes the same processor of."""
        ...

    def save_for_vllm(self, folder: Path) -> None:
        """Write a processor of transformers and its tokenizer, by which vLLM counts places.

        Raises:
            ValueError: there is none.
        """
        ...


def processor_of(name: str, model: PreTrainedModel) -> Processor:
    """What makes ``model``'s input of a picture.

    Args:
        name: ``model.name`` of a config: ``scratch``, a folder or a hub page.

    Raises:
        ValueError: the folder or page has no processor, or that needs a package that is missing.
    """
    if name == "scratch":
        return Standardised(scratch.IMAGE_SIZE, scratch.PLACES)
    if (settings := Path(name) / STANDARDISED).is_file():
        return Standardised(**json.loads(settings.read_text()))
    return InPatches(name, model) if has_mrope(model) else Pretrained(name, model)


class Standardised:
    """The processor of a scratch model: one size, each image with mean 0 and deviation 1.

    A tower with random weights learns nothing from pixels of another scale (docs/vision.md).
    """

    short: list[int] | None = None

    def __init__(self, size: int, places: int) -> None:
        self._size, self._places = size, places

    def __call__(self, picture: Any) -> tuple[list[int], Pixels]:
        if picture.size != (self._size, self._size):
            picture = picture.resize((self._size, self._size))
        values = torch.from_numpy(np.array(picture, np.float32)).permute(2, 0, 1)[None]
        values = (values - values.mean()) / values.std().clamp(min=1.0)
        return [PLACE] * self._places, {"pixel_values": values}

    def settings(self) -> str:
        return json.dumps({"size": self._size, "places": self._places})

    def save(self, folder: Path) -> None:
        (folder / STANDARDISED).write_text(self.settings() + "\n")

    def save_for_vllm(self, folder: Path) -> None:
        from transformers import CLIPImageProcessorPil, LlavaProcessor

        size = self._size
        LlavaProcessor(
            CLIPImageProcessorPil(
                size={"shortest_edge": size}, crop_size={"height": size, "width": size}
            ),
            scratch.character_tokenizer("?"),
            patch_size=round(size / self._places**0.5),
            vision_feature_select_strategy="default",
            image_token=scratch.PAD,
            num_additional_image_tokens=1,
        ).save_pretrained(folder)


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

        self._name = name
        self._processor = _loaded(AutoImageProcessor, name)
        config: Any = model.config
        self._merged: int = config.vision_config.spatial_merge_size**2
        found: list[Any] = [[getattr(config, one, None) for one in pair] for pair in AROUND]
        self._around: list[int] = next((pair for pair in found if None not in pair), [])
        self.short: list[int] | None = [*self._around[:1], PLACE, *self._around[1:]]

    def __call__(self, picture: Any) -> tuple[list[int], Pixels]:
        pixels = dict(self._processor(images=[picture], return_tensors="pt"))
        places = int(pixels["image_grid_thw"].prod()) // self._merged
        return [*self._around[:1], *[PLACE] * places, *self._around[1:]], pixels

    def settings(self) -> str:
        return f"{self._around} {self._processor.to_json_string()}"

    def save(self, folder: Path) -> None:
        self._processor.save_pretrained(folder)

    def save_for_vllm(self, folder: Path) -> None:
        from transformers import AutoProcessor

        _loaded(AutoProcessor, self._name).save_pretrained(folder)


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
        self.short: list[int] | None = [PLACE]

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

    save_for_vllm = save
