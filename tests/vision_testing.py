"""Tiny models with a vision tower, and prompts with pictures, for tests."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image as Pillow

from kimi_core.config import ModelConfig, ScratchConfig
from kimi_core.models import scratch
from kimi_core.models.images import image_of_pixels
from kimi_core.models.load import load_model
from kimi_core.models.processors import Standardised
from kimi_core.models.vision import Images
from kimi_core.types import Image

ALPHABET = "0123456789=#?"
SIZES = ScratchConfig(layers=2, width=16, heads=2, context=128, vision_layers=1)
COLOURS = ("red", "green", "blue", "white", "black", "orange")


def standardised() -> Standardised:
    return Standardised(scratch.IMAGE_SIZE, scratch.PLACES)


def tiny(seed: int = 0, alphabet: str = ALPHABET, **sizes: int):
    """Model and tokenizer; weights so large that an image shows in the log-probs."""
    config = ModelConfig(scratch=SIZES.model_copy(update=sizes), device="cpu")
    model, tokenizer = load_model(config, alphabet=alphabet, seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model, tokenizer


def table() -> Images:
    return Images(standardised)


def picture(seed: int) -> Image:
    """Noise, different for each seed."""
    rng = np.random.default_rng(seed)
    return image_of_pixels(rng.integers(256, size=(32, 32, 3), dtype=np.uint8))


def save_model(folder: Path, alphabet: str = ALPHABET) -> None:
    model, tokenizer = tiny(alphabet=alphabet)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    standardised().save(folder)


def write_data(folder: Path) -> None:
    """``pictures.jsonl`` with 24 prompts and ``sft.jsonl``, which name PNG files."""
    for place, colour in enumerate(COLOURS):
        Pillow.new("RGB", (40, 24), colour).save(folder / f"{place}.png")
    prompts, examples = [], []
    for number in range(24):
        # One image, two, or none.
        names = [f"{number % 6}.png", f"{number // 6}.png"][: (number + 1) % 3]
        asked = {"prompt": f"{number}=", "images": names}
        prompts.append(asked | {"answer": str(number % 6)})
        examples.append(asked | {"response": f"#{number % 6}"})
    for name, lines in (("pictures.jsonl", prompts), ("sft.jsonl", examples)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
