"""The classic reward model (section 2.3.5): question, reference, response → one scalar.

A linear value head reads the last token's hidden state of a causal model. It is trained with a
binary cross-entropy. It is the baseline for the chain-of-thought judge: in the report it was right
on 84.4 % of the spot checks, the judge on 98.5 %.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kimi_core.config import SftScheduleConfig
from kimi_core.trainer.master_weights import MasterWeights
from kimi_core.trainer.schedule import share_of_peak

HEAD_FILE = "value_head.safetensors"


class ValueModel(nn.Module):
    """The logit of "the response is right", from the body of a causal model.

    Args:
        model: any causal model of transformers; the output embeddings are not used.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.head = nn.Linear(model.config.get_text_config().hidden_size, 1)
        nn.init.zeros_(self.head.weight)  # Every probability starts at one half.
        nn.init.zeros_(self.head.bias)
        self.head.to(device=model.device, dtype=torch.float32)

    def forward(self, texts: Sequence[np.ndarray]) -> Tensor:
        """Logits, float32 ``[n]``, of token ids int32 ``[l_i]``, each with at least one token."""
        lengths = [len(ids) for ids in texts]
        # Padding is on the right, where causal attention hides it.
        ids_nl = torch.zeros(len(texts), max(lengths), dtype=torch.long)
        for row, ids in enumerate(texts):
            ids_nl[row, : len(ids)] = torch.from_numpy(np.asarray(ids, np.int64))
        hidden_nld = self.model.base_model(
            input_ids=ids_nl.to(self.model.device), use_cache=False
        ).last_hidden_state
        last_n = torch.tensor(lengths, device=hidden_nld.device) - 1
        hidden_nd = hidden_nld[torch.arange(len(texts), device=hidden_nld.device), last_n]
        return self.head(hidden_nd.float())[:, 0]

    @torch.inference_mode()
    def probabilities(self, texts: Sequence[np.ndarray], *, batch_size: int = 64) -> np.ndarray:
        """Probability that each text is right, float64 ``[n]``."""
        self.eval()
        parts = [
            self(texts[start : start + batch_size]).double().sigmoid().cpu().numpy()
            for start in range(0, len(texts), batch_size)
        ]
        return np.concatenate(parts) if parts else np.zeros(0)

    def save(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write model and tokenizer in Hugging Face format, and the head."""
        self.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        save_file(dict(self.head.state_dict()), folder / HEAD_FILE)


def load_value_model(folder: Path, **options: Any) -> tuple[ValueModel, PreTrainedTokenizerBase]:
    """Read what `ValueModel.save` wrote; ``options`` are those of ``models.load.load_pretrained``.

    Raises:
        ValueError: the folder has no model, or no value head.
    """
    from kimi_core.models.load import load_pretrained

    model, tokenizer = load_pretrained(str(folder), **options)
    if not (folder / HEAD_FILE).is_file():
        raise ValueError(f"{folder} has no {HEAD_FILE}; `kimi reward --save` writes one")
    value_model = ValueModel(model)
    value_model.head.load_state_dict(load_file(folder / HEAD_FILE))
    return value_model, tokenizer


def train_value(
    value_model: ValueModel,
    texts: Sequence[np.ndarray],
    labels: Sequence[bool],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Fit the labels with a binary cross-entropy; the model is updated in place.

    Examples come in random order, each once before any comes again. The optimizer is AdamW. The
    learning rate warms up over 5 % of the steps and decays to a tenth.

    Raises:
        ValueError: there are no examples, or not one label for each.
        FloatingPointError: a loss is not finite. The step is not taken.
    """
    if not texts or len(texts) != len(labels):
        raise ValueError(
            f"{len(texts)} texts and {len(labels)} labels; give one label for each text"
        )
    weights = MasterWeights({n: p for n, p in value_model.named_parameters() if p.requires_grad})
    optimizer = weights.adamw(learning_rate, weight_decay=0.0)
    shape = SftScheduleConfig()
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: share_of_peak(shape, step, steps)
    )
    rng = np.random.default_rng([seed, steps])
    order: list[int] = []
    value_model.train()
    for step in range(1, steps + 1):
        while len(order) < batch_size:
            order.extend(rng.permutation(len(texts)).tolist())
        chosen, order = order[:batch_size], order[batch_size:]
        logits_n = value_model([texts[index] for index in chosen])
        right_n = torch.tensor([float(labels[index]) for index in chosen], device=logits_n.device)
        loss = nn.functional.binary_cross_entropy_with_logits(logits_n, right_n)
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"Step {step}: loss {value}; lower the learning rate")
        loss.backward()
        weights.add_gradients()
        weights.clip_gradients(1.0)
        weights.step(optimizer)
        schedule.step()
        report(step, value)


def brier(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean squared distance of the probabilities ``[n]`` to the labels 0 or 1 (Brier 1950)."""
    return float(np.mean((probabilities - labels) ** 2))


def expected_calibration_error(
    probabilities: np.ndarray, labels: np.ndarray, *, bins: int = 10
) -> float:
    """Mean |confidence − accuracy| over bins of equal width, weighted by the size of each bin.

    The confidence is the probability of the more likely label (Guo et al. 2017, arXiv 1706.04599).

    Args:
        probabilities: of label 1, float64 ``[n]``.
        labels: 0 or 1, ``[n]``.
    """
    given = probabilities >= 0.5
    confidence = np.where(given, probabilities, 1 - probabilities)
    right = (given == (labels > 0.5)).astype(float)
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    error = 0.0
    for index in range(bins):
        inside = which == index
        if inside.any():
            gap = abs(confidence[inside].mean() - right[inside].mean())
            error += float(inside.mean() * gap)
    return error
