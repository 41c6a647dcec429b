"""The classic reward model (section 2.3.5): question, reference, response → one scalar.

The question may have images, if the model reads some. With a template without ``{reference}`` the
model judges by the question, or by the image, alone.

A linear value head reads the last token's hidden state of a causal model. It is trained with a
binary cross-entropy. It is the baseline for the chain-of-thought judge: in the report it was right
on 84.4 % of the spot checks, the judge on 98.5 %.
"""

import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kimi_core.config import Config, PromptsConfig, SftScheduleConfig
from kimi_core.models.codec import Codec
from kimi_core.models.load import context_of, load_pretrained
from kimi_core.models.vision import Images
from kimi_core.models.vision_load import load_images
from kimi_core.prompts.messages import chat_prompts
from kimi_core.reward.base import InfrastructureError
from kimi_core.reward.judges.labelled import TEMPLATE, Labelled
from kimi_core.trainer.master_weights import MasterWeights
from kimi_core.trainer.schedule import share_of_peak
from kimi_core.types import Prompt

HEAD_FILE = "value_head.safetensors"


class ValueModel(nn.Module):
    """The logit of "the response is right", from the body of a causal model.

    Args:
        model: any causal model of transformers; the output embeddings are not used.
        images: a table for the images of questions; None: the model reads text only.
        template: with some of ``{question}``, ``{reference}`` and ``{response}``.
        chat: whether the template is a user message, which the model's chat template renders.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        images: Images | None = None,
        *,
        template: str = TEMPLATE,
        chat: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.images = images
        self.template = template
        self.chat = chat
        self.head = nn.Linear(model.config.get_text_config().hidden_size, 1)
        nn.init.zeros_(self.head.weight)  # Every probability starts at one half.
        nn.init.zeros_(self.head.bias)
        self.head.to(device=model.device, dtype=torch.float32)

    def forward(self, texts: Sequence[np.ndarray]) -> Tensor:
        """Logits, float32 ``[n]``, of token ids int32 ``[l_i]``, each with at least one token.

        Images stand in them as negative ids (``models/vision.py``).
        """
        lengths = [len(ids) for ids in texts]
        # Padding is on the right, where causal attention hides it.
        ids_nl = torch.zeros(len(texts), max(lengths), dtype=torch.long)
        for row, ids in enumerate(texts):
            ids_nl[row, : len(ids)] = torch.from_numpy(np.asarray(ids, np.int64))
        ids_nl = ids_nl.to(self.model.device)
        if self.images is None:  # Not every model takes positions.
            hidden_nld = self.model.base_model(input_ids=ids_nl, use_cache=False).last_hidden_state
        else:
            positions_nl = torch.arange(ids_nl.shape[1], device=ids_nl.device).expand_as(ids_nl)
            inputs = self.images.inputs(self.model, ids_nl, positions_nl)
            hidden_nld = inputs.hidden(self.model, use_cache=False)
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

    def encode(self, codec: Codec, examples: Sequence[Labelled]) -> list[np.ndarray]:
        """Token ids of each example as the model is asked about it, int32 ``[l_i]``.

        The examples' images are added to the table.

        Args:
            codec: of the model's tokenizer, with ``images``.

        Raises:
            ValueError: an example has no tokens, or has images and the model reads none.
        """
        asked = [one.asked(self.template) for one in examples]
        if self.images is not None:
            self.images.add(asked)
        prompts = chat_prompts(asked, PromptsConfig(chat=self.chat))
        return [codec.encode_prompt(prompt) for prompt in prompts]

    def save(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write model and tokenizer in Hugging Face format, the head, and how it is asked."""
        self.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if self.images is not None:
            self.images.save(folder)
        settings = {"template": self.template, "chat": str(self.chat)}
        save_file(dict(self.head.state_dict()), folder / HEAD_FILE, metadata=settings)


def load_value_model(folder: Path, **options: Any) -> tuple[ValueModel, PreTrainedTokenizerBase]:
    """Read what `ValueModel.save` wrote; ``options`` are those of ``models.load.load_pretrained``.

    Raises:
        ValueError: the folder has no model, or no value head.
    """
    if not (folder / HEAD_FILE).is_file():
        raise ValueError(
            f"{folder} has no {HEAD_FILE}; name the folder `classic` that `kimi reward --save` "
            "writes (reward.value.model in a config)"
        )
    model, tokenizer = load_pretrained(str(folder), **options)
    with safe_open(folder / HEAD_FILE, "pt") as file:
        settings = file.metadata() or {}
    value_model = ValueModel(
        model,
        load_images(model, Config(model={"name": str(folder)})),
        template=settings.get("template", TEMPLATE),
        chat=settings.get("chat") == "True",
    )
    value_model.head.load_state_dict(load_file(folder / HEAD_FILE))
    return value_model, tokenizer


class ValueReward:
    """A reward function: the probability that a response is right, in [0, 1].

    Thread-safe, but one thread computes at a time.

    Args:
        folder: what `ValueModel.save` wrote.
        device: as ``model.device``.

    Raises:
        ValueError: as `load_value_model`.
    """

    __name__ = "value"

    def __init__(self, folder: Path, device: str = "auto") -> None:
        self._value_model, tokenizer = load_value_model(folder, device=device)
        self._codec = Codec(tokenizer, [], self._value_model.model, self._value_model.images)
        self._special_tokens = tokenizer.all_special_tokens
        self._lock = threading.Lock()

    def __call__(self, prompt: Prompt, response: str) -> float:
        """The reward of one response.

        Raises:
            InfrastructureError: the response cannot be written with the model's tokens, or does not
                fit into its context.
        """
        for token in self._special_tokens:  # A response must not end the text that it stands in.
            response = response.replace(token, " ".join(token))
        one = Labelled(prompt.text, prompt.answer, response, False, images=prompt.images)
        with self._lock:
            try:
                [ids] = self._value_model.encode(self._codec, [one])
            except ValueError as error:
                raise InfrastructureError(f"Cannot ask the value model: {error}") from error
            context = context_of(self._value_model.model)
            if context is not None and len(ids) > context:
                raise InfrastructureError(
                    f"The value model would read {len(ids)} tokens; its context has {context}"
                )
            return float(self._value_model.probabilities([ids])[0])


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
