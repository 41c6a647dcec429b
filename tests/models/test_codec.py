"""Text to tokens and back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_core.models.codec import Codec
from kimi_core.models.scratch import character_tokenizer
from kimi_core.types import Prompt

LETTERS = "abc#= \n"
CODEC = Codec(character_tokenizer(LETTERS), [])
EOS = 1

texts = st.text(LETTERS, min_size=1)


@given(texts, texts)
def test_text_goes_there_and_back(prompt, response):
    prompt_ids, response_ids = CODEC.encode_example(prompt, response)
    assert prompt_ids.dtype == response_ids.dtype == np.int32
    assert prompt_ids.tolist() == CODEC.encode_prompt(Prompt(0, prompt, "")).tolist()
    assert response_ids[-1] == EOS
    assert CODEC.response_text(prompt_ids) == prompt
    assert CODEC.response_text(response_ids) == response
    assert CODEC.response_text(response_ids[:-1]) == response


def test_of_many_examples_the_one_at_fault_is_named():
    examples = [("a", "b"), ("ab", "axb"), ("b", "a")]
    with pytest.raises(ValueError, match=r"An SFT response \('axb'\) cannot be tokenized.*'x'"):
        CODEC.encode_examples(examples)
    assert len(CODEC.encode_examples(examples[:1])) == 1


def test_an_empty_response_has_no_text():
    assert CODEC.response_text(np.array([], np.int32)) == ""
    assert CODEC.response_text(np.array([EOS], np.int32)) == ""


def test_only_the_token_that_ended_a_response_is_left_out():
    ids = np.array([EOS, 2, EOS], np.int32)
    assert CODEC.response_text(ids) == "<eos>\n"


def test_a_stop_string_ends_a_response_besides_end_of_text():
    codec = Codec(character_tokenizer(LETTERS), ["\n", "#"])
    newline, hash_sign = codec.encode_prompt(Prompt(0, "\n#", "")).tolist()
    assert codec.stop_token_ids == {EOS, newline, hash_sign}
    assert codec.response_text(codec.encode_prompt(Prompt(0, "ab\n", ""))) == "ab"


def test_a_stop_string_of_more_tokens_ends_the_text_and_an_empty_one_is_refused():
    codec = Codec(character_tokenizer(LETTERS), ["ab", "漢"])
    assert codec.stop_token_ids == {EOS}
    assert codec.response_text(codec.encode_prompt(Prompt(0, "bacab=", ""))) == "bac"
    with pytest.raises(ValueError, match=r"rollout.stop = \['a', ''\]: each string needs"):
        Codec(character_tokenizer(LETTERS), ["a", ""])


def test_without_any_end_there_must_be_a_stop_string():
    tokenizer = character_tokenizer(LETTERS)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"name one in rollout.stop"):
        Codec(tokenizer, [])
    assert len(Codec(tokenizer, ["#"]).stop_token_ids) == 1
    with pytest.raises(ValueError, match="SFT needs a tokenizer with an end-of-text token"):
        Codec(tokenizer, ["#"]).encode_example("a", "b")


@pytest.mark.parametrize(
    ("text", "message"),
    [("", r"Prompt 7 \(''\) has no tokens"), ("axb", r"Prompt 7 \('axb'\) cannot be tokenized")],
)
def test_a_prompt_that_is_no_tokens_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        CODEC.encode_prompt(Prompt(7, text, ""))
