"""What a model reads in one forward pass, with what some models want for images.

Most models take one position a token. Those with M-RoPE take four: the token's position in its
sequence, which tells sequences apart, and a time, a row and a column, which the rotary embedding
uses. They are equal in text; an image has a row and a column for each of its places, and what
follows goes on behind the larger side. Models with deepstack add features of an image to the hidden
states behind their first layers, too.
"""

from dataclasses import dataclass
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Inputs:
    """Tokens of r rows and l columns, in batch order."""

    ids_rl: Tensor
    """int64; negative in the places of images."""
    positions: Tensor
    """int64 ``[r, l]``, or ``[4, r, l]`` with M-RoPE."""
    embeds_rld: Tensor | None = None
    """Embeddings with the features of images in their places; None: there is no image."""
    deep_rld: tuple[Tensor, ...] = ()
    """What deepstack adds behind the first, second, ... layer; 0 in text."""

    def part(self, begin: int, end: int) -> "Inputs":
        """The columns from ``begin`` to ``end``."""
        return Inputs(
            self.ids_rl[:, begin:end],
            self.positions[..., begin:end],
            None if self.embeds_rld is None else self.embeds_rld[:, begin:end],
            tuple(one[:, begin:end] for one in self.deep_rld),
        )

    def arguments(self) -> dict[str, Any]:
        """As a model's forward pass takes them."""
        named: dict[str, Any] = {"position_ids": self.positions}
        if self.embeds_rld is None:
            return named | {"input_ids": self.ids_rl}
        if self.deep_rld:
            is_image = self.ids_rl < 0
            named["visual_pos_masks"] = is_image
            named["deepstack_visual_embeds"] = [one[is_image] for one in self.deep_rld]
        return named | {"inputs_embeds": self.embeds_rld}

    def hidden(self, model: PreTrainedModel, **settings: Any) -> Tensor:
        """The last hidden states of ``model``, ``[r, l, d]``."""
        # With deepstack the base model would hand its own features to its decoder as well.
        body = model.get_decoder() if self.deep_rld else model.base_model
        hidden_rld: Tensor = body(**self.arguments(), **settings).last_hidden_state
        return hidden_rld


@dataclass(frozen=True)
class Span:
    """The M-RoPE positions of an image of n places."""

    offsets: np.ndarray
    """Time, row and column of each place, counted from the image's first position, ``[3, n]``."""
    shift: int
    """What the image adds to the positions behind it, other than n: 0 or less."""


def has_mrope(model: PreTrainedModel) -> bool:
    """Whether positions have a time, a row and a column."""
    return hasattr(model.base_model, "get_rope_index")


def has_deepstack(model: PreTrainedModel) -> bool:
    """Whether features of images are added behind the first layers."""
    return "deepstack_visual_embeds" in signature(model.get_decoder().forward).parameters


def span_of(model: PreTrainedModel, places: int, grid: Tensor) -> Span:
    """The positions that ``model`` itself gives an image.

    Args:
        places: positions of the image.
        grid: patches in time, height and width, int64 ``[1, 3]``.
    """
    kinds = torch.tensor([[1] * places + [0]])
    told = {"input_ids": kinds * model.config.image_token_id, "image_grid_thw": grid.cpu()}
    rope_index = model.base_model.get_rope_index
    if "mm_token_type_ids" in signature(rope_index).parameters:
        told["mm_token_type_ids"] = kinds
    positions = rope_index(**told)[0][:, 0].numpy()
    behind = int(positions[0, places])
    return Span(positions[:, :places].astype(np.int64), behind - places)


def in_space(ids_rl: Tensor, positions_rl: Tensor, spans: dict[int, Span]) -> Tensor:
    """M-RoPE positions, int64 ``[4, r, l]``, of rows in which a position of 0 begins a sequence.

    Sequences may follow each other in a row, and responses may share a prompt, if images stand in
    what they share.

    Args:
        positions_rl: of each token in its sequence.
        spans: number → positions of each image that occurs, all places of it in a run.
    """
    plain = positions_rl.cpu().numpy()
    found = np.broadcast_to(plain, (4, *plain.shape)).copy()
    for row, ids in enumerate(ids_rl.cpu().numpy()):
        begins = np.append(np.flatnonzero(plain[row] == 0), len(ids))
        columns = np.flatnonzero(ids < 0)
        while len(columns):
            first = int(columns[0])
            span = spans[-1 - int(ids[first])]
            places = span.offsets.shape[1]
            behind, end = first + places, begins[begins > first][0]
            found[1:, row, first:behind] = found[1:, row, first, None] + span.offsets
            found[1:, row, behind:end] += span.shift
            columns = columns[places:]
    return torch.from_numpy(found).to(positions_rl.device)
