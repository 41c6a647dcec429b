"""Supervised fine-tuning on packed sequences (section 2.2)."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from kimi_core.config import SftConfig, TrainerConfig
from kimi_core.trainer.activations import Recompute
from kimi_core.trainer.master_weights import MasterWeights
from kimi_core.trainer.packing import micro_batches
from kimi_core.trainer.policy import Policy
from kimi_core.trainer.trainer import TrainingDiverged
from kimi_core.types import PROMPT_VERSION, Batch

Example = tuple[np.ndarray, np.ndarray]
"""Token ids of a prompt and of its response, int32."""

Save = Callable[[Path], None]
"""Writes masters and moments into a folder."""

TENSORS = "sft.safetensors"


def train_sft(
    model: PreTrainedModel,
    examples: Sequence[Example],
    config: SftConfig,
    trainer: TrainerConfig,
    *,
    seed: int,
    report: Callable[[int, float], None] = lambda step, loss: None,
    after_step: Callable[[int, Save], None] = lambda step, save: None,
    resume: tuple[int, Path] | None = None,
) -> None:
    """Fit the responses, given their prompts; the model is updated in place.

    Examples come in random order, and each comes once before any comes a second time.

    Args:
        model: any causal LM; its parameters that require a gradient are trained. It is put into
            eval mode: a layer that is recomputed must not drop other activations.
        examples: at least one; prompt and response have at least one token each.
        config: steps, batch size and learning rate.
        trainer: ``tokens_per_micro_batch``, ``memory_gb``, ``head_chunk``, ``grad_clip`` and
            ``weight_decay``.
        seed: decides the order of the examples.
        report: called with the number of each step, starting at 1, and its mean loss in nats per
            token.
        after_step: called with the number of each step and a function that saves its state.
        resume: steps done, and the folder that such a function wrote after them. What follows has
            the bits of a training that was not interrupted.

    Raises:
        ValueError: there are no examples.
        TrainingDiverged: a loss or gradient is not finite; that step is not taken.
    """
    if not examples:
        raise ValueError("SFT needs at least one example; the file or source gave none")
    policy = Policy(model, temperature=1.0, head_chunk=trainer.head_chunk).eval()
    weights = MasterWeights(policy.trainable())
    recompute = Recompute(model, trainer.memory_gb)
    max_tokens = recompute.most_tokens(trainer.tokens_per_micro_batch, policy.probe)
    optimizer = weights.adamw(config.learning_rate, trainer.weight_decay)
    done, folder = resume or (0, None)
    if folder is not None:
        _load(weights, optimizer, folder)
    batches = _batches(len(examples), config, np.random.default_rng([seed, config.steps]))
    for step, chosen in enumerate(islice(batches, done, config.steps), done + 1):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * warmup_cosine(step - 1, config.steps)
        batch = pack_examples([examples[index] for index in chosen])
        try:
            loss = _accumulate(policy, weights, recompute, batch, max_tokens)
        except FloatingPointError:  # A log-prob is NaN, so the loss is NaN too.
            loss = math.nan
        norm = weights.clip_gradients(trainer.grad_clip)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingDiverged(
                f"SFT step {step}: loss {loss}, gradient norm {norm}; the step was not "
                f"taken. Lower sft.learning_rate (now {config.learning_rate})"
            )
        weights.step(optimizer)
        report(step, loss)
        after_step(step, lambda folder: _save(weights, optimizer, folder))


def _batches(n: int, config: SftConfig, rng: np.random.Generator) -> Iterator[list[int]]:
    """The examples of each step."""
    order: list[int] = []
    while True:
        while len(order) < config.batch_size:
            order.extend(rng.permutation(n).tolist())
        chosen, order = order[: config.batch_size], order[config.batch_size :]
        yield chosen


def _save(weights: MasterWeights, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    tensors = {}
    for name, master in weights.masters.items():
        tensors[name] = master.detach().contiguous()
        tensors |= {f"{name}/{key}": value for key, value in optimizer.state[master].items()}
    save_file(tensors, folder / TENSORS)


def _load(weights: MasterWeights, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    saved = load_file(folder / TENSORS)
    weights.load(saved)
    for place, value in saved.items():
        name, slash, key = place.partition("/")
        if slash:
            master = weights.masters[name]
            optimizer.state[master][key] = value.to(master.device)


def warmup_cosine(step: int, steps: int) -> float:
    """Factor on the learning rate: it rises over the first 5 % of the steps, then falls to 0.1."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def pack_examples(examples: Sequence[Example]) -> Batch:
    """Pack prompts and responses end to end; the mask is 1 on responses."""
    tokens = [np.concatenate(example) for example in examples]
    mask = [np.repeat([0, 1], [len(prompt), len(response)]) for prompt, response in examples]
    total = sum(map(len, tokens))
    return Batch(
        token_ids=np.concatenate(tokens).astype(np.int32),
        logprobs=np.zeros(total, np.float32),
        mask=np.concatenate(mask).astype(np.uint8),
        policy_versions=np.full(total, PROMPT_VERSION, np.int32),
        cu_seqlens=np.cumsum([0, *map(len, tokens)], dtype=np.int32),
    )


def _accumulate(
    policy: Policy, weights: MasterWeights, recompute: Recompute, batch: Batch, max_tokens: int
) -> float:
    """Add the gradient of the mean negative log-prob of the responses' tokens; return the mean."""
    counted = batch.mask > 0
    total = 0.0
    device = policy.model.device
    for micro in micro_batches(
        batch,
        counted,
        range(len(batch)),
        max_tokens=max_tokens,
        layout=policy.layout,
        masks_up_to=policy.masks_up_to,
        device=device,
    ):
        recompute.fit(micro.ids_rl.numel())
        loss = -policy.logprobs(micro).sum() / int(counted.sum())
        loss.backward()
        weights.add_gradients()
        total += float(loss.detach())
    return total
