"""The bound on tokens: no text has more, and none that is bounded fails."""

import json
import unicodedata
from collections.abc import Iterable
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_kinds import BYTES, EOS, KINDS, SPECIAL, characters, tokenizer_of
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kimi_core.models.codec import Codec
from kimi_core.models.token_bound import EXPANSION, TokenBound, token_bound
from kimi_core.prompts.many import CONTROL, bytes_of
from kimi_core.types import Prompt

EXPANDING = "\ufdfa\u0344\ufb2c\U0001d160\u2581▁ \n\té漢🙂\u1fb7ẛ̣"
texts = st.text(
    st.one_of(
        st.sampled_from([*EXPANDING, *"abc 019=.'\n\0\r"]),
        st.characters(exclude_categories=["Cs"]),
    ),
    min_size=1,
    max_size=60,
)
with_special = st.lists(st.one_of(texts, st.sampled_from([*SPECIAL, "<|im_start|>"])), min_size=1)


def byte_level(normalizer=None, cuts=(), *, space=False) -> Tokenizer:
    core = KINDS["byte-level BPE"]()
    core.normalizer = normalizer
    last = pre_tokenizers.ByteLevel(add_prefix_space=space)
    core.pre_tokenizer = pre_tokenizers.Sequence([*cuts, last])
    return core


def byte_fallback(*steps, pre_tokenizer=None) -> Tokenizer:
    """Its vocabulary has few characters, so that most become bytes."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *BYTES, *"abc 01"])}
    core = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    core.add_special_tokens(SPECIAL)
    core.normalizer = normalizers.Sequence(list(steps))
    if pre_tokenizer is not None:
        core.pre_tokenizer = pre_tokenizer
    return core


def without(core: Tokenizer, tokens: Iterable[str]) -> Tokenizer:
    """A tokenizer that lacks some tokens, and all merges."""
    parts = json.loads(core.to_str())
    for token in tokens:
        del parts["model"]["vocab"][token]
    parts["model"]["merges"] = []
    return Tokenizer.from_str(json.dumps(parts))


BOUNDED = {
    "bytes": byte_level,
    "bytes, some without a token": lambda: without(byte_level(), "ĀčñðÃÿ"),
    "NFC": lambda: byte_level(normalizers.NFC()),
    "NFKC": lambda: byte_level(normalizers.NFKC()),
    "NFKD, then NFC": lambda: byte_level(
        normalizers.Sequence([normalizers.NFKD(), normalizers.NFC()])
    ),
    "a space before each piece": lambda: byte_level(
        cuts=[pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")], space=True
    ),
    "digits": lambda: byte_level(cuts=[pre_tokenizers.Digits(individual_digits=True)]),
    "Llama 2": KINDS["SentencePiece, Llama 2"],
    "fallback": byte_fallback,
    "fallback, NFKC": lambda: byte_fallback(normalizers.NFKC()),
    "fallback, prepended": lambda: byte_fallback(
        normalizers.NFD(), normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")
    ),
    "fallback, replaced": lambda: byte_fallback(
        normalizers.Replace("a", "bcb"), normalizers.Replace("b", "▁é")
    ),
    "fallback, Metaspace": lambda: byte_fallback(
        pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="always")
    ),
}


@cache
def bounded(name: str) -> tuple[Codec, TokenBound]:
    core = BOUNDED[name]()
    core.add_special_tokens(["<|im_start|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=EOS)
    bound = token_bound(tokenizer)
    assert bound is not None
    return Codec(tokenizer), bound


@pytest.mark.parametrize("name", BOUNDED)
@given(with_special)
def test_a_text_has_at_most_as_many_tokens_as_the_bound_says(name, parts):
    codec, bound = bounded(name)
    text = "".join(parts)
    size = bytes_of(text)
    [most] = codec.most_tokens(np.array([size]))
    if not text.strip(CONTROL):
        assert size == most == -1
        return
    assert most == bound.factor * len(text.encode()) + bound.extra
    assert 1 <= len(codec.encode_prompt(Prompt(0, text, ""))) <= most


@pytest.mark.parametrize(
    ("name", "factor"),
    [("bytes", 1), ("NFC", 3), ("NFKC", 11), ("a space before each piece", 2), ("Llama 2", 2)],
)
def test_the_usual_tokenizers_have_a_useful_bound(name, factor):
    assert bounded(name)[1].factor == factor


@pytest.mark.parametrize("form", EXPANSION)
@pytest.mark.nightly
def test_a_form_lengthens_no_character_more_than_the_table_says(form):
    chars = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    normalizer = getattr(normalizers, form)()
    for expand in (lambda c: unicodedata.normalize(form, c), normalizer.normalize_str):
        most = max(len(expand(c).encode()) / len(c.encode()) for c in chars)
        assert most == EXPANSION[form]


def test_composing_two_characters_never_takes_more_bytes():
    # So a whole text grows no more than its characters do.
    for i in range(0x110000):
        parts = unicodedata.decomposition(chr(i)).split()
        if len(parts) == 2 and parts[0][0] != "<":
            pair = "".join(chr(int(one, 16)) for one in parts)
            assert len(chr(i).encode()) <= len(pair.encode())


def test_special_tokens_before_a_text_count():
    codec = Codec(tokenizer_of("byte-level BPE", "bos"))
    assert len(codec.encode_prompt(Prompt(0, "\n", ""))) == 2
    assert codec.most_tokens(np.array([1])) == [2]


def test_what_has_no_bytes_is_left_to_the_tokenizer():
    assert bounded("bytes")[0].most_tokens(np.array([-1, 0])).tolist() == [-1, -1]


UNBOUNDED = {
    "a step that drops": lambda: byte_level(normalizers.Strip()),
    "a pattern that may insert": lambda: byte_level(normalizers.Replace(Regex("a?"), "bb")),
    "lower case": lambda: byte_level(normalizers.Lowercase()),
    "a cut that removes": lambda: byte_level(cuts=[pre_tokenizers.Split(" ", "removed")]),
    "a form behind a replacement": lambda: byte_fallback(
        normalizers.Replace("a", "\ufdfa"), normalizers.NFKC()
    ),
    "nothing in place of something": lambda: byte_fallback(normalizers.Replace("a", "")),
    "a fallback without a byte": lambda: without(byte_fallback(), BYTES[-1:]),
    "a letter without a token": lambda: without(byte_level(), "a"),
    "a middle byte without a token": lambda: without(byte_level(), "¡"),
    "Unigram": KINDS["Unigram"],
    "WordPiece": KINDS["WordPiece"],
    "BPE with an unknown token": KINDS["Metaspace, first"],
}


@pytest.mark.parametrize("name", UNBOUNDED)
def test_what_is_not_certain_has_no_bound(name):
    assert token_bound(PreTrainedTokenizerFast(tokenizer_object=UNBOUNDED[name]())) is None


def test_neither_has_a_model_of_characters_or_a_tokenizer_with_code_of_its_own():
    class Mine(PreTrainedTokenizerFast):
        def encode(self, text, **_):
            return [1, 2, 3] * len(text)

    assert token_bound(characters()) is None
    assert token_bound(Mine(tokenizer_object=byte_level())) is None
