"""The policy's log-probs are those of the model's own logits, whatever its head does."""

from functools import cache

import numpy as np
import pytest
import torch
import transformers as hf

from kimi_core.trainer.packing import micro_batches
from kimi_core.trainer.policy import Policy
from kimi_core.types import Batch

VOCAB = 40
SHAPE = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
LLAMA_LIKE = {**SHAPE, **IDS, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**LLAMA_LIKE),
    "llama, tied": lambda: hf.LlamaConfig(**LLAMA_LIKE, tie_word_embeddings=True),
    "qwen2": lambda: hf.Qwen2Config(**LLAMA_LIKE),
    "gpt2": lambda: hf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    # Caps its logits. The policy's check crosses the window, so it is short.
    "gemma2": lambda: hf.Gemma2Config(**LLAMA_LIKE, final_logit_softcapping=1.5, sliding_window=16),
    # Multiplies its logits.
    "cohere": lambda: hf.CohereConfig(**LLAMA_LIKE, logit_scale=0.5),
    # Divides its logits.
    "granite": lambda: hf.GraniteConfig(**LLAMA_LIKE, logits_scaling=3.0),
    # Has a bias on its output matrix.
    "phi": lambda: hf.PhiConfig(**SHAPE, **IDS, num_attention_heads=4),
}


class Tripled(hf.LlamaForCausalLM):
    """A head that does something the policy cannot know of."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 3 * output.logits
        return output


def build(model_class, config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.25)  # logits of the size that trained ones have
    return model.eval()


@cache
def tiny(name):
    return build(hf.AutoModelForCausalLM.from_config, CONFIGS[name]())


def batch_of(lengths, *, seed=0) -> Batch:
    rng = np.random.default_rng(seed)
    total = sum(lengths)
    edges = np.cumsum([0, *lengths], dtype=np.int32)
    mask = np.ones(total, np.uint8)
    mask[edges[:-1]] = 0
    return Batch(
        token_ids=rng.integers(VOCAB, size=total).astype(np.int32),
        logprobs=np.zeros(total, np.float32),
        mask=mask,
        policy_versions=np.zeros(total, np.int32),
        cu_seqlens=edges,
    )


def log_softmax_of_logits(model, batch, temperature):
    """One sequence at a time through the whole model; ``[T]``, the first of each is left out."""
    rows = []
    for start, end in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
        ids = torch.from_numpy(batch.token_ids[start:end]).long()
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        rows.append((logits / temperature).log_softmax(-1).gather(1, ids[1:, None])[:, 0])
    return torch.cat(rows)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("layout", ["rows", "alone", "end_to_end"])
def test_logprobs_and_gradients_are_the_models_own(name, temperature, layout):
    model = tiny(name)
    batch = batch_of([7, 4, 11])
    policy = Policy(model, temperature=temperature, head_chunk=4)
    if layout == "end_to_end" and policy.layout != layout:
        pytest.skip(f"{name} keeps the masked path")
    (micro,) = micro_batches(batch, batch.mask > 0, range(3), max_tokens=100, layout=layout)
    ours = policy.logprobs(micro)[micro.source_t.argsort()]
    theirs = log_softmax_of_logits(model, batch, temperature)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)

    parameters = list(policy.trainable().values())
    weights = torch.linspace(-1, 1, len(ours))
    own = torch.autograd.grad((ours * weights).sum(), parameters, allow_unused=True)
    true = torch.autograd.grad((theirs * weights).sum(), parameters, allow_unused=True)
    for got, expected in zip(own, true, strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_the_token_before_predicts_the_wanted_one():
    batch = batch_of([5])
    policy = Policy(tiny("llama"), temperature=1.0, head_chunk=4)
    (micro,) = micro_batches(batch, np.arange(5) == 3, [0], max_tokens=100, layout="rows")
    assert micro.ids_t.tolist() == [batch.token_ids[3]]
    (own,) = policy.logprobs(micro).tolist()
    assert own == pytest.approx(
        log_softmax_of_logits(tiny("llama"), batch, 1.0)[2].item(), abs=1e-5
    )


def test_an_unknown_head_is_an_error():
    model = build(Tripled, CONFIGS["llama"]())
    with pytest.raises(ValueError, match=r"Cannot train Tripled: its logits differ by"):
        Policy(model, temperature=1.0, head_chunk=4)


def test_a_model_without_a_head_is_an_error():
    model = build(hf.LlamaModel, CONFIGS["llama"]())
    with pytest.raises(ValueError, match="LlamaModel has no output embeddings"):
        Policy(model, temperature=1.0, head_chunk=4)


@pytest.mark.parametrize("training", [False, True])
def test_looking_at_the_head_leaves_the_mode_alone(training):
    model = build(hf.LlamaForCausalLM, CONFIGS["llama"]()).train(training)
    Policy(model, temperature=1.0, head_chunk=4)
    assert model.training == training


def test_trainable_parameters_are_those_that_want_a_gradient():
    model = build(hf.LlamaForCausalLM, CONFIGS["llama"]()).requires_grad_(False)
    model.model.norm.requires_grad_(True)
    policy = Policy(model, temperature=1.0, head_chunk=4)
    assert policy.trainable() == {"model.norm.weight": model.model.norm.weight}
