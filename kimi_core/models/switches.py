"""Lengths after which a model computes something else: windows and original contexts of its config.

The start-up checks of engine and trainer cross them, as far as a run does.
"""

from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache


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
