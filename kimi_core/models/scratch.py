"""A small Llama with random weights, and a tokenizer with one token per character.

With ``vision_layers`` it becomes a small LLaVA: a CLIP tower and a projector in front of the Llama.
"""

from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from kimi_core.config import ModelConfig
from kimi_core.models.placement import device_of, dtype_of

PAD, EOS = "<pad>", "<eos>"
"""The special tokens, ids 0 and 1."""

VISION_WIDTH, VISION_HEADS = 64, 4
IMAGE_SIZE, PATCH_SIZE = 32, 8
"""Of the vision tower: hidden size and heads; pixels of a side of an image and of a patch."""

PLACES = (IMAGE_SIZE // PATCH_SIZE) ** 2
"""Positions that an image takes."""


def scratch_model(
    config: ModelConfig, alphabet: str, seed: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Make a small Llama with random weights, tied embeddings and one token per character.

    Args:
        alphabet: every character that the model must know; order and repeats do not matter.
        seed: seed of the weights, which are the same on every device. torch's own generator is
            not touched.

    Raises:
        ValueError: the alphabet is empty, or the device does not exist.
    """
    if not alphabet:
        raise ValueError(
            "A scratch model needs an alphabet: the characters of all prompts and answers"
        )
    place = device_of(config.device)
    tokenizer = character_tokenizer(alphabet)
    architecture = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.scratch.width,
        intermediate_size=4 * config.scratch.width,
        num_hidden_layers=config.scratch.layers,
        num_attention_heads=config.scratch.heads,
        max_position_embeddings=config.scratch.context,
        rope_parameters={"rope_type": "default", "rope_theta": config.scratch.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = _causal_lm(architecture, config.scratch.vision_layers)
    return model.to(device=place, dtype=dtype_of(config.dtype, place)).eval(), tokenizer


def _causal_lm(text: LlamaConfig, vision_layers: int) -> PreTrainedModel:
    if not vision_layers:
        return LlamaForCausalLM(text)
    from transformers import (  # They load Pillow, which text does not need.
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    tower = CLIPVisionConfig(
        hidden_size=VISION_WIDTH,
        intermediate_size=4 * VISION_WIDTH,
        num_hidden_layers=vision_layers,
        num_attention_heads=VISION_HEADS,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    architecture = LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=text.pad_token_id,  # Only the start-up check ever writes it.
        image_seq_length=PLACES,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(architecture)
    model.generation_config.eos_token_id = text.eos_token_id
    return model


def character_tokenizer(alphabet: str) -> PreTrainedTokenizerFast:
    """One token per character: ``<pad>`` = 0, ``<eos>`` = 1, then the characters in order.

    Decoding gives back the exact text. A character outside the alphabet raises, because there is no
    unknown token that could hide it.
    """
    tokens = [PAD, EOS, *sorted(set(alphabet))]
    core = Tokenizer(WordLevel({token: index for index, token in enumerate(tokens)}))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()  # the default joins tokens with spaces
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=EOS, clean_up_tokenization_spaces=False
    )
