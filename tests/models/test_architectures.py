"""Architectures of transformers, built tiny: right to 2e-5 nats in float32, or refused at once."""

import pytest
import torch
from sweep_architectures import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, build, sweep, trainer_error
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from kimi_core.models.switches import length_to_check
from kimi_core.trainer.policy import Policy

WINDOWS = ("mistral", "gemma2", "gemma3_text", "gpt_oss", "qwen3", "phi3", "cohere2", "olmo3")
ALONE = ("gpt_oss", "biogpt", "mpt")


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_and_original_contexts(name):
    """Responses are longer than the window of 10, in the engine's cache and in packed rows."""
    (outcome,) = sweep([name])
    assert not outcome.unbuilt and not outcome.refused
    assert outcome.right, outcome


@pytest.mark.parametrize("name", ALONE)
def test_models_that_cannot_tell_packed_sequences_apart_get_a_row_each(name):
    error, layout = trainer_error(build(name))
    assert error <= 2e-5 and layout == "alone"


def test_one_that_positions_do_not_help_can_be_told_where_sequences_begin():
    error, layout = trainer_error(build("opt"))
    assert error <= 2e-5 and layout == "end_to_end"


@pytest.mark.parametrize("name", ["bert", "llama4_text", "mamba", "bloom", "xlm"])
def test_others_are_refused_before_anything_is_trained(name):
    (outcome,) = sweep([name])
    assert outcome.refused


@pytest.mark.nightly
def test_all_that_can_be_built():
    outcomes = [one for one in sweep(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)) if not one.unbuilt]
    assert [one for one in outcomes if not one.right] == []
    assert sum(not one.refused for one in outcomes) >= 40


def test_the_check_crosses_what_a_run_crosses_and_no_more():
    shape = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 500}
    config = LlamaConfig(
        **shape,
        num_attention_heads=2,
        max_position_embeddings=2000,
        rope_parameters={"rope_theta": 1e4, **rope},
    )
    model = LlamaForCausalLM(config)
    assert length_to_check(model, None) == 504
    assert length_to_check(model, 100) == 12
    assert length_to_check(model, 501) == length_to_check(model, 5000) == 504
    assert length_to_check(LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2)), 9) == 12


def test_a_model_that_sees_padding_is_refused():
    class Leaky(torch.nn.Module):
        """A final norm that adds the mean over the row, padding included."""

        def __init__(self, norm):
            super().__init__()
            self.norm = norm

        def forward(self, hidden):
            hidden = self.norm(hidden)
            return hidden + hidden.mean(1, keepdim=True)

    model = build("llama")
    model.model.norm = Leaky(model.model.norm)
    with pytest.raises(ValueError, match="what else is in the batch"):
        Policy(model, temperature=1.0, head_chunk=64)


def test_a_rope_that_follows_the_longest_sequence_of_a_batch_is_refused():
    longrope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    config = Phi3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        original_max_position_embeddings=24,
        rope_parameters={"rope_theta": 1e4, "original_max_position_embeddings": 24, **longrope},
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = Phi3ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)
    with pytest.raises(ValueError, match="what else is in the batch"):
        Policy(model, temperature=1.0, head_chunk=64)
    assert Policy(model, temperature=1.0, head_chunk=64, longest=20).layout != "alone"


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "biogpt"])
def test_the_check_is_right_in_16_bits_too(name):
    """Rounding alone is no fault, and sequences that see each other are found."""
    policy = Policy(build(name).bfloat16(), temperature=1.0, head_chunk=64)
    assert (policy.layout == "alone") is (name != "llama")
