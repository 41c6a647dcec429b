"""The tile on a GPU: a GEMM that also computes softmax statistics, and the gradient in place.

``logits_kernel`` multiplies. For each block of columns it stores the largest score, the sum of
e = exp(x), where x = (score − largest) / temperature, and the sum of e·x. The tile stores e in the
inputs' dtype, not the logits. Relative to the block's largest score, 16 bits hold e as precisely as
the later GEMMs can use it (e of a nearly certain token is exactly 1), and ``gradient_kernel`` needs
no second exponential. The vendor's library computes the other two GEMMs.

The tests interpret the kernels on a CPU, compile them for every target, and run them where there
is a GPU. They have run on an H100 (docs/log.md), on no other GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_core.kernels.tiles import Head, Statistics, Tiles

Launch = tuple[int, int, int, int, int]
"""BLOCK_M, BLOCK_N, BLOCK_K, warps and stages of ``logits_kernel``."""

LAUNCH: dict[str, Launch] = {
    "sm_80": (128, 128, 64, 8, 3),
    "sm_90": (128, 128, 64, 8, 4),
    "sm_100": (128, 128, 64, 8, 4),
    "gfx942": (128, 128, 64, 8, 2),
}
"""Settings for 16-bit inputs: large tiles that spill no registers and fit in shared memory
(``benches/compile_kernels.py``). Only those of sm_90 have been timed."""

LAUNCH_PLAIN: dict[str, Launch] = {"sm_90": (128, 256, 64, 8, 3)}
"""Settings for 16-bit inputs without bias and soft cap whose D is a multiple of BLOCK_K. They were
the fastest on an H100 (``benches/tune_kernels.py``): 95 % of the vendor's product."""

LAUNCH_FLOAT32: Launch = (128, 128, 32, 8, 2)
"""Settings for float32 inputs, which every target multiplies without TF32."""

GRADIENT_BLOCK, GRADIENT_WARPS = 1024, 4
SUM_BLOCK, SUM_WARPS = 1024, 4


@triton.jit
def tanh(y):  # type: ignore[no-untyped-def]
    """To 2 units in the last place of float32, also near 0; not every target has a tanh.

    The polynomial is that of Cephes' ``tanhf``. From the exponential alone, small results would
    have an absolute error of 6e-8, which a soft cap multiplies.
    """
    z = y * y
    series = -5.70498872745e-3 * z + 2.06390887954e-2
    series = series * z - 5.37397155531e-2
    series = series * z + 1.33314422036e-1
    series = series * z - 3.33332819422e-1
    return tl.where(tl.abs(y) < 0.625, series * z * y + y, 1.0 - 2.0 / (1.0 + tl.exp(2.0 * y)))


@triton.jit
def logits_kernel(  # type: ignore[no-untyped-def]
    hidden_ptr,  # [M, K]
    weight_ptr,  # [N, K]
    bias_ptr,  # [N]; not read unless HAS_BIAS
    targets_ptr,  # [M], int64; -1 where another rank has it
    tile_ptr,  # [M, N], receives e; not written unless KEEP
    top_ptr,  # [blocks of N, M], float32: of each block of columns, the largest score,
    total_ptr,  # the sum of e,
    weighted_ptr,  # and the sum of e * x
    picked_ptr,  # [M], float32: the target's score
    temperature,
    softcap,  # not read unless HAS_SOFTCAP
    M,
    N,
    K,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    KEEP: tl.constexpr,
    EVEN_K: tl.constexpr,  # K % BLOCK_K == 0: loads along K need no mask
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Neighbouring programs share a block of the weight, by far the larger matrix.
    blocks_m = tl.cdiv(M, BLOCK_M)
    block_n = tl.program_id(0) // blocks_m
    first_row = (tl.program_id(0) % blocks_m) * BLOCK_M
    first_column = block_n * BLOCK_N
    rows = first_row + tl.arange(0, BLOCK_M)
    columns = first_column + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    # The start of a block needs int64, as V * D can exceed 2^31; offsets inside it fit in int32.
    hidden_block = hidden_ptr + first_row.to(tl.int64) * K
    weight_block = weight_ptr + first_column.to(tl.int64) * K
    # Rows and columns past the end repeat the last one; their results are masked below.
    hidden_offsets = (tl.minimum(rows, M - 1) - first_row)[:, None] * K + depth[None, :]
    weight_offsets = (tl.minimum(columns, N - 1) - first_column)[None, :] * K + depth[:, None]
    scores = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            hidden = tl.load(hidden_block + hidden_offsets)
            weight = tl.load(weight_block + weight_offsets)
        else:
            left = K - k
            hidden = tl.load(hidden_block + hidden_offsets, mask=depth[None, :] < left, other=0.0)
            weight = tl.load(weight_block + weight_offsets, mask=depth[:, None] < left, other=0.0)
        # No TF32, which would round float32 inputs.
        scores = tl.dot(hidden, weight, scores, input_precision="ieee")
        hidden_block += BLOCK_K
        weight_block += BLOCK_K
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=columns < N, other=0.0)
        scores += bias.to(tl.float32)[None, :]
    if HAS_SOFTCAP:
        scores = softcap * tanh(scores / softcap)
    # Masked after the cap, which would turn minus infinity into a finite score.
    scores = tl.where(columns[None, :] < N, scores, float("-inf"))

    targets = tl.load(targets_ptr + rows, mask=rows < M, other=-1)
    hit = columns[None, :] == targets[:, None]
    here = (targets >= first_column) & (targets < first_column + BLOCK_N)
    picked = tl.sum(tl.where(hit, scores, 0.0), axis=1)
    tl.store(picked_ptr + rows, picked, mask=here)

    top = tl.max(scores, axis=1)
    # A bias can set a whole block to minus infinity, and minus infinity minus itself is NaN.
    shift = tl.where(top == float("-inf"), 0.0, top)
    # At -1e4 e is 0, and 0 times minus infinity would be NaN.
    x = tl.maximum((scores - shift[:, None]) / temperature, -1e4)
    e = tl.exp(x)
    partial = block_n.to(tl.int64) * M + rows
    tl.store(top_ptr + partial, top, mask=rows < M)
    tl.store(total_ptr + partial, tl.sum(e, axis=1), mask=rows < M)
    tl.store(weighted_ptr + partial, tl.sum(e * x, axis=1), mask=rows < M)
    if KEEP:
        tile_block = tile_ptr + first_row.to(tl.int64) * N + first_column
        tile_offsets = (rows - first_row)[:, None] * N + (columns - first_column)[None, :]
        inside = (rows[:, None] < M) & (columns[None, :] < N)
        tl.store(tile_block + tile_offsets, e.to(tile_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gradient_kernel(  # type: ignore[no-untyped-def]
    tile_ptr,  # [M, N]: e of logits_kernel; receives the gradient
    tops_ptr,  # [blocks of N, M], float32: top_ptr of logits_kernel
    targets_ptr,  # [M], int64
    top_ptr,  # [M], float32: the largest score of the row, of all ranks
    total_ptr,  # [M], float32: the sum of exp((score - top) / temperature), of all ranks
    outer_ptr,  # [M], float32: the gradient from above
    temperature,
    softcap,  # not read unless HAS_SOFTCAP
    M,
    N,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr,  # of logits_kernel
    BLOCK: tl.constexpr,  # columns of a program
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < N
    tile_ptrs = tile_ptr + row * N + columns
    e = tl.load(tile_ptrs, mask=inside, other=0.0).to(tl.float32)
    block_top = tl.load(
        tops_ptr + (columns // BLOCK_N).to(tl.int64) * M + row, mask=inside, other=0.0
    )
    outer = tl.load(outer_ptr + row) / temperature
    p = e * tl.exp((block_top - tl.load(top_ptr + row)) / temperature) / tl.load(total_ptr + row)
    target = columns == tl.load(targets_ptr + row)
    dz = (tl.where(target, 1.0, 0.0) - p) * outer
    if HAS_SOFTCAP:
        # The score is recomputed from e; where e is 0, p is 0 too.
        score = block_top + temperature * tl.log(tl.where(e > 0, e, 1.0))
        dz *= 1.0 - score / softcap * (score / softcap)
    tl.store(tile_ptrs, dz.to(tile_ptr.dtype.element_ty), mask=inside)


@triton.jit
def segment_sum_kernel(  # type: ignore[no-untyped-def]
    values_ptr,  # [T], float32
    edges_ptr,  # [n + 1], int64
    sums_ptr,  # [n], float64
    BLOCK: tl.constexpr,
):
    """One program a response. A fixed order, unlike atomics, gives the same bits every time."""
    response = tl.program_id(0)
    start = tl.load(edges_ptr + response)
    end = tl.load(edges_ptr + response + 1)
    lanes = tl.zeros((BLOCK,), dtype=tl.float64)
    for first in range(start, end, BLOCK):
        offsets = first + tl.arange(0, BLOCK)
        lanes += tl.load(values_ptr + offsets, mask=offsets < end, other=0.0).to(tl.float64)
    tl.store(sums_ptr + response, tl.sum(lanes, axis=0))


class TritonTiles(Tiles):
    """16-bit and float32 tiles on a GPU, stored in the inputs' dtype.

    Args:
        head, rows: as ``Tiles``.
        launch: settings of ``logits_kernel``.
    """

    def __init__(self, head: Head, rows: int, launch: Launch) -> None:
        super().__init__(head, rows)
        self._launch = launch

    @property
    def _tile_dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    def load(self, hidden_cd: Tensor, ids_c: Tensor, *, keep: bool = True) -> None:
        block_m, block_n, block_k, warps, stages = self._launch
        hidden_cd, weight_vd = hidden_cd.contiguous(), self.head.weight.contiguous()
        (count, width), vocab = hidden_cd.shape, len(weight_vd)
        blocks = triton.cdiv(vocab, block_n)
        self._logits_cv = self._tile_cv[:count]
        self._targets_c = self._targets(ids_c)
        partials = hidden_cd.new_empty(3, blocks, count, dtype=torch.float32)
        self._tops_bc, self._totals_bc, self._weighted_bc = partials
        self._picked_c = hidden_cd.new_zeros(count, dtype=torch.float32)
        logits_kernel[(triton.cdiv(count, block_m) * blocks,)](
            hidden_cd,
            weight_vd,
            weight_vd if self._bias_v is None else self._bias_v,
            self._targets_c,
            self._logits_cv,
            *partials,
            self._picked_c,
            self.head.temperature,
            self.head.softcap or 1.0,
            count,
            vocab,
            width,
            HAS_BIAS=self._bias_v is not None,
            HAS_SOFTCAP=self.head.softcap is not None,
            KEEP=keep,
            EVEN_K=width % block_k == 0,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            num_warps=warps,
            num_stages=stages,
        )

    def put_dhidden(self, dz_cv: Tensor, out_cd: Tensor) -> None:
        torch.mm(dz_cv, self.head.weight, out=out_cd)

    def add_dweight(self, dz_cv: Tensor, hidden_cd: Tensor, sum_vd: Tensor, beta: int) -> None:
        if dz_cv.dtype == sum_vd.dtype:
            sum_vd.addmm_(dz_cv.T, hidden_cd, beta=beta)
            return
        torch.addmm(sum_vd, dz_cv.T, hidden_cd, sum_vd.dtype, beta=beta, out=sum_vd)

    def _local_statistics(self) -> Statistics:
        """Statistics of the rows from those of each block of columns."""
        temperature = self.head.temperature
        top_c = self._tops_bc.amax(dim=0)
        shift_bc = ((self._tops_bc.double() - top_c) / temperature).clamp(min=-1e4)
        scale_bc = shift_bc.exp()
        weighted_bc = scale_bc * (self._weighted_bc + shift_bc * self._totals_bc)
        picked_c = (self._picked_c - top_c) / temperature
        return Statistics(
            top_c,
            (scale_bc * self._totals_bc).sum(dim=0),
            torch.where(self._targets_c >= 0, picked_c, 0),
            weighted_bc.sum(dim=0),
        )

    def _gradient(self, top_c: Tensor, total_c: Tensor, outer_c: Tensor) -> Tensor:
        count, vocab = self._logits_cv.shape
        gradient_kernel[(count, triton.cdiv(vocab, GRADIENT_BLOCK))](
            self._logits_cv,
            self._tops_bc,
            self._targets_c,
            top_c,
            total_c.float(),
            outer_c.contiguous(),
            self.head.temperature,
            self.head.softcap or 1.0,
            count,
            vocab,
            HAS_SOFTCAP=self.head.softcap is not None,
            BLOCK_N=self._launch[1],
            BLOCK=GRADIENT_BLOCK,
            num_warps=GRADIENT_WARPS,
        )
        return self._logits_cv


def launch_for(head: Head) -> Launch:
    """Settings for this head and its GPU; for a GPU that is not listed, those of an older one."""
    weight = head.weight
    if weight.dtype == torch.float32:
        return LAUNCH_FLOAT32
    if torch.version.hip:
        return LAUNCH["gfx942"]
    major, _ = torch.cuda.get_device_capability(weight.device)
    target = "sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_80"
    plain = LAUNCH_PLAIN.get(target)
    if plain and head.bias is None and head.softcap is None and weight.shape[1] % plain[2] == 0:
        return plain
    return LAUNCH[target]


class SegmentSum(torch.autograd.Function):
    """Sums of float32 ``values_t`` between edges, float64 ``[n]``, the same bits each time."""

    @staticmethod
    def forward(ctx, values_t, edges_n):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(edges_n)
        sums_n = values_t.new_empty(len(edges_n) - 1, dtype=torch.float64)
        segment_sum_kernel[(len(sums_n),)](
            values_t.contiguous(), edges_n, sums_n, BLOCK=SUM_BLOCK, num_warps=SUM_WARPS
        )
        return sums_n

    @staticmethod
    def backward(ctx, grad_n):  # type: ignore[no-untyped-def]
        (edges_n,) = ctx.saved_tensors
        return grad_n.float().repeat_interleave(edges_n.diff()), None
