"""What the layers of a model keep between two tokens, as its config tells."""

from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer


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
    """Whether attention adds a bias that grows with the distance of two tokens."""
    config = model.config
    return config.model_type == "bloom" or bool(getattr(config, "alibi", False))
