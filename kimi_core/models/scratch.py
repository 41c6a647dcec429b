"""A small Llama with random weights, and a tokenizer with one token per character."""

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
        model: Any = LlamaForCausalLM(architecture)
    return model.to(device=place, dtype=dtype_of(config.dtype, place)).eval(), tokenizer


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
