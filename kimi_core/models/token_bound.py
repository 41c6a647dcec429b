"""How many tokens a text can have, from its bytes, for the tokenizers where that is certain.

Two kinds of BPE write any text, and start from pieces that are at least a byte long. Merges only
make tokens fewer.

* **Byte-level** (GPT-2, Llama 3, Qwen, SmolLM2): a byte is a token, or vanishes. The bytes of all
  characters but control characters must have tokens, except for the first byte of a longer
  character; SmolLM2 lacks a few.
* **Byte fallback** (Llama 2, Mistral, Gemma): a character is one token, or one for each byte.

What comes before the BPE may make a text longer: a Unicode form, by up to the factors of
``EXPANSION``; a space that is put before each piece; a replacement. Each step multiplies the bound.
A special token in the text takes at least one byte and is one token.

All else has no bound here: characters without a token that raise or vanish, steps that drop text,
tokenizers with code of their own, and every step whose effect is not known.
"""

import json
from collections.abc import Container, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

EXPANSION = {"NFC": 3, "NFD": 3, "NFKC": 11, "NFKD": 11}
"""Greatest growth of a text in UTF-8 (Unicode Standard Annex 15, table 8; a test compares)."""

CUTS = ("Split", "Digits", "Punctuation")
"""Pre-tokenizers that only cut a text, unless their behaviour is to remove what they find."""


def _byte_chars(needed: Container[int]) -> Iterator[str]:
    """What stands for a byte in a byte-level vocabulary, for the bytes that are needed."""
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = count(0x100)
    for byte in range(0x100):
        char = chr(byte if byte in printing else next(others))
        if byte in needed:
            yield char


BYTE_CHARS = frozenset(_byte_chars({*range(0x20, 0x7F), *range(0x80, 0xC0)}))
"""For ASCII characters that are no control characters, and for the bytes that follow the first one
of all other characters."""

BYTE_TOKENS = {f"<0x{byte:02X}>" for byte in range(256)}


@dataclass(frozen=True)
class TokenBound:
    """A text of n bytes in UTF-8 has from 1 to ``factor * n + extra`` tokens, if at least one of
    its characters is not an ASCII control character."""

    factor: int
    extra: int


def token_bound(tokenizer: PreTrainedTokenizerBase) -> TokenBound | None:
    """The bound, without special tokens that are put around a text; None: none is certain."""
    if not _is_plain(tokenizer):
        return None
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    model = parts["model"]
    if model["type"] != "BPE" or model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        return None
    vocabulary = model["vocab"].keys()
    normalizers = _flat(parts["normalizer"], "normalizers")
    cuts = _flat(parts["pre_tokenizer"], "pretokenizers")
    factors: list[int | None]
    if cuts and cuts[-1]["type"] == "ByteLevel":
        *cuts, last = cuts
        if model["byte_fallback"] or not BYTE_CHARS.issubset(vocabulary):
            return None
        factors = [EXPANSION.get(one["type"]) for one in normalizers]
        factors.append(1 + last["add_prefix_space"])
        factors += [1 if _only_cuts(one) else None for one in cuts]
    elif model["byte_fallback"] and vocabulary >= BYTE_TOKENS:
        forms = [one for one in normalizers if one["type"] in EXPANSION]
        if normalizers[: len(forms)] != forms:  # A form may expand what another step put there.
            return None
        factors = [EXPANSION[one["type"]] for one in forms]
        factors += [_growth(one, vocabulary) for one in [*normalizers[len(forms) :], *cuts]]
    else:
        return None
    whole = 1
    for factor in factors:
        if factor is None:
            return None
        whole *= factor
    return TokenBound(whole, whole - 1)


def _is_plain(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizers library does all the work."""
    kind = type(tokenizer)
    return (
        isinstance(tokenizer, PreTrainedTokenizerFast)
        and kind.__call__ is PreTrainedTokenizerBase.__call__
        and kind.encode is PreTrainedTokenizerBase.encode
        and kind._encode_plus is PreTrainedTokenizerFast._encode_plus
    )


def _flat(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or a pre-tokenizer in order."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [one for inner in part[key] for one in _flat(inner, key)]


def _only_cuts(step: dict[str, Any]) -> bool:
    return step["type"] in CUTS and step.get("behavior") != "Removed"


def _growth(step: dict[str, Any], vocabulary: Any) -> int | None:
    """Factor by which a step before a BPE with byte fallback can multiply the tokens.

    Tokens are counted as if no merge were done: one for a character of the vocabulary, or one for
    each of its bytes. So each character has at least one.
    """

    def tokens(text: str) -> int:
        return sum(1 if char in vocabulary else len(char.encode()) for char in text)

    if _only_cuts(step):
        return 1
    if step["type"] == "Prepend":  # Before each stretch between special tokens.
        return 1 + tokens(step["prepend"])
    if step["type"] == "Replace":
        old, new = step["pattern"].get("String"), step["content"]
        return max(1, -(-tokens(new) // len(old))) if old and new else None
    if step["type"] == "Metaspace":
        mark = tokens(step["replacement"])
        return mark * (1 if step["prepend_scheme"] == "never" else 1 + mark)
    return None
