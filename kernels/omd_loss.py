"""Online mirror descent from hidden states to the loss and its gradient (section 2.3.2).

``omd_terms`` has the formula. The gradient of ℓ_i with respect to the log-prob of each counted
token is *one number per response*, c_i = −(A_i − τ·ρ_i) / norm_i. The gradient of the log-probs
with respect to hidden states and output matrix does not depend on c_i. Therefore the gradient can
be computed while the logits exist, with three GEMMs instead of four:

* Several responses fit into one tile: c_i is known as soon as the tile's statistics are.
* A response is longer than a tile: its tiles add their gradients, with coefficient 1, to a scratch
  buffer of the size of the output matrix, and c_i multiplies the sum. The first such response needs
  no scratch, because the gradient itself is still empty.

This is the schedule ``one_pass``. ``two_pass`` applies the formula to ``linear_logprob``. Both give
the same result.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from kimi_core.kernels.arguments import check_cu_seqlens, check_finite, check_head, check_tokens
from kimi_core.kernels.dispatch import tiles_for
from kimi_core.kernels.linear_logprob import linear_logprob_ref, logprobs_of
from kimi_core.kernels.omd_terms import Group, LossInputs, loss_inputs, mirror_descent, plan
from kimi_core.kernels.tiles import CHUNK, Head, Tiles, WeightSums
from kimi_core.types import Normalize

Schedule = Literal["auto", "one_pass", "two_pass"]

WORKSPACE_BYTES = 1 << 30


class OmdLoss(NamedTuple):
    """The loss, and other results of the same pass; n responses, t tokens.

    Only ``loss`` is differentiable.
    """

    loss: Tensor
    """float64: the mean of ℓ_i over the responses."""
    log_ratio_n: Tensor
    """float64: ρ_i, normalised as in the loss."""
    coefficient_n: Tensor
    """float64: ∂ℓ_i / ∂ log π_θ of each counted token of the response."""
    logprobs_t: Tensor
    """float32: the policy's log-probs; 0 outside the mask."""
    entropy_t: Tensor
    """float32: the entropy of the distribution at each token, in nats; 0 outside the mask."""
    rows_computed: int
    rows_skipped: int
    """Rows outside the mask, which no GEMM reads."""


def omd_loss_ref(
    hidden: Tensor,
    head: Head | Tensor,
    ids: Tensor,
    ref_logprobs: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    tau: float,
    mask: Tensor | None = None,
    normalize: Normalize = "none",
    upcast: bool = False,
) -> Tensor:
    """The slow twin of ``omd_loss(...).loss``: all logits at once."""
    logprobs_t, _ = linear_logprob_ref(hidden, head, ids, mask=mask, upcast=upcast)
    counted = torch.ones_like(logprobs_t) > 0 if mask is None else mask
    kept = counted.nonzero()[:, 0]
    edges = torch.searchsorted(kept, cu_seqlens)
    losses_n = mirror_descent(
        logprobs_t[kept], ref_logprobs[kept], advantages, edges, tau=tau, normalize=normalize
    )
    return losses_n.mean()


def omd_loss(
    hidden: Tensor,
    head: Head | Tensor,
    ids: Tensor,
    ref_logprobs: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    tau: float,
    mask: Tensor | None = None,
    normalize: Normalize = "none",
    schedule: Schedule = "auto",
    workspace_bytes: int = WORKSPACE_BYTES,
    chunk: int = CHUNK,
    cp_group: dist.ProcessGroup | None = None,
) -> OmdLoss:
    """The mean over responses of (A_i − τ·ρ_i)² / (2τ), differentiable in hidden, weight and bias.

    Args:
        hidden, head, ids, chunk: as in ``linear_logprob``. The hidden states predict the tokens of
            the responses, which follow each other.
        ref_logprobs: ``[T]``, log π_i of the tokens, in nats.
        advantages: ``[n]``, A_i = r_i − r̄.
        cu_seqlens: ``[n + 1]`` integers from 0 to T: response i is tokens cu[i] to cu[i + 1].
        tau: τ > 0.
        mask: bool ``[T]``, tokens that count. The others cost nothing and have no effect. A
            response without counted tokens has ρ = 0 and no gradient. None: all tokens count.
        normalize: divide ρ_i by the number of the response's counted tokens, by the root of that
            number, or (the report) by nothing.
        schedule: ``one_pass`` computes the gradient in the forward pass, with three GEMMs, and
            allows one backward pass. ``two_pass`` computes the logits a second time in the backward
            pass. ``auto`` takes one pass, unless the scratch would exceed ``workspace_bytes`` or
            nothing requires a gradient.
        workspace_bytes: limit for the scratch of ``one_pass``, in bytes. If two or more responses
            are longer than ``chunk``, the scratch takes 4·V·D bytes.
        cp_group: ranks that share each response's tokens. ``hidden``, ``ids`` and ``ref_logprobs``
            are this rank's share and may be empty; ``advantages`` are the same on all ranks. Every
            rank gets the same loss and the gradient of its tokens; sum the gradient of ``weight``
            over the ranks.

    Raises:
        ValueError: as ``linear_logprob``; or cu_seqlens do not cover the tokens, tau is not
            positive, or the scratch of ``one_pass`` exceeds its limit.
        FloatingPointError: a log-prob is NaN, because hidden or weight holds NaN or infinity.
    """
    head = check_head(hidden, head, ids, mask=mask, chunk=chunk)
    check_tokens("ref_logprobs", ref_logprobs, len(ids))
    _check_choices(tau, normalize, schedule, workspace_bytes)
    edges = check_cu_seqlens(cu_seqlens, len(ids), len(advantages))
    rows_skipped = 0
    if mask is not None:
        kept = mask.nonzero()[:, 0]
        edges = torch.searchsorted(kept, torch.tensor(edges, device=kept.device)).tolist()
        rows_skipped = len(ids) - len(kept)
        hidden, ids, ref_logprobs = hidden[kept], ids[kept], ref_logprobs[kept]
    inputs = loss_inputs(edges, advantages, ref_logprobs, tau, normalize, cp_group)
    groups = plan(edges, chunk, merge=cp_group is None)
    if _choose(schedule, groups, head, hidden, workspace_bytes, cp_group) == "one_pass":
        found = _OnePass.apply(hidden, head.weight, head.bias, ids.long(), head, inputs, groups)
    else:
        found = _two_pass(hidden, ids.long(), head, inputs, chunk)
    loss, ratio_n, logprobs_t, entropy_t = found
    if mask is not None:
        logprobs_t, entropy_t = (
            values.new_zeros(len(mask)).index_copy(0, kept, values)
            for values in (logprobs_t, entropy_t)
        )
    check_finite(logprobs_t)
    return OmdLoss(
        loss, ratio_n, inputs.coefficients(ratio_n), logprobs_t, entropy_t, len(ids), rows_skipped
    )


def _choose(
    schedule: Schedule,
    groups: list[Group],
    head: Head,
    hidden_td: Tensor,
    workspace_bytes: int,
    cp_group: dist.ProcessGroup | None,
) -> Schedule:
    parameters = [hidden_td, head.weight, head.bias]
    wanted = [p is not None and p.requires_grad and torch.is_grad_enabled() for p in parameters]
    # The first group needs no scratch. An upcast tile sums in float32, also for 16-bit weights.
    scratch = head.weight.numel() * max(4, head.weight.element_size())
    needed = scratch if wanted[1] and any(len(group.tiles) > 1 for group in groups[1:]) else 0
    if cp_group is not None:  # All ranks must take the same schedule.
        most = torch.tensor([needed, int(any(wanted))], device=hidden_td.device)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=cp_group)
        needed, wanted = int(most[0]), [bool(most[1])]
    if schedule == "one_pass" and needed > workspace_bytes:
        raise ValueError(
            f"one_pass needs a scratch of {needed:,} bytes (the output matrix in float32) for "
            f"responses longer than a chunk, but workspace_bytes = {workspace_bytes:,}: raise it "
            "or chunk, or use schedule='auto'"
        )
    if schedule == "two_pass" or needed > workspace_bytes or not any(wanted):
        return "two_pass"
    return "one_pass"


def _two_pass(
    hidden_td: Tensor, ids_t: Tensor, head: Head, inputs: LossInputs, chunk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logprobs_t, entropy_t = logprobs_of(hidden_td, ids_t, head, chunk)
    everything = slice(0, len(ids_t)), slice(0, len(inputs.norms_n))
    ratio_n = inputs.ratios(logprobs_t, *everything)
    return inputs.losses(ratio_n).mean(), ratio_n.detach(), logprobs_t.detach(), entropy_t


class _OnePass(torch.autograd.Function):
    """Computes the gradient of the mean loss in the forward pass; the backward pass scales it."""

    @staticmethod
    def forward(ctx, hidden_td, weight_vd, bias_v, ids_t, head, inputs, groups):  # type: ignore[no-untyped-def]
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        rows = max((tile.stop - tile.start for group in groups for tile in group.tiles), default=0)
        tiles = tiles_for(head, rows)
        run = _Run(
            tiles=tiles,
            hidden_td=hidden_td,
            ids_t=ids_t,
            inputs=inputs,
            logprobs_t=hidden_td.new_empty(len(ids_t), dtype=tiles.dtype),
            entropy_t=hidden_td.new_empty(len(ids_t), dtype=tiles.dtype),
            ratio_n=torch.zeros_like(inputs.norms_n),
            dhidden_td=torch.zeros_like(hidden_td) if need_hidden else None,
            sums=WeightSums(tiles, weight=need_weight, bias=need_bias),
            scratch=WeightSums(tiles, weight=need_weight, bias=need_bias),
        )
        for group in groups:
            if len(group.tiles) > 1:
                run.long_response(group)
            else:
                run.short_responses(group)
        if run.dhidden_td is not None and head.tp_group is not None:
            dist.all_reduce(run.dhidden_td, group=head.tp_group)
        ctx.gradients = (run.dhidden_td, *run.sums.gradients())
        loss = inputs.losses(run.ratio_n).mean()
        ctx.mark_non_differentiable(run.ratio_n, run.logprobs_t, run.entropy_t)
        return loss, run.ratio_n, run.logprobs_t, run.entropy_t

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):  # type: ignore[no-untyped-def]
        if ctx.gradients is None:
            raise RuntimeError(
                "A one-pass omd_loss allows one backward pass, because its gradient was computed "
                "in the forward pass and handed over; use schedule='two_pass' for more"
            )
        # Without a reference here, autograd takes the buffers instead of copying them.
        gradients, ctx.gradients = ctx.gradients, None
        factor = float(grad)
        for gradient in gradients:
            if gradient is not None and factor != 1:
                gradient.mul_(factor)
        return *gradients, None, None, None, None


@dataclass
class _Run:
    """One forward pass of ``_OnePass``: its inputs, and the results that each group adds to."""

    tiles: Tiles
    hidden_td: Tensor
    ids_t: Tensor
    inputs: LossInputs
    logprobs_t: Tensor
    entropy_t: Tensor
    ratio_n: Tensor
    dhidden_td: Tensor | None
    sums: WeightSums
    scratch: WeightSums

    def short_responses(self, group: Group) -> None:
        """Compute the coefficients, then the gradient, of responses that share one tile."""
        for rows in group.tiles:  # One tile, or none if no token counts.
            top_c, total_c = self._statistics(rows)
        coefficient_n = self._coefficients(group)
        lengths_n = self.inputs.edges_n[group.first : group.last + 1].diff()
        for rows in group.tiles:
            outer_c = coefficient_n.repeat_interleave(lengths_n)
            if outer_c.any():
                self._add_gradient(rows, top_c, total_c, outer_c, self.sums)

    def long_response(self, group: Group) -> None:
        """Sum the gradient of a response's tiles with coefficient 1, then multiply the sum."""
        sums = self.sums if self.sums.empty else self.scratch
        for rows in group.tiles:
            top_c, total_c = self._statistics(rows)
            self._add_gradient(rows, top_c, total_c, torch.ones_like(top_c), sums)
        coefficient = float(self._coefficients(group))
        if self.dhidden_td is not None:
            self.dhidden_td[group.rows] *= coefficient
        if sums is self.sums:
            sums.scale(coefficient)
        else:
            self.sums.add_scaled(sums, coefficient)

    def _statistics(self, rows: slice) -> tuple[Tensor, Tensor]:
        self.tiles.load(self.hidden_td[rows], self.ids_t[rows])
        found = self.tiles.statistics()
        self.logprobs_t[rows], self.entropy_t[rows] = found.logprobs(), found.entropy()
        return found.top_c, found.total_c

    def _coefficients(self, group: Group) -> Tensor:
        """Coefficients in the mean loss over all responses, float64."""
        responses = slice(group.first, group.last)
        self.ratio_n[responses] = self.inputs.ratios(self.logprobs_t, group.rows, responses)
        found = self.inputs.coefficients(self.ratio_n[responses], responses)
        return found / len(self.ratio_n)

    def _add_gradient(
        self, rows: slice, top_c: Tensor, total_c: Tensor, outer_c: Tensor, sums: WeightSums
    ) -> None:
        dz_cv = self.tiles.gradient(top_c, total_c, outer_c)
        if self.dhidden_td is not None:
            self.tiles.put_dhidden(dz_cv, self.dhidden_td[rows])
        sums.add(dz_cv, self.hidden_td[rows])


def _check_choices(tau: float, normalize: str, schedule: str, workspace_bytes: int) -> None:
    if not tau > 0:
        raise ValueError(f"tau = {tau}: it must be greater than 0")
    if normalize not in get_args(Normalize):
        raise ValueError(f"normalize = {normalize!r}: give one of {get_args(Normalize)}")
    if schedule not in get_args(Schedule):
        raise ValueError(f"schedule = {schedule!r}: give one of {get_args(Schedule)}")
    if workspace_bytes < 0:
        raise ValueError(f"workspace_bytes = {workspace_bytes}: give at least 0")
