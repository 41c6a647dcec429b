"""A Llama of a few thousand random weights, for the tests of training."""

import torch
import transformers as hf

VOCAB = 24


def llama():
    config = hf.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return hf.LlamaForCausalLM(config).eval()
