"""The DPO loss and its gradient against TRL's, on the same pairs.

    pip install trl==1.16.0
    pytest benches/bench_dpo.py

The policy differs from the reference, so that nothing cancels.
"""

import copy

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from kimi_core.config import DpoConfig, ModelConfig, TrainerConfig
from kimi_core.models.codec import Codec
from kimi_core.models.load import load_model
from kimi_core.tasks import multiply
from kimi_core.trainer.dpo import train_dpo

BETA = 0.1
PAIRS = [
    (prompt.text, multiply.response(prompt.text, chosen), multiply.response(prompt.text, rejected))
    for prompt in multiply.prompts()[100:7200:443]
    for chosen, rejected in (("terse", "worked"), ("worked", "checked"))
]


@pytest.fixture
def models():
    """A policy, another model as its reference, and their tokenizer."""
    config = ModelConfig(device="cpu", dtype="float32")
    policy, tokenizer = load_model(config, alphabet=multiply.ALPHABET, seed=0)
    reference, _ = load_model(config, alphabet=multiply.ALPHABET, seed=0)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in policy.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return policy, reference, tokenizer


def trls(models, folder):
    """TRL's loss of all pairs and its gradient."""
    datasets = pytest.importorskip("datasets", reason="pip install trl==1.16.0")
    trl = pytest.importorskip("trl", reason="pip install trl==1.16.0")
    policy, reference, tokenizer = copy.deepcopy(models)
    names = ("prompt", "chosen", "rejected")
    trainer = trl.DPOTrainer(
        policy,
        reference,
        trl.DPOConfig(
            str(folder),
            beta=BETA,
            per_device_train_batch_size=len(PAIRS),
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
        ),
        train_dataset=datasets.Dataset.from_list([dict(zip(names, p, strict=True)) for p in PAIRS]),
        processing_class=tokenizer,
    )
    (batch,) = trainer.get_train_dataloader()
    loss = trainer.compute_loss(policy, batch)
    return loss.item(), torch.autograd.grad(loss, list(policy.parameters()))


def ours(models):
    """The same by ``train_dpo``: its first step starts from the policy instead of the reference.

    The reference is what the model was before the first step, so a hook puts the policy's weights
    in between.
    """
    policy, reference, tokenizer = copy.deepcopy(models)
    codec = Codec(tokenizer)
    pairs = []
    for prompt, chosen, rejected in PAIRS:
        ids, response = codec.encode_example(prompt, chosen)
        pairs.append((ids, response, codec.encode_example(prompt, rejected)[1]))
    found = []

    def swap(step, loss):
        if step == 1:
            reference.load_state_dict(policy.state_dict())
        else:
            found.append(loss)

    parameters = list(reference.parameters())
    seen = []
    handle = register_optimizer_step_pre_hook(
        lambda *_: seen.append([parameter.grad.clone() for parameter in parameters])
    )
    config = DpoConfig(beta=BETA, steps=2, batch_size=len(pairs), learning_rate=1e-9)
    settings = TrainerConfig(grad_clip=1e9, tokens_per_micro_batch=512)
    train_dpo(reference, pairs, config, settings, seed=0, report=swap)
    handle.remove()
    return found[0], seen[1]


def test_loss_and_gradient_are_trls(models, tmp_path):
    theirs, gradient = trls(models, tmp_path)
    loss, found = ours(models)
    print(f"\nloss: TRL {theirs:.7f}, ours {loss:.7f}, difference {abs(loss - theirs):.1e}")
    assert abs(loss - theirs) <= 1e-5
    for one, other in zip(found, gradient, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
