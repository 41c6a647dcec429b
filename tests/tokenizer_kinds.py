"""Small tokenizers of the kinds that models come with, trained here on a few lines."""

import json
from collections.abc import Callable
from functools import cache

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from kimi_core.models.scratch import character_tokenizer

LINES = [
    "    y = x\n    return y\n",
    "def f(a, b):\n\treturn a * b - 17\n\n",
    "the answer is 42. 7*8=56, 12+30=42; that's all\n",
    "$5 + 3 = 8$ and x_1 #8\n",
    "naïve café 漢字 π ≈ 3.14 🙂 e\u0301\n",
] * 20
LETTERS = sorted(set("".join(LINES)))
BOS, EOS, UNK = "<s>", "</s>", "<unk>"
SPECIAL = [UNK, BOS, EOS]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2_CHAT = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + "
    "' [/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('System role not supported') }}{% endif %}{% endfor %}"
)


def byte_level(pattern: str | None = None) -> Tokenizer:
    """GPT-2's kind; with ``pattern`` that of Llama 3 and Qwen, which cut digits and words so."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pattern:
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        LINES,
        trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet),
    )
    core.decoder = decoders.ByteLevel()
    return core


def llama_3() -> Tokenizer:
    return byte_level(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


def llama_2() -> Tokenizer:
    """SentencePiece BPE: a space is put before a text, unknown characters fall back to bytes."""
    core = Tokenizer(models.BPE(unk_token=UNK))
    core.normalizer = normalizers.Replace(" ", "▁")
    # Digits stay single, and these characters are not in the vocabulary.
    plain = [line.translate(dict.fromkeys(map(ord, "漢字π🙂\n\t"))) for line in LINES]
    core.pre_tokenizer = pre_tokenizers.Digits(individual_digits=True)
    core.train_from_iterator(plain, trainers.BpeTrainer(vocab_size=150, special_tokens=SPECIAL))
    vocabulary = core.get_vocab()
    for token in BYTES:
        vocabulary[token] = len(vocabulary)
    merges = [tuple(pair) for pair in _merges(core)]
    core = Tokenizer(
        models.BPE(vocabulary, merges, unk_token=UNK, byte_fallback=True, fuse_unk=True)
    )
    core.add_special_tokens(SPECIAL)
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return core


def _merges(core: Tokenizer) -> list[list[str]]:
    found = json.loads(core.to_str())["model"]["merges"]
    return [one if isinstance(one, list) else one.split(" ") for one in found]


def metaspace(scheme: str) -> Tokenizer:
    """BPE whose words begin with ▁, also at the start of a text ("first") or of every piece."""
    core = Tokenizer(models.BPE(unk_token=UNK))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    core.train_from_iterator(
        LINES,
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=SPECIAL, initial_alphabet=[*LETTERS, "▁"]
        ),
    )
    core.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return core


def unigram() -> Tokenizer:
    """T5's kind, without its loss of spaces."""
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    core.train_from_iterator(
        LINES,
        trainers.UnigramTrainer(
            vocab_size=260,
            special_tokens=SPECIAL,
            unk_token=UNK,
            initial_alphabet=[*LETTERS, "▁"],
        ),
    )
    core.decoder = decoders.Metaspace(prepend_scheme="always")
    return core


def word_piece() -> Tokenizer:
    """BERT's kind: it writes a space between any two words, whatever the text had."""
    core = Tokenizer(models.WordPiece(unk_token=UNK))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.train_from_iterator(
        LINES,
        trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=LETTERS),
    )
    core.decoder = decoders.WordPiece(cleanup=False)
    return core


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level BPE": byte_level,
    "byte-level BPE, Llama 3": llama_3,
    "SentencePiece, Llama 2": llama_2,
    "Metaspace, first": lambda: metaspace("first"),
    "Metaspace, always": lambda: metaspace("always"),
    "Unigram": unigram,
    "WordPiece": word_piece,
}
EXACT = [name for name in KINDS if name != "WordPiece"]
"""Kinds that can write any text; all but Llama 2's know only the characters of ``LETTERS``."""

START = "<|im_start|>"
WRAPPINGS = {
    "bare": "$A",
    "bos": f"{BOS} $A",
    "bos and eos": f"{BOS} $A {EOS}",
    "eos": f"$A {EOS}",
    "bos and start": f"{BOS} {START} $A",
}
"""What a tokenizer puts around a text."""


@cache
def tokenizer_of(
    kind: str, wrapping: str = "bare", template: str | None = None
) -> PreTrainedTokenizerFast:
    """Every kind has the special tokens <unk> 0, <s> 1 and </s> 2."""
    core = KINDS[kind]()
    core.add_special_tokens([AddedToken(one) for one in (START, "<|im_end|>")])
    start = core.token_to_id(START)
    core.post_processor = processors.TemplateProcessing(
        single=WRAPPINGS[wrapping], special_tokens=[(BOS, 1), (EOS, 2), (START, start)]
    )
    found = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=BOS, eos_token=EOS, unk_token=UNK
    )
    found.chat_template = template
    return found


def characters() -> PreTrainedTokenizerFast:
    return character_tokenizer("".join(LETTERS))
