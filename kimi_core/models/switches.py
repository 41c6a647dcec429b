"""What a config says of attention: which layers it has, and the lengths after which they compute
something else, windows and original contexts.

The start-up checks of engine and trainer cross them, as far as a run does.
"""

from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer


def switches(model: PreTrainedModel) -> set[int]:
    """The windows and original contexts of the config that are shorter than the model's context."""
    config = model.config.get_text_config(decoder=True)
    layers = DynamicCache(config=config).layers
    found = {layer.get_max_length() for layer in layers if getattr(layer, "is_sliding", False)}
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    # Some configs keep the settings of each type of layer apart.
    for settings in (vars(config), rope, *rope.values()):
        if isinstance(settings, dict):
            found.add(settings.get("original_max_position_embeddings") or 0)
    context = getattr(config, "max_position_embeddings", None)
    return {switch for switch in found if switch and (context is None or switch < context)}


def length_to_check(model: PreTrainedModel, longest: int | None) -> int:
    """Tokens of a sequence that crosses every switch that sequences of ``longest`` tokens cross.

    Args:
        longest: tokens of the longest sequence of a run; None: not known.
    """
    crossed = [switch for switch in switches(model) if longest is None or switch < longest]
    length = max([12, *(switch + 4 for switch in crossed)])
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return min(length, context or length)


def attention_layers(model: PreTrainedModel) -> tuple[list[int | None], int | None]:
    """The window of each layer with keys and values, and the model's context (None: no limit).

    Raises:
        ValueError: a layer keeps something else, as a state-space or linear-attention layer does.
    """
    config = model.config.get_text_config(decoder=True)
    layers = DynamicCache(config=config).layers
    other = {type(layer).__name__ for layer in layers}
    other -= {DynamicLayer.__name__, DynamicSlidingWindowLayer.__name__}
    if other or not layers:
        raise ValueError(
            f"The embedded engine cannot run model type {config.model_type!r}: its cache has "
            f"{', '.join(sorted(other)) or 'no layers'}; allowed are layers that keep the keys and "
            "values of all positions (Llama, Qwen, Mistral, GPT-2, GPT-NeoX, Gemma and the like)"
        )
    windows = [layer.get_max_length() if layer.is_sliding else None for layer in layers]
    return windows, getattr(config, "max_position_embeddings", None)


def has_alibi(model: PreTrainedModel) -> bool:
    """Whether positions enter as a bias on the scores."""
    config = model.config
    return config.model_type == "bloom" or bool(getattr(config, "alibi", False))
