"""What a rank has to know of a policy to make it without weights, which rank 0 then sends."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Self

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from kimi_core.config import TrainerConfig
from kimi_core.models.lora import choose_trained
from kimi_core.models.vision import SentImages
from kimi_core.trainer.packing import Layout
from kimi_core.trainer.policy import Policy


def tensors_of(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name, each once."""
    return chain(model.named_parameters(), model.named_buffers())


@dataclass(frozen=True)
class Blueprint:
    """The policy of rank 0, without its weights."""

    model: type[PreTrainedModel]
    config: PretrainedConfig
    dtypes: dict[str, torch.dtype]
    """Of parameters and buffers, by name."""
    layout: Layout
    masks_up_to: int
    temperature: float
    head_chunk: int
    reads_images: bool

    @classmethod
    def of(cls, policy: Policy) -> Self:
        """Of a policy that is not sharded yet."""
        return cls(
            type(policy.model),
            policy.model.config,
            {name: tensor.dtype for name, tensor in tensors_of(policy.model)},
            policy.layout,
            policy.masks_up_to,
            policy.temperature,
            policy.head_chunk,
            policy.images is not None,
        )

    def build(self, trainer: TrainerConfig) -> Policy:
        """A policy on torch's meta device: its tensors have shapes and take no memory.

        Args:
            trainer: what is trained, and the adapters, as for ``choose_trained``.
        """
        with torch.device("meta"):
            model = self.model._from_config(self.config).eval()
            choose_trained(model, trainer, seed=0)
        for name, tensor in tensors_of(model):
            tensor.data = tensor.data.to(self.dtypes[name])
        return Policy(
            model,
            temperature=self.temperature,
            head_chunk=self.head_chunk,
            images=SentImages() if self.reads_images else None,
            checked=(self.layout, self.masks_up_to),
        )
