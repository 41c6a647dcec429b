"""Contexts with images as vLLM takes them.

Here an image is a run of one negative id (``models/vision.py``). vLLM takes the id of its model's
image token, and the image with a key under which it keeps the features. The key has the version of
the weights, because vLLM's cache of features outlives an update of the weights.

A processor of transformers works in vLLM as well: vLLM gets the picture and expands what stands for
it. Nothing in vLLM can do what `Standardised` does, so its pixels are handed over.
"""

from typing import Any

import numpy as np
from transformers import PretrainedConfig

from kimi_core.models.images import decoded
from kimi_core.models.processors import PLACE
from kimi_core.models.vision import Images


def prompt_with_images(
    images: Images, config: PretrainedConfig, context: np.ndarray, version: int
) -> Any:
    """A prompt for ``AsyncLLM.generate``, with the salt of the prefix cache.

    Args:
        config: the model's.
        context: token ids int32 ``[n]``, each image whole.
        version: of the weights that compute the features.

    Raises:
        ValueError: a file of an image has changed.
    """
    place: int = config.image_token_id
    if images.processor.short is None:
        return _with_pixels(images, place, context, version)
    from vllm import TokensPrompt

    ids, numbers = _shortened(images, place, context)
    keys = [_key(images, number, version) for number in numbers]
    return TokensPrompt(
        prompt_token_ids=ids,
        multi_modal_data={"image": [decoded(images.by_number(number)) for number in numbers]},
        multi_modal_uuids={"image": keys},
        cache_salt=str(version),
    )


def expanded(config: PretrainedConfig, context: np.ndarray) -> list[int]:
    """What vLLM computes for a context: the model's image token in every place of an image."""
    ids: list[int] = np.where(context < 0, config.image_token_id, context).tolist()
    return ids


def _with_pixels(images: Images, place: int, context: np.ndarray, version: int) -> Any:
    import torch
    from transformers import BatchFeature
    from vllm.inputs import mm_input
    from vllm.multimodal.inputs import (
        MultiModalFieldConfig,
        MultiModalKwargsItems,
        PlaceholderRange,
    )

    numbers, ranges, at = [], [], np.flatnonzero(context < 0)
    while len(at):
        numbers.append(-1 - int(context[at[0]]))
        size = images.places(numbers[-1])
        ranges.append(PlaceholderRange(offset=int(at[0]), length=size))
        at = at[size:]
    pixels = torch.cat([images.pixels(number)["pixel_values"] for number in numbers])
    return mm_input(
        np.where(context < 0, place, context).tolist(),
        MultiModalKwargsItems.from_hf_inputs(
            BatchFeature({"pixel_values": pixels}),
            {"pixel_values": MultiModalFieldConfig.batched("image")},
        ),
        {"image": [_key(images, number, version) for number in numbers]},
        {"image": ranges},
        cache_salt=str(version),
    )


def _shortened(images: Images, place: int, context: np.ndarray) -> tuple[list[int], list[int]]:
    """Token ids with each image as it stands in a text, and the images' numbers in their order."""
    short = [place if one == PLACE else one for one in images.processor.short or ()]
    ids: list[int] = []
    numbers: list[int] = []
    at = 0
    for first in np.flatnonzero(context < 0).tolist():
        if first < at:  # Of the image before.
            continue
        number = -1 - int(context[first])
        whole = np.array(images.ids_of(number))
        begin = first - int(np.flatnonzero(whole < 0)[0])
        ids += [*context[at:begin].tolist(), *short]
        numbers.append(number)
        at = begin + len(whole)
    return ids + context[at:].tolist(), numbers


def _key(images: Images, number: int, version: int) -> str:
    return f"{images.by_number(number).digest}:{version}"
