"""A small Llama with random weights, and tokenizers for it: of characters, or trained on a text.

With ``vision_layers`` it becomes a small LLaVA: a CLIP tower and a projector in front of the Llama.
"""

from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from tokenizers.trainers import BpeTrainer
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

CHAT = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""The chat template of a scratch model whose prompts are conversations."""


def scratch_model(
    config: ModelConfig, alphabet: str, seed: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Make a small Llama with random weights, tied embeddings and one token per character.

    Args:
        alphabet: every character that the model must know; order and repeats do not matter.
        seed: as for `scratch_llama`.

    Raises:
        ValueError: the alphabet is empty, or the device does not exist.
    """
    tokenizer = character_tokenizer(alphabet)
    return scratch_llama(config, tokenizer, seed), tokenizer


def scratch_llama(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int
) -> PreTrainedModel:
    """Make a small Llama with random weights and tied embeddings for a tokenizer.

    Args:
        seed: seed of the weights, which are the same on every device. torch's own generator is
            not touched.

    Raises:
        ValueError: the device does not exist.
    """
    place = device_of(config.device)
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
    return model.to(device=place, dtype=dtype_of(config.dtype, place)).eval()


def _causal_lm(text: LlamaConfig, vision_layers: int) -> PreTrainedModel:
    if not vision_layers:
        return LlamaForCausalLM(text)
    from transformers import (  # Slow to load.
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

    Raises:
        ValueError: the alphabet is empty, or has half of a surrogate pair.
    """
    if not alphabet:
        raise ValueError(
            "A scratch model needs an alphabet: the characters of all prompts and answers"
        )
    if halves := sorted({one for one in alphabet if "\ud800" <= one <= "\udfff"}):
        raise ValueError(
            f"The text has {halves[0]!r}, half of a surrogate pair, which is no character: mend "
            "the source of the text"
        )
    tokens = [PAD, EOS, *sorted(set(alphabet))]
    core = Tokenizer(WordLevel({token: index for index, token in enumerate(tokens)}))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()  # the default joins tokens with spaces
    return tokenizer_of(core)


def trained_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most ``size`` tokens, trained on ``texts``; it can write any text.

    ``<pad>`` = 0 and ``<eos>`` = 1, then the 256 bytes, then the merges, the most frequent first.
    A digit is always a token. The same texts give the same tokenizer.

    Raises:
        ValueError: a text has half of a surrogate pair.
    """
    core = Tokenizer(BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=size,
        special_tokens=[PAD, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    try:
        core.train_from_iterator(texts, trainer)
    except UnicodeEncodeError as error:
        raise ValueError(
            f"The text {error.object!r:.80} has half of a surrogate pair, which is no character: "
            "mend the source of the text"
        ) from error
    return tokenizer_of(core)


def tokenizer_of(core: Tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer of this module as transformers takes it.

    As with other models, ``<eos>`` in a text is the special token, so that what a model has written
    can always be tokenized.
    """
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
    )
