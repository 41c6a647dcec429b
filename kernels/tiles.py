"""Logits, one tile at a time: the steps that ``linear_logprob`` and ``omd_loss`` consist of.

The logits ``[T, V]`` never exist as a whole. One buffer, the tile, holds ``chunk`` rows of them.
For each chunk, ``load`` computes the logits, ``statistics`` reads their rows, and ``gradient``
overwrites the buffer with the gradient, which is then multiplied with the output matrix and the
hidden states. ``Tiles`` uses plain torch, ``CpuTiles`` the C++ passes of ``csrc/loss``, and
``TritonTiles`` a GPU. Shape suffixes: t tokens, d hidden size, v vocabulary, c rows of a chunk.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kimi_core import _C

CHUNK = 512
"""Default rows of a tile: enough for a fast GEMM, and 100 MB at a vocabulary of 49,152."""

UPCAST_ELEMENTS = 1 << 21
"""Most elements of a 16-bit matrix that are copied to float32 at once, for a GEMM on a CPU."""


@dataclass(frozen=True)
class Head:
    """An output matrix, and the steps after it: bias, then soft cap, then temperature."""

    weight: Tensor
    """``[V, D]``, in the dtype of the hidden states. With ``tp_group``, this rank's rows."""
    bias: Tensor | None = None
    """``[V]``, added to the logits."""
    temperature: float = 1.0
    """> 0: the temperature that the tokens were sampled with."""
    softcap: float | None = None
    """Logits become ``softcap * tanh(logits / softcap)``, before the temperature. None: no cap."""
    tp_group: dist.ProcessGroup | None = None
    """The ranks that share the vocabulary's rows, in the order of their ranks."""
    first: int = 0
    """Token id of this rank's first row. The kernels derive it from ``tp_group``."""


class Statistics(NamedTuple):
    """For each row, what its target's log-prob, its entropy and its gradient need."""

    top_c: Tensor
    """The largest score, after bias and cap and before the temperature."""
    total_c: Tensor
    """float64: sum over the vocabulary of exp(x), x = (score − top) / temperature. It is separate
    from ``top``, because one float32 for both would lose the sum's digits to a large maximum."""
    picked_c: Tensor
    """x of the target; 0 if another rank holds the target."""
    weighted_c: Tensor
    """float64: sum over the vocabulary of exp(x)·x."""

    def logprobs(self) -> Tensor:
        """float64 ``[c]``."""
        return self.picked_c - self.total_c.log()

    def entropy(self) -> Tensor:
        """float64 ``[c]``, in nats."""
        return self.total_c.log() - self.weighted_c / self.total_c


class Tiles:
    """The tile in plain torch, for float64 and for devices without a kernel.

    Args:
        head: tensors on one device, in float32, float64 or a 16-bit type.
        rows: rows of the largest chunk.
    """

    def __init__(self, head: Head, rows: int) -> None:
        self.head = head
        weight_vd = head.weight
        self.dtype = torch.float64 if weight_vd.dtype == torch.float64 else torch.float32
        self._tile_cv = weight_vd.new_empty(rows, len(weight_vd), dtype=self._tile_dtype)
        self._bias_v = None if head.bias is None else head.bias.detach().to(self.dtype).contiguous()
        # 16-bit products must be summed in float32 and stay in float32. Logits that are rounded to
        # 16 bits shift the log-prob of a long response by nats. On a CPU only a GEMM on float32
        # copies does that.
        step = len(weight_vd)
        if weight_vd.dtype != self.dtype:
            step = max(1, UPCAST_ELEMENTS // weight_vd.shape[1])
        self._parts = [slice(v, v + step) for v in range(0, len(weight_vd), step)]

    @property
    def _tile_dtype(self) -> torch.dtype:
        return self.dtype

    def load(self, hidden_cd: Tensor, ids_c: Tensor, *, keep: bool = True) -> None:
        """Compute the logits of a chunk into the tile.

        Args:
            hidden_cd: hidden states of the chunk.
            ids_c: the target of each row.
            keep: whether ``gradient`` will follow; False if only statistics are needed.
        """
        self._logits_cv = self._tile_cv[: len(hidden_cd)]
        self._targets_c = self._targets(ids_c)
        x_cd = hidden_cd.to(self.dtype)
        for part in self._parts:
            weight_pd = self.head.weight[part].to(self.dtype)
            torch.mm(x_cd, weight_pd.T, out=self._logits_cv[:, part])

    def statistics(self) -> Statistics:
        """Statistics of the loaded logits over the whole vocabulary; the logits stay loaded."""
        mine, owned_c = self._local_statistics(), self._targets_c >= 0
        if self.head.tp_group is None:
            return mine
        return _over_ranks(mine, owned_c, self.head.temperature, self.head.tp_group)

    def gradient(self, top_c: Tensor, total_c: Tensor, outer_c: Tensor) -> Tensor:
        """Overwrite the loaded logits with the gradient of Σ outer·logprob; ``[c, V]``."""
        return self._gradient(top_c, total_c, outer_c.to(self.dtype))

    def put_dhidden(self, dz_cv: Tensor, out_cd: Tensor) -> None:
        """Write ``dz @ weight``; with a ``tp_group``, this rank's share of the sum."""
        if len(self._parts) == 1 and out_cd.dtype == dz_cv.dtype:
            torch.mm(dz_cv, self.head.weight, out=out_cd)
            return
        sum_cd = torch.zeros_like(out_cd, dtype=self.dtype)
        for part in self._parts:
            sum_cd.addmm_(dz_cv[:, part], self.head.weight[part].to(self.dtype))
        out_cd.copy_(sum_cd)

    def add_dweight(self, dz_cv: Tensor, hidden_cd: Tensor, sum_vd: Tensor, beta: int) -> None:
        """``sum = beta * sum + dz.T @ hidden``; with beta 0 the old ``sum`` is not read."""
        sum_vd.addmm_(dz_cv.T, hidden_cd.to(self.dtype), beta=beta)

    def _targets(self, ids_c: Tensor) -> Tensor:
        """This rank's row for each id; −1 if another rank has the row."""
        local_c = ids_c - self.head.first
        mine_c = (local_c >= 0) & (local_c < len(self.head.weight))
        return torch.where(mine_c, local_c, -1)

    def _scores(self) -> Tensor:
        scores_cv = self._logits_cv if self._bias_v is None else self._logits_cv + self._bias_v
        if self.head.softcap is not None:
            scores_cv = self.head.softcap * torch.tanh(scores_cv / self.head.softcap)
        return scores_cv

    def _local_statistics(self) -> Statistics:
        scores_cv, targets_c = self._scores(), self._targets_c
        top_c = scores_cv.amax(dim=1)
        x_cv = (scores_cv - top_c[:, None]) / self.head.temperature
        picked_c = x_cv.gather(1, targets_c.clamp(min=0)[:, None])[:, 0]
        picked_c = torch.where(targets_c >= 0, picked_c, 0)
        e_cv = x_cv.exp()
        total_c = e_cv.sum(dim=1, dtype=torch.float64)
        weighted_c = e_cv.mul_(x_cv.clamp_(min=-1e4)).sum(dim=1, dtype=torch.float64)
        return Statistics(top_c, total_c, picked_c, weighted_c)

    def _gradient(self, top_c: Tensor, total_c: Tensor, outer_c: Tensor) -> Tensor:
        scores_cv = self._scores()
        outer_c = outer_c / self.head.temperature
        slope_cv = torch.ones_like(scores_cv)
        if self.head.softcap is not None:
            slope_cv -= (scores_cv / self.head.softcap) ** 2
        dz_cv = ((scores_cv - top_c[:, None]) / self.head.temperature).exp_()
        dz_cv.mul_(-(outer_c / total_c.to(self.dtype))[:, None])
        rows_c = torch.nonzero(self._targets_c >= 0)[:, 0]
        dz_cv[rows_c, self._targets_c[rows_c]] += outer_c[rows_c]
        return self._logits_cv.copy_(dz_cv.mul_(slope_cv))


class CpuTiles(Tiles):
    """float32 tiles on a CPU: a GEMM of torch, one C++ pass for all statistics, and one for the
    gradient in place, with torch's number of threads."""

    def _local_statistics(self) -> Statistics:
        found = _C.tile_statistics(self._logits_cv.numpy(), **self._settings())
        return Statistics(*map(torch.from_numpy, found))

    def _gradient(self, top_c: Tensor, total_c: Tensor, outer_c: Tensor) -> Tensor:
        _C.tile_gradient(
            self._logits_cv.numpy(),
            top=top_c.numpy(),
            total=total_c.numpy(),
            outer=outer_c.contiguous().numpy(),
            **self._settings(),
        )
        return self._logits_cv

    def _settings(self) -> dict[str, Any]:
        return {
            "targets": self._targets_c.numpy(),
            "bias": None if self._bias_v is None else self._bias_v.numpy(),
            "softcap": self.head.softcap or 0.0,
            "temperature": self.head.temperature,
            "threads": torch.get_num_threads(),
        }


class WeightSums:
    """Gradients of the output matrix and the bias, summed over tiles in float32.

    The first tile allocates and overwrites the buffers, so they are never filled with zeros.
    """

    def __init__(self, tiles: Tiles, *, weight: bool, bias: bool) -> None:
        self._tiles = tiles
        self._wants = (weight, bias)
        self.weight_vd: Tensor | None = None
        self.bias_v: Tensor | None = None
        self.empty = True

    def add(self, dz_cv: Tensor, hidden_cd: Tensor) -> None:
        shape, dtype = self._tiles.head.weight.shape, self._tiles.dtype
        if self._wants[0]:
            if self.weight_vd is None:
                self.weight_vd = dz_cv.new_empty(shape, dtype=dtype)
            self._tiles.add_dweight(dz_cv, hidden_cd, self.weight_vd, beta=int(not self.empty))
        if self._wants[1]:
            sum_v = dz_cv.sum(dim=0, dtype=dtype)
            self.bias_v = sum_v if self.empty or self.bias_v is None else self.bias_v.add_(sum_v)
        self.empty = False

    def scale(self, factor: float) -> None:
        for sums in (self.weight_vd, self.bias_v):
            if sums is not None:
                sums.mul_(factor)

    def add_scaled(self, other: "WeightSums", factor: float) -> None:
        """Add ``factor`` times the sums of ``other``, and empty it. These must not be empty."""
        for mine, theirs in ((self.weight_vd, other.weight_vd), (self.bias_v, other.bias_v)):
            if mine is not None and theirs is not None:
                mine.add_(theirs, alpha=factor)
        other.empty = True

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Gradients in the parameters' dtype; zeros if no tile was added, None if not wanted."""
        head = self._tiles.head
        pairs = ((self.weight_vd, head.weight), (self.bias_v, head.bias))
        found: list[Tensor | None] = []
        for wanted, (sums, parameter) in zip(self._wants, pairs, strict=True):
            if not wanted or parameter is None:
                found.append(None)
            elif sums is None or self.empty:
                found.append(torch.zeros_like(parameter))
            else:
                found.append(sums.to(parameter.dtype))
        return found[0], found[1]


def _over_ranks(
    mine: Statistics, owned_c: Tensor, temperature: float, group: dist.ProcessGroup
) -> Statistics:
    """Statistics of the whole vocabulary from those of all ranks, by two small all-reduces."""
    top_c = mine.top_c.clone()
    dist.all_reduce(top_c, dist.ReduceOp.MAX, group=group)
    shift_c = (mine.top_c.double() - top_c) / temperature
    scale_c = shift_c.exp()
    sums = torch.stack(
        [
            scale_c * mine.total_c,
            torch.where(owned_c, mine.picked_c + shift_c, 0),
            scale_c * (mine.weighted_c + shift_c * mine.total_c),
        ]
    )
    dist.all_reduce(sums, group=group)
    return Statistics(top_c, *sums)
