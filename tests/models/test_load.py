"""Loading models from folders and from the hub."""

import string

import pytest
import torch

from kimi_core.config import ModelConfig
from kimi_core.models.load import load_model, load_pretrained
from kimi_core.models.scratch import scratch_model
from kimi_core.models.smollm2 import ModelUnavailable

ALPHABET = string.digits + "+-*=#;? \n\té漢"
SMALL = ModelConfig(scratch={"layers": 3, "width": 16, "heads": 2, "context": 32}, device="cpu")


@pytest.fixture
def saved(tmp_path):
    """A small model in Hugging Face format, to be damaged."""
    for part in scratch_model(SMALL, ALPHABET, seed=0):
        part.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


class TestFolder:
    def test_what_was_saved_comes_back(self, saved):
        model, tokenizer = scratch_model(SMALL, ALPHABET, seed=0)
        again, tokenizer_again = load_pretrained(str(saved), device="cpu")
        ids = tokenizer("1+1=2\n#é", return_tensors="pt")["input_ids"]
        assert torch.equal(tokenizer_again("1+1=2\n#é", return_tensors="pt")["input_ids"], ids)
        assert tokenizer_again.decode(ids[0]) == "1+1=2\n#é"
        assert (tokenizer_again.pad_token_id, tokenizer_again.eos_token_id) == (0, 1)
        assert torch.equal(again(ids).logits, model(ids).logits)

    @pytest.mark.parametrize("gone", ["config.json", "model.safetensors", "tokenizer.json"])
    def test_missing_file(self, saved, gone):
        (saved / gone).unlink()
        with pytest.raises(ValueError, match=r"holds .*; expected config\.json, \*\.safetensors"):
            load_pretrained(str(saved))

    def test_empty_folder(self, tmp_path):
        with pytest.raises(ValueError, match="holds nothing; expected"):
            load_pretrained(str(tmp_path))

    def test_no_folder(self):
        with pytest.raises(ValueError, match=r"No model folder \./runs/gone/model"):
            load_pretrained("./runs/gone/model")

    def test_truncated_weights(self, saved):
        weights = saved / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        with pytest.raises(ValueError, match="Cannot load the model in"):
            load_pretrained(str(saved))

    def test_lacking_weights_are_not_filled_with_random_numbers(self, saved):
        from safetensors.torch import load_file, save_file

        weights = load_file(saved / "model.safetensors")
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"lacks 1 weights, model\.layers\.1\.mlp\.up_proj"):
            load_pretrained(str(saved))

    def test_unknown_dtype(self, saved):
        with pytest.raises(ValueError, match="'float8'; allowed are auto, float32, bfloat16"):
            load_pretrained(str(saved), dtype="float8")

    def test_unknown_device(self, saved):
        with pytest.raises(ValueError, match="'gpu'; allowed are auto, cpu, cuda"):
            load_pretrained(str(saved), device="gpu")

    def test_gpu_that_is_not_there(self, saved):
        with pytest.raises(ValueError, match=r"'cuda:63': torch sees \d+ GPUs here"):
            load_pretrained(str(saved), device="cuda:63")


def test_hub_without_a_network_says_what_else_there_is(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # Else it tries for 20 s.
    with pytest.raises(ModelUnavailable, match=r"'someone/model' from the Hugging Face hub: We c"):
        load_model(ModelConfig(name="someone/model"))
