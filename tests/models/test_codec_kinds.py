"""Prompts, examples and responses over every kind of tokenizer, by the kinds of their faults."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import (
    BOS,
    CHATML,
    EOS,
    EXACT,
    KINDS,
    LETTERS,
    LLAMA2_CHAT,
    WRAPPINGS,
    characters,
    tokenizer_of,
)
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from kimi_core.models import token_text
from kimi_core.models.codec import Codec
from kimi_core.types import Prompt

BOS_ID, EOS_ID = 1, 2
EVERY = [(kind, wrapping) for kind in KINDS for wrapping in WRAPPINGS if "start" not in wrapping]
TEXTS = st.text("".join(LETTERS), min_size=1, max_size=12)
SMALL = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)


def codec_of(kind: str, wrapping: str = "bare", template: str | None = None) -> Codec:
    return Codec(characters() if kind == "characters" else tokenizer_of(kind, wrapping, template))


def ids_of(codec: Codec, text: str) -> list[int]:
    return codec.encode_prompt(Prompt(0, text, "")).tolist()


class TestTextInContext:
    @pytest.mark.parametrize("kind", [*EXACT, "characters"])
    @settings(max_examples=150)
    @given(prompt=TEXTS, response=TEXTS)
    def test_an_example_goes_there_and_back_behind_its_prompt(self, kind, prompt, response):
        """Nothing is added or lost at the border, by our decoding and by the tokenizer's own."""
        codec = codec_of(kind)
        prompt_ids, response_ids = codec.encode_example(prompt, response)
        for again in codec.encode_examples([(prompt, response)] * 2):
            assert list(map(list, again)) == [prompt_ids.tolist(), response_ids.tolist()]
        assert prompt_ids.dtype == response_ids.dtype == np.int32
        assert prompt_ids.tolist() == ids_of(codec, prompt)
        assert codec.response_text(response_ids) == response
        tokenizer = codec._tokenizer
        before, both = (
            tokenizer.decode(ids)
            for ids in (prompt_ids, np.concatenate([prompt_ids, response_ids[:-1]]))
        )
        assert both == before + response

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("text", ["the answer is 42", "return a"])
    def test_words_come_back_also_where_spaces_are_no_tokens(self, kind, text):
        codec = codec_of(kind)
        assert codec.response_text(codec.encode_example("x =", text)[1]) == text

    @pytest.mark.parametrize("kind", [*EXACT, "characters"])
    @pytest.mark.parametrize(
        "text", ["    y = x\n    return y\n", " 56", "56", "\n56", "\t- 1", "  ", "x . y , a 's"]
    )
    def test_spaces_at_the_start_and_before_marks_are_kept(self, kind, text):
        codec = codec_of(kind)
        assert codec.response_text(codec.encode_example("7*8=", text)[1]) == text

    @pytest.mark.parametrize("kind", ["byte-level BPE", "Unigram"])
    def test_a_tokenizer_that_tidies_spaces_does_not_change_a_program(self, kind):
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=KINDS[kind](), eos_token=EOS, clean_up_tokenization_spaces=True
        )
        codec = Codec(tokenizer)
        text = "x = (a . b , c 's )"
        assert codec.response_text(codec.encode_behind("", text)) == text

    @pytest.mark.parametrize("kind", [*KINDS, "characters"])
    def test_tokens_have_the_same_text_on_another_host(self, kind):
        codec, rng = codec_of(kind), np.random.default_rng(0)
        there = token_text.from_json(json.loads(json.dumps(codec.text_as_json())))
        for size in range(60):
            ids = rng.integers(len(codec._tokenizer), size=size % 7).tolist()
            assert there(ids) == codec._text(ids)
        with pytest.raises(ValueError, match="tokenizer cannot be read"):
            token_text.from_json({"tokenizer": "{}", "lead": None})

    def test_digits_behind_a_prompt_get_no_space(self):
        codec = codec_of("SentencePiece, Llama 2")
        _, ids = codec.encode_example("7*8=", "56")
        assert codec._tokenizer.convert_ids_to_tokens(ids.tolist()) == ["5", "6", EOS]

    def test_no_token_reaches_over_the_border(self):
        codec = codec_of("byte-level BPE")
        tokenizer = codec._tokenizer
        joint = tokenizer.encode("the answer")
        for cut in range(1, 10):
            prompt, response = "the answer"[:cut], "the answer"[cut:]
            prompt_ids, response_ids = codec.encode_example(prompt, response)
            assert tokenizer.decode(prompt_ids) == prompt
            assert tokenizer.decode(response_ids[:-1]) == response
        # Where a token ends at the border anyway, the ids are those of the whole text.
        prompt_ids, response_ids = codec.encode_example("the", " answer")
        assert [*prompt_ids, *response_ids[:-1]] == joint

    def test_an_incomplete_character_is_shown_as_broken_and_costs_nothing_else(self):
        for kind in ("byte-level BPE", "SentencePiece, Llama 2"):
            codec = codec_of(kind)
            ids = codec.encode_behind("", "ab漢")[:-1]
            text = codec.response_text(ids)
            assert text.startswith("ab") and set(text[2:]) == {"\ufffd"}

    def test_a_vocabulary_smaller_than_the_model_s(self):
        codec = codec_of("byte-level BPE")
        ids = codec.encode_behind("", "ab").tolist()
        assert codec.response_text([*ids, 10**6, *ids]) == "abab"


class TestSpecialTokens:
    @pytest.mark.parametrize(("kind", "wrapping"), EVERY)
    @settings(max_examples=25)
    @given(text=TEXTS.filter(str.strip))
    def test_a_prompt_has_one_bos_and_no_eos(self, kind, wrapping, text):
        codec = codec_of(kind, wrapping)
        ids = ids_of(codec, text)
        has_bos = "bos" in wrapping
        assert EOS_ID not in ids
        assert ids.count(BOS_ID) == ids[:1].count(BOS_ID) == has_bos
        expected = codec._tokenizer.encode(text, add_special_tokens=False)
        assert ids[has_bos:] == expected

    @pytest.mark.parametrize(("kind", "wrapping"), EVERY)
    def test_many_prompts_get_the_ids_of_each(self, kind, wrapping):
        codec = codec_of(kind, wrapping)
        texts = ["the answer", " 56", BOS + "x", "a" + EOS, "漢é"]
        prompts = [Prompt(number, text, "") for number, text in enumerate(texts)]
        alone = [codec.encode_prompt(prompt).tolist() for prompt in prompts]
        assert [ids.tolist() for ids in codec.encode_prompts(prompts)] == alone

    @pytest.mark.parametrize(("kind", "wrapping"), EVERY)
    @pytest.mark.parametrize("written", [BOS, BOS + BOS])
    def test_a_rendered_prompt_has_one_bos(self, kind, wrapping, written):
        ids = ids_of(codec_of(kind, wrapping), f"{written}a is 42")
        assert ids.count(BOS_ID) == 1 and ids[0] == BOS_ID and EOS_ID not in ids

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_start_of_several_tokens_comes_once(self, kind):
        start = "<s><|im_start|>"
        codec = codec_of(kind, "bos and start")
        expected = codec._tokenizer.convert_tokens_to_ids([BOS, "<|im_start|>"])
        for text in ("a is 42", f"{start}a is 42"):
            ids = ids_of(codec, text)
            assert ids[:2] == expected and not set(ids[2:]) & set(expected)

    @pytest.mark.parametrize(("kind", "wrapping"), EVERY)
    def test_an_example_ends_with_one_eos(self, kind, wrapping):
        prompt_ids, response_ids = codec_of(kind, wrapping).encode_example("x =", "42")
        assert prompt_ids.tolist().count(EOS_ID) == 0
        assert response_ids.tolist().count(EOS_ID) == 1 and response_ids[-1] == EOS_ID
        assert BOS_ID not in response_ids

    def test_a_bos_inside_a_prompt_stays(self):
        """As between the turns of a conversation."""
        codec = codec_of("SentencePiece, Llama 2", "bos")
        assert ids_of(codec, f"a{EOS}{BOS}a").count(BOS_ID) == 2


class TestEndTokens:
    @pytest.fixture
    def model(self):
        return LlamaForCausalLM(LlamaConfig(vocab_size=400, eos_token_id=2, **SMALL))

    @pytest.mark.parametrize(
        ("of_generation", "of_config", "expected"),
        [
            ([0, 7], 2, {0, 2, 7}),
            (7, [8, 9], {2, 7, 8, 9}),
            (None, None, {2}),
            ([], 0, {0, 2}),
            (2, 2, {2}),
        ],
    )
    def test_all_of_tokenizer_generation_config_and_config(
        self, model, of_generation, of_config, expected
    ):
        model.generation_config = GenerationConfig(eos_token_id=of_generation)
        model.config.eos_token_id = of_config
        codec = Codec(tokenizer_of("byte-level BPE"), [], model)
        assert codec.stop_token_ids == expected
        ids = codec.encode_behind("", "ab").tolist()
        for end in expected:
            assert codec.response_text([*ids, end]) == "ab"
        assert codec.encode_example("a", "b")[1][-1] == EOS_ID

    def test_a_tokenizer_without_one(self, model):
        tokenizer = tokenizer_of("byte-level BPE", "eos")
        tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
        with pytest.raises(ValueError, match=r"no end-of-text token: name one in rollout\.stop"):
            Codec(tokenizer)
        model.config.eos_token_id = None
        model.generation_config.eos_token_id = [9, 4]
        codec = Codec(tokenizer, [], model)
        assert codec.stop_token_ids == {4, 9}
        assert codec.encode_example("a", "b")[1][-1] == 9

    def test_what_ends_a_turn_of_the_chat_template(self):
        tokenizer = tokenizer_of("byte-level BPE, Llama 3", "bos", CHATML)
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert Codec(tokenizer).stop_token_ids == {EOS_ID, end}

    def test_a_template_that_does_not_write_the_answer_as_it_is(self):
        template = "{% for m in messages %}<s>{{ m.content | upper }}</s>{% endfor %}"
        tokenizer = tokenizer_of("Unigram", "bare", template)
        assert Codec(tokenizer).stop_token_ids == {EOS_ID}


TALK = (
    {"role": "user", "content": "x = 7*8"},
    {"role": "assistant", "content": "56"},
    {"role": "user", "content": " and a?"},
)
TEMPLATES = {"ChatML": CHATML, "Llama 2": LLAMA2_CHAT}


class TestConversations:
    @pytest.mark.parametrize(("kind", "wrapping"), EVERY)
    @pytest.mark.parametrize("template", TEMPLATES)
    def test_a_prompt_is_what_the_template_writes(self, kind, wrapping, template):
        codec = codec_of(kind, wrapping, TEMPLATES[template])
        ids = codec.encode_prompt(Prompt(0, "", "", messages=TALK)).tolist()
        expected = codec._tokenizer.apply_chat_template(
            list(TALK), add_generation_prompt=True, return_dict=False
        )
        assert ids == expected
        # The same text, rendered beforehand, is the same prompt; BOS apart, if ChatML has none.
        text = codec._tokenizer.apply_chat_template(
            list(TALK), add_generation_prompt=True, tokenize=False
        )
        assert ids_of(codec, text)[-len(ids) :] == ids

    @pytest.mark.parametrize("kind", EXACT)
    @pytest.mark.parametrize("template", TEMPLATES)
    @settings(max_examples=30)
    @given(response=TEXTS)
    def test_an_example_ends_as_the_template_ends_a_turn(self, kind, template, response):
        codec = codec_of(kind, "bos", TEMPLATES[template])
        tokenizer = codec._tokenizer
        prompt_ids, ids = codec.encode_example(TALK, response)
        assert prompt_ids.tolist() == codec.encode_prompt(Prompt(0, "", "", messages=TALK)).tolist()
        end = "<|im_end|>" if template == "ChatML" else EOS
        assert tokenizer.convert_ids_to_tokens(int(ids[-1])) == end
        padded = f" {response} " if template == "Llama 2" and response.strip() else response
        assert codec.response_text(ids) == padded

    def test_no_template_and_a_refusal_are_named(self):
        with pytest.raises(ValueError, match=r"Prompt 3 is a conversation.*has no chat template"):
            codec_of("Unigram").encode_prompt(Prompt(3, "", "", messages=TALK))
        codec = codec_of("Unigram", "bos", LLAMA2_CHAT)
        talk = ({"role": "system", "content": "Be brief."}, *TALK)
        with pytest.raises(ValueError, match=r"Prompt 3 .*roles system, user.*not supported"):
            codec.encode_prompt(Prompt(3, "", "", messages=talk))

    def test_a_template_that_drops_thoughts(self):
        """Its generation prompt is not what stands before an answer of the past."""
        template = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
        codec = codec_of("byte-level BPE", "bare", template)
        prompt_ids, ids = codec.encode_example(TALK, "7 \n</think> 56")
        assert codec._tokenizer.decode(prompt_ids).endswith("assistant\n<think>\n")
        assert codec.response_text(ids) == "7 \n</think> 56"
