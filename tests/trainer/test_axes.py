"""Axes of a trainer's ranks that cannot divide a model: each error names the setting."""

import pytest
import transformers as hf
from pydantic import ValidationError

from kimi_core.config import TrainerConfig
from kimi_core.trainer.parallel import check_axes


def llama(**sizes: int) -> hf.LlamaConfig:
    given = {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 48}
    return hf.LlamaConfig(hidden_size=48, **(given | sizes))


def test_the_product_of_the_axes_divides_the_ranks():
    with pytest.raises(ValidationError, match=r"ranks = 2 is not a multiple of 4.*tensor_parallel"):
        TrainerConfig(ranks=2, tensor_parallel=2, context_parallel=2)
    with pytest.raises(ValidationError, match="give 3 ranks or a multiple"):
        TrainerConfig(replicas=3)
    assert TrainerConfig(ranks=6, tensor_parallel=3, replicas=2).ranks == 6


def test_axes_that_fit():
    check_axes(llama(), TrainerConfig(ranks=8, replicas=4))
    check_axes(hf.MambaConfig(), TrainerConfig(ranks=2))
    check_axes(llama(), TrainerConfig(ranks=6, tensor_parallel=3, context_parallel=2))
    check_axes(llama(), TrainerConfig(ranks=3, context_parallel=3))
    check_axes(llama(), TrainerConfig(ranks=6, context_parallel=6))


@pytest.mark.parametrize(
    ("sizes", "axes", "said"),
    [
        ({}, {"tensor_parallel": 4}, "tensor_parallel = 4 does not divide the model's 6 attention"),
        ({}, {"tensor_parallel": 2}, "does not divide the model's 3 heads of keys and values"),
        ({"intermediate_size": 50}, {"tensor_parallel": 3}, "the model's 50 columns in its MLP"),
        ({}, {"context_parallel": 4}, "context_parallel = 4 has to divide the model's 6 attention"),
        ({}, {"context_parallel": 2}, "divide its 3 heads of keys and values or be a multiple"),
        ({}, {"context_parallel": 3, "tensor_parallel": 3}, r"tensor-parallel rank \(2 and 1\)"),
    ],
)
def test_axes_that_do_not_fit(sizes, axes, said):
    ranks = axes.get("tensor_parallel", 1) * axes.get("context_parallel", 1)
    with pytest.raises(ValueError, match=said):
        check_axes(llama(**sizes), TrainerConfig(ranks=ranks, **axes))


def test_an_architecture_without_a_known_plan():
    trainer = TrainerConfig(ranks=2, tensor_parallel=2)
    with pytest.raises(ValueError, match=r"gpt2 .*no plan.*set trainer.tensor_parallel = 1"):
        check_axes(hf.GPT2Config(), trainer)
    with pytest.raises(ValueError, match=r"olmo2 .*q_proj: colwise_gather_output"):
        check_axes(hf.Olmo2Config(), trainer)
