"""Models from scratch, and their tokenizer of one token per character."""

import string

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from kimi_core.config import ModelConfig
from kimi_core.models.load import load_model
from kimi_core.models.scratch import character_tokenizer, scratch_model, trained_tokenizer

ALPHABET = string.digits + "+-*=#;? \n\té漢"
SMALL = ModelConfig(scratch={"layers": 3, "width": 16, "heads": 2, "context": 32}, device="cpu")


class TestCharacterTokenizer:
    @given(st.text(ALPHABET, max_size=50))
    def test_round_trip(self, text):
        tokenizer = character_tokenizer(ALPHABET)
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text)
        assert tokenizer.decode(ids) == text

    def test_ids(self):
        tokenizer = character_tokenizer("baab")
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) == (
            0,
            1,
            4,
        )
        assert tokenizer("ab")["input_ids"] == [2, 3]
        assert tokenizer.decode([3, 2, 1, 0], skip_special_tokens=True) == "ba"

    def test_unknown_character_raises(self):
        with pytest.raises(Exception, match="UNK"):
            character_tokenizer("ab")("abc")

    def test_special_tokens_that_a_model_wrote_are_read_back(self, tmp_path):
        tokenizer = character_tokenizer("ab")
        tokenizer.save_pretrained(tmp_path)
        for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
            assert one.encode(one.decode([2, 0, 3, 1])) == [2, 0, 3, 1]

    def test_half_of_a_surrogate_pair_is_refused(self):
        with pytest.raises(ValueError, match=r"has '\\ud800', half of a surrogate pair"):
            character_tokenizer("ab\ud800")


class TestTrainedTokenizer:
    PROSE = ("The cat sat on the mat. " * 20, "There were 12 cats and 345 mats.")

    @given(st.text(st.characters(exclude_categories=["Cs"]), max_size=50))
    def test_any_text_goes_there_and_back(self, text):
        tokenizer = trained_tokenizer(self.PROSE, 300)
        assert tokenizer.decode(tokenizer.encode(text)) == text

    def test_prose_takes_fewer_tokens_and_digits_stay_apart(self):
        tokenizer = trained_tokenizer(self.PROSE, 300)
        assert 258 < len(tokenizer) <= 300
        assert len(tokenizer.encode("The cat sat on the mat. ")) <= 8
        assert len(tokenizer.encode("345")) == 3
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)

    def test_the_same_texts_give_the_same_tokenizer(self):
        def text():
            return trained_tokenizer(iter(self.PROSE), 300).backend_tokenizer.to_str()

        assert text() == text()

    def test_half_of_a_surrogate_pair_is_refused(self):
        with pytest.raises(ValueError, match="half of a surrogate pair"):
            trained_tokenizer(["ab\ud800"], 300)


class TestScratch:
    def test_shape(self):
        model, tokenizer = load_model(SMALL, alphabet=ALPHABET, seed=0)
        config = model.config
        assert (
            config.num_hidden_layers,
            config.hidden_size,
            config.intermediate_size,
        ) == ((3, 16, 64))
        assert config.max_position_embeddings == 32
        assert config.vocab_size == len(tokenizer)
        assert (config.pad_token_id, config.eos_token_id) == (0, 1)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert not model.training

    def test_only_the_seed_decides(self):
        def weights(alphabet, seed):
            return scratch_model(SMALL, alphabet, seed)[0].model.embed_tokens.weight

        torch.manual_seed(5)
        expected_next = torch.rand(3)
        torch.manual_seed(5)
        first = weights("abc", 0)
        assert torch.equal(torch.rand(3), expected_next)  # torch's own generator was left alone
        assert torch.equal(first, weights("cba", 0))
        assert not torch.equal(first, weights("abc", 1))

    def test_needs_an_alphabet(self):
        with pytest.raises(ValueError, match="needs an alphabet"):
            load_model(SMALL)

    def test_dtype(self):
        config = SMALL.model_copy(update={"dtype": "bfloat16"})
        assert scratch_model(config, "ab", 0)[0].dtype == torch.bfloat16
        assert scratch_model(SMALL, "ab", 0)[0].dtype == torch.float32
