"""Images in token arrays: the run's table of them, and what a model reads in their places.

A model with a vision tower reads embeddings: those of its tokens, with the features of each image
in the image's places. ``Images.inputs`` makes them for the engine and for the trainer alike. No
token of the vocabulary stands for an image, so text can never be taken for one.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kimi_core.models.images import decoded
from kimi_core.models.inputs import Inputs, Span, has_deepstack, has_mrope, in_space, span_of
from kimi_core.models.processors import PLACE, Pixels, Processor
from kimi_core.types import Image, Prompt

KEPT_BYTES = 1 << 28
"""Memory of the pixels that are kept, and of an engine's features."""


class Bounded:
    """Keeps tensors under keys, the ones used last, in at most ``limit`` bytes."""

    def __init__(self, limit: int = KEPT_BYTES) -> None:
        self._limit = limit
        self._bytes = 0
        self._kept: OrderedDict[int, Any] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Memory of what is kept now, in bytes."""
        return self._bytes

    def get(self, key: int) -> Any:
        """The value; None: it is not here."""
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, key: int, value: Any) -> None:
        self._kept[key] = value
        self._bytes += _bytes_of(value)
        while self._bytes > self._limit and len(self._kept) > 1:
            self._bytes -= _bytes_of(self._kept.popitem(last=False)[1])

    def clear(self) -> None:
        self._kept.clear()
        self._bytes = 0


class Images:
    """The images of a run, numbered from 0 in the order in which they are added.

    The numbers are those of the token arrays, so a resumed run must add the same images in the same
    order: ``fingerprint`` tells.

    Args:
        load_processor: loads what makes the model's input of a picture; called with the first one.
    """

    def __init__(self, load_processor: Callable[[], Processor]) -> None:
        self._load_processor = load_processor
        self._processor: Processor | None = None
        self._images: list[Image] = []
        self._numbers: dict[str, int] = {}
        self._ids: list[list[int]] = []
        self._pixels = Bounded()
        self._spans: dict[int, Span] = {}

    def __len__(self) -> int:
        return len(self._images)

    def add(self, prompts: Iterable[Prompt]) -> None:
        """Give a number to each image that has none.

        Raises:
            ValueError: an image's file has changed, or the processor cannot be loaded.
        """
        for prompt in prompts:
            for image in prompt.images:
                if image.digest not in self._numbers:
                    self._numbers[image.digest] = len(self._images)
                    self._images.append(image)
                    ids, pixels = self._process(image)
                    self._ids.append(ids)
                    self._pixels.put(len(self._images) - 1, pixels)

    def ids(self, image: Image) -> list[int]:
        """The token ids that stand for an image: negative in its positions.

        Raises:
            ValueError: the image was never added.
        """
        number = self._numbers.get(image.digest)
        if number is None:
            raise ValueError(
                f"The image with SHA-256 {image.digest[:16]} is not in the run's table: its file "
                "has changed since this run began; put it back, or start another run"
            )
        return self.ids_of(number)

    def ids_of(self, number: int) -> list[int]:
        """As ``ids``, of the image with that number."""
        return [-1 - number if one == PLACE else one for one in self._ids[number]]

    def by_number(self, number: int) -> Image:
        """The image with that number."""
        return self._images[number]

    def image(self, digest: str) -> Image | None:
        """The image of that SHA-256; None: it was never added."""
        number = self._numbers.get(digest)
        return None if number is None else self._images[number]

    def places(self, number: int) -> int:
        """Positions that an image takes."""
        return self._ids[number].count(PLACE)

    def memory(self, model: PreTrainedModel) -> int:
        """Bytes of the pixels that are kept, and of the features that an engine keeps at most."""
        width = model.get_input_embeddings().weight.shape[1] * model.dtype.itemsize
        places = sum(map(self.places, range(len(self))))
        return self._pixels.nbytes + min(KEPT_BYTES, places * width)

    def another(self) -> "Images":
        """An empty table for images that are processed in the same way."""
        return Images(self._load_processor)

    def any_number(self) -> int | None:
        """The number of an image whose pixels are there; None: there is no image."""
        return 0 if self._images else None

    def save(self, folder: Path) -> None:
        """Write the processor into the folder of a checkpoint."""
        self.processor.save(folder)

    @property
    def processor(self) -> Processor:
        """What makes the model's input of a picture; loaded when it is first needed.

        Raises:
            ValueError: it cannot be loaded.
        """
        if self._processor is None:
            self._processor = self._load_processor()
        return self._processor

    def fingerprint(self) -> str:
        """Names the images, their numbers, and how they are processed."""
        digest = hashlib.sha256(self._processor.settings().encode() if self._processor else b"")
        for image in self._images:
            digest.update(bytes.fromhex(image.digest))
        return digest.hexdigest()[:16]

    def inputs(
        self,
        model: PreTrainedModel,
        ids: Tensor,
        positions: Tensor,
        kept: Bounded | None = None,
        *,
        reach_tower: bool = False,
    ) -> Inputs:
        """What ``model`` reads for ids and positions, int64 ``[r, l]`` each. Each distinct image is
        encoded once.

        The positions of an image must be whole: in each sequence all of them or none. Gradients
        flow into the vision tower.

        Args:
            kept: features of images by number, for as long as the weights stay the same.
            reach_tower: without an image in ``ids``, give the tower a gradient of 0. Ranks that
                sum the gradients of the same parameters need this.

        Raises:
            ValueError: the tower gives another number of features than the image has places.
        """
        is_image = ids < 0
        if not bool(is_image.any()):
            positions = positions.expand(4, -1, -1) if has_mrope(model) else positions
            some = self.any_number() if reach_tower else None
            if some is None:
                return Inputs(ids, positions)
            nothing = self._features(model, [some], kept)[some].sum() * 0.0
            return Inputs(ids, positions, model.get_input_embeddings()(ids) + nothing)
        embeds = model.get_input_embeddings()(ids.clamp(min=0))
        # In row-major order the places of image i are those of its first feature to its last, as
        # often as the image occurs.
        sorted_ids, order = ids[is_image].sort(stable=True)
        found, counts = sorted_ids.unique_consecutive(return_counts=True)
        numbers = (-1 - found).tolist()
        features = self._features(model, numbers, kept)
        placed = []
        for number, count in zip(numbers, counts.tolist(), strict=True):
            times, rest = divmod(count, len(features[number]))
            if rest:
                raise ValueError(
                    f"{type(model).__name__} gives {len(features[number])} features for an image "
                    f"that has {count} places here; its processor does not belong to the model"
                )
            placed.append(features[number].repeat(times, 1))
        values, *deep = torch.cat(placed)[order.argsort()].to(embeds).split(embeds.shape[-1], -1)
        if has_mrope(model):
            positions = in_space(ids, positions, {n: self._span(model, n) for n in numbers})
        where = is_image[..., None]
        return Inputs(
            ids,
            positions,
            embeds.masked_scatter(where, values),
            tuple(torch.zeros_like(embeds).masked_scatter(where, one) for one in deep),
        )

    def shift(self, model: PreTrainedModel, ids: np.ndarray) -> int:
        """What the images in a context, int32 ``[n]``, add to the M-RoPE positions behind it."""
        if not has_mrope(model):
            return 0
        found, counts = np.unique(ids[ids < 0], return_counts=True)
        times = {-1 - int(one): int(count) for one, count in zip(found, counts, strict=True)}
        return sum(self._span(model, n).shift * (times[n] // self.places(n)) for n in times)

    def _span(self, model: PreTrainedModel, number: int) -> Span:
        if number not in self._spans:
            try:
                grid = self.pixels(number)["image_grid_thw"]
                self._spans[number] = span_of(model, self.places(number), grid)
            except (KeyError, TypeError) as error:
                raise ValueError(
                    f"{type(model).__name__} numbers the places of images in a way that is not "
                    f"known ({error!r}); take another model, such as Qwen3-VL"
                ) from error
        return self._spans[number]

    def _features(
        self, model: PreTrainedModel, numbers: list[int], kept: Bounded | None
    ) -> dict[int, Tensor]:
        """Number → the image's features, ``[places, d]``."""
        known = {} if kept is None else {n: kept.get(n) for n in numbers}
        found = {n: features for n, features in known.items() if features is not None}
        alike: dict[tuple[tuple[str, torch.Size], ...], list[int]] = {}
        pixels = {n: self.pixels(n) for n in numbers if n not in found}
        for number, inputs in pixels.items():
            shapes = tuple((name, value.shape) for name, value in inputs.items())
            alike.setdefault(shapes, []).append(number)
        for some in alike.values():
            batch = {k: torch.cat([pixels[n][k] for n in some]) for k in pixels[some[0]]}
            for number, features in zip(some, encode(model, batch, len(some)), strict=True):
                found[number] = features
                if kept is not None:
                    kept.put(number, features)
        return found

    def pixels(self, number: int) -> Pixels:
        """What the model's tower takes for an image, on the CPU.

        Raises:
            ValueError: the image's file has changed.
        """
        pixels: Pixels | None = self._pixels.get(number)
        if pixels is None:
            _, pixels = self._process(self._images[number])
            self._pixels.put(number, pixels)
        return pixels

    def _process(self, image: Image) -> tuple[list[int], Pixels]:
        return self.processor(decoded(image))


PLACES = "places"
"""Stands with the pixels of an image that is sent: the number of its positions."""


class SentImages(Images):
    """Images that another process has sent by number, for an engine or a rank of a trainer."""

    def __init__(self) -> None:
        super().__init__(_no_processor)
        self._sent: dict[int, Pixels] = {}

    def take(self, sent: Mapping[int, Pixels]) -> None:
        """Keep what ``to_send`` gave, by number."""
        self._sent.update(sent)

    def forget(self) -> None:
        """Keep none any more."""
        self._sent.clear()

    def pixels(self, number: int) -> Pixels:
        """What was sent for the image."""
        return {name: one for name, one in self._sent[number].items() if name != PLACES}

    def places(self, number: int) -> int:
        """Positions that it takes."""
        return int(self._sent[number][PLACES])

    def any_number(self) -> int | None:
        return next(iter(self._sent), None)


def to_send(images: Images, number: int) -> dict[str, Tensor]:
    """All that ``SentImages`` needs of an image."""
    return {**images.pixels(number), PLACES: torch.tensor(images.places(number))}


def to_send_with(images: Images | None, token_ids: np.ndarray) -> dict[int, Pixels]:
    """``to_send`` of each image in token ids; of any image if these have none."""
    if images is None:
        return {}
    numbers = (-1 - np.unique(token_ids[token_ids < 0])).tolist()
    if not numbers and (some := images.any_number()) is not None:
        numbers = [some]
    return {number: to_send(images, number) for number in numbers}


def _no_processor() -> Processor:
    raise RuntimeError("Only pixels were sent, and no image can be processed here")


def inputs_of(
    images: Images | None,
    model: PreTrainedModel,
    ids: Tensor,
    positions: Tensor,
    kept: Bounded | None,
    *,
    reach_tower: bool = False,
) -> Inputs:
    """As ``Images.inputs``, also for a model that reads text only."""
    if images is None:
        return Inputs(ids, positions)
    return images.inputs(model, ids, positions, kept, reach_tower=reach_tower)


def encode(model: PreTrainedModel, pixels: Pixels, count: int) -> Tensor:
    """Features of ``count`` images of one shape, ``[count, places, d]``.

    With deepstack d is several times the model's width: what is added behind each layer follows.
    """
    there = {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in pixels.items()
    }
    output = model.get_image_features(**there)
    found = [getattr(output, "pooler_output", output)]
    if has_deepstack(model):
        found += output.deepstack_features
    return torch.cat([_of_each(features, count) for features in found], -1)


def _of_each(features: Tensor | Sequence[Tensor], count: int) -> Tensor:
    """``[count, places, d]``, of a tensor of another shape or of one tensor an image."""
    if not isinstance(features, Tensor):
        features = torch.cat([one.reshape(-1, one.shape[-1]) for one in features])
    return features.reshape(count, -1, features.shape[-1])


def has_vision(model: PreTrainedModel) -> bool:
    """Whether a model reads images."""
    return getattr(model.config, "vision_config", None) is not None


def is_frozen(model: PreTrainedModel) -> bool:
    """Whether no part that makes the features of images is trained."""
    text = [model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()]
    others = {id(parameter) for part in text for parameter in part.parameters()}
    return not any(p.requires_grad for p in model.parameters() if id(p) not in others)


def _bytes_of(value: Tensor | Pixels) -> int:
    tensors = [value] if isinstance(value, Tensor) else value.values()
    return sum(one.numel() * one.element_size() for one in tensors)
