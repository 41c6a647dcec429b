"""Does a model read images as it would by itself?

Engine and trainer hand a model embeddings with the features of images in their places, the
positions that it would give them, and causal attention. A model that lets the positions of an image
attend to each other computes something else. Two made-up images tell.
"""

from collections.abc import Callable, Iterable, Sequence
from inspect import signature

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kimi_core.models.images import image_of_pixels
from kimi_core.models.inputs import has_mrope
from kimi_core.models.vision import Images
from kimi_core.types import Prompt

SIDE = 64
"""Pixels of a side of the made-up images."""

Given = Callable[[Sequence[np.ndarray]], Iterable[tuple[np.ndarray, np.ndarray]]]
"""Takes sequences, and gives for each the sequence (or a longer one that begins with it) and the
log-probs of its tokens but the first at temperature 1, as `own_logprobs` defines them; NaN where
they are not known."""


def made_up(model: PreTrainedModel, images: Images) -> list[np.ndarray]:
    """Three sequences with two images: one with both, one with each; token ids int32 ``[n]``.

    They are added to ``images``.
    """
    rng = np.random.default_rng(0)
    pictures = [image_of_pixels(rng.integers(256, size=(SIDE, SIDE, 3), dtype=np.uint8))]
    # Where positions have a row and a column, they must not be mistaken for each other.
    height = SIDE // 2 if has_mrope(model) else SIDE
    levels = np.tile(np.linspace(0, 255, SIDE), (height, 1)).astype(np.uint8)
    pictures.append(image_of_pixels(levels))
    images.add([Prompt(0, "", "", images=tuple(pictures))])
    first, second = (images.ids(one) for one in pictures)
    vocabulary, place = model.get_input_embeddings().num_embeddings, model.config.image_token_id
    words = [one for one in range(min(3, vocabulary - 2), vocabulary) if one != place]
    text = rng.choice(words, size=(6, 5)).tolist()
    sequences = [
        [*text[0], *first, *text[1], *second, *text[2]],
        [*first, *text[3]],
        [*text[4], *second, *text[5]],
    ]
    return [np.array(one, np.int32) for one in sequences]


TAKE = "Take a model with causal attention, such as LLaVA, SmolVLM, InternVL or Qwen-VL"


def check(
    model: PreTrainedModel, images: Images, given: Given, who: str, way_out: str = TAKE
) -> None:
    """Compare the log-probs that ``given`` gives with those of the model's own forward pass.

    Args:
        images: an empty or used table; two images are added.
        who: names the caller of the model, for the error.
        way_out: a sentence without its full stop, for the error.

    Raises:
        ValueError: they differ.
    """
    sequences = made_up(model, images)
    tolerance = 1e-4 if model.dtype in (torch.float32, torch.float64) else 0.1
    for ids, ours in given(sequences):
        # The model's own pass would take a sampled image token for an image.
        place = np.flatnonzero(ids == model.config.image_token_id)
        ids, ours = (ids[: place[0] + 1], ours[: place[0]]) if len(place) else (ids, ours)
        known = ~np.isnan(ours)
        if not known.any():
            continue
        theirs = own_logprobs(model, images, ids)[known]
        gap = float(np.abs(ours[known] - theirs).max())
        if not gap <= tolerance * (1 + float(np.abs(theirs).max())):
            raise ValueError(
                f"{who} cannot read images with {type(model).__name__}: log-probs differ by "
                f"{gap:.3g} from the model's own{_reason(model)}. {way_out}"
            )


@torch.no_grad()
def own_logprobs(
    model: PreTrainedModel, images: Images, ids: np.ndarray, *, temperature: float = 1.0
) -> np.ndarray:
    """Log-prob of each token but the first by the model's own forward pass with pixels.

    At the places of images it is that of token 0: what the model computes there counts, too.
    """
    place: int = model.config.image_token_id
    numbers, left = [], -1 - ids[ids < 0]
    while len(left):  # An image may occur several times.
        numbers.append(int(left[0]))
        left = left[images.places(numbers[-1]) :]
    inputs = torch.from_numpy(np.where(ids < 0, place, ids)[:-1].astype(np.int64)).to(model.device)
    targets = torch.from_numpy(ids[1:].clip(min=0).astype(np.int64)).to(model.device)
    pixels: dict[str, Tensor] = {}
    for number in numbers:
        for name, value in images.pixels(number).items():
            value = value.to(model.device, model.dtype if value.is_floating_point() else None)
            pixels[name] = torch.cat([pixels[name], value]) if name in pixels else value
    # Models whose positions or masks depend on what is an image are told by one of these.
    takes = signature(model.base_model.forward).parameters
    told = [name for name in ("mm_token_type_ids", "token_type_ids") if name in takes]
    kinds = {name: (inputs[None] == place).long() for name in told}
    was_training = model.training
    model.eval()
    try:
        logits = model(input_ids=inputs[None], **pixels, **kinds, use_cache=False).logits[0]
    finally:
        model.train(was_training)
    table = torch.log_softmax(logits.float() / temperature, -1)
    return table.gather(1, targets[:, None])[:, 0].cpu().numpy()


def _reason(model: PreTrainedModel) -> str:
    """What is known of the model's ways."""
    if model.config.model_type in ("gemma3", "paligemma", "gemma3n", "gemma4"):
        return ", because positions of an image attend to each other"
    return ""
