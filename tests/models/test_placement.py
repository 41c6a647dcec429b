"""Which parameters train, and how many threads they get."""

import string

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from kimi_core.config import ModelConfig
from kimi_core.models.placement import freeze_below, limit_threads
from kimi_core.models.scratch import scratch_model

ALPHABET = string.digits + "+-*=#;? \n\té漢"
SMALL = ModelConfig(scratch={"layers": 3, "width": 16, "heads": 2, "context": 32}, device="cpu")


class TestFreeze:
    def trainable(self, model):
        return {name for name, weight in model.named_parameters() if weight.requires_grad}

    def test_only_the_top_and_the_norm_train(self):
        model, _ = scratch_model(SMALL, "ab", 0)
        freeze_below(model, 2)
        names = self.trainable(model)
        assert "model.norm.weight" in names
        assert {name.split(".")[2] for name in names if "layers" in name} == {"1", "2"}
        assert "model.embed_tokens.weight" not in names

    def test_unset_trains_everything(self):
        model, _ = scratch_model(SMALL, "ab", 0)
        freeze_below(model, 1)
        freeze_below(model, None)
        assert self.trainable(model) == {name for name, _ in model.named_parameters()}

    @pytest.mark.parametrize("count", [0, 4])
    def test_count_out_of_range(self, count):
        model, _ = scratch_model(SMALL, "ab", 0)
        with pytest.raises(ValueError, match=f"= {count}: the model has 3 layers; give 1 to 3"):
            freeze_below(model, count)
        assert self.trainable(model)  # a refused call changes nothing

    def test_a_model_laid_out_otherwise(self):
        model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=8))
        with pytest.raises(ValueError, match="Cannot freeze layers of GPT2LMHeadModel"):
            freeze_below(model, 1)


@pytest.mark.parametrize(
    ("parameters", "asked", "expected"), [(10**5, None, 1), (10**7, None, 2), (10**5, "2", 2)]
)
def test_small_models_run_on_one_thread_unless_told_otherwise(
    monkeypatch, parameters, asked, expected
):
    model, _ = scratch_model(SMALL, ALPHABET, seed=0)
    monkeypatch.setattr(model, "num_parameters", lambda: parameters)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        limit_threads(model)
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)
