"""Draws tokens: counter-based random numbers, inverse distribution function, log-probs."""

import numpy as np
import torch

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""The increment of splitmix64 (Steele, Lea and Flood, 2014)."""

MAX_ELEMENTS = 1 << 22
"""Logits handled at the same time; sums in float64 take memory."""

CACHED_ELEMENTS = 1 << 20
"""The same on a CPU, where they stay in the cache from one pass to the next."""

LARGE = 1024
"""Vocabularies from here on are handled in two levels: blocks, and the tokens of one block."""

BLOCK = 64
"""Tokens of a block. Their weights are added in fp32, which costs 1e-7 of the sum at most."""


def uniforms(seed: int, trajectory_ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """One number in [0, 1 − 2⁻⁵²] for each (seed, trajectory, position), in any batch.

    There is no generator and so no state: a token is drawn with the same number when its trajectory
    goes on in another iteration, another row or another batch.

    Args:
        seed: of the run; any integer.
        trajectory_ids, positions: int64 ``[n]``.

    Returns:
        float64 ``[n]``.
    """
    # With 52 bits instead of 53, u × total rounds to less than total, so a token is always found.
    return (_hash(seed, trajectory_ids, positions) >> np.uint64(12)) * 2.0**-52


def derived_seed(seed: int, trajectory_id: int, position: int) -> int:
    """A seed of 63 bits for a generator that draws the tokens after ``position``."""
    bits = _hash(seed, np.array([trajectory_id]), np.array([position]))
    return int(bits[0] >> np.uint64(1))


def _hash(seed: int, trajectory_ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
    key = _mix(np.full(1, seed & 0xFFFFFFFFFFFFFFFF, np.uint64) + GOLDEN)
    key = _mix(key + (trajectory_ids.astype(np.uint64) + np.uint64(1)) * GOLDEN)
    return _mix(key + (positions.astype(np.uint64) + np.uint64(1)) * GOLDEN)


def _mix(x: np.ndarray) -> np.ndarray:
    """The output function of splitmix64 on uint64 ``[n]``; products wrap round."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def draw(
    logits_nv: torch.Tensor, temperature: float, uniform_n: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one token per row from ``softmax(logits / temperature)``.

    Args:
        logits_nv: any float dtype, any device; raised to fp32 here.
        temperature: 0 takes the most likely token and reports its log-prob at temperature 1.
        uniform_n: float64, what ``uniforms`` returns; None at temperature 0.

    Returns:
        Tokens int64 ``[n]`` and their log-probs float32 ``[n]`` in nats, never −inf.
    """
    most = CACHED_ELEMENTS if logits_nv.device.type == "cpu" else MAX_ELEMENTS
    large = logits_nv.shape[1] >= LARGE
    parts_nv = logits_nv.split(max(1, most // logits_nv.shape[1]))
    if temperature == 0:
        most_likely = _most_likely_by_blocks if large else _most_likely
        drawn = [most_likely(part_nv.float()) for part_nv in parts_nv]
    else:
        assert uniform_n is not None
        from_cumulative = _from_cumulative_by_blocks if large else _from_cumulative
        uniform = torch.from_numpy(uniform_n).to(logits_nv.device, non_blocking=True)
        uniform_parts_n = uniform.split(len(parts_nv[0]))
        drawn = [
            from_cumulative(_tempered(part_nv, temperature), part_n)
            for part_nv, part_n in zip(parts_nv, uniform_parts_n, strict=True)
        ]
    tokens, logprobs = (torch.cat(column).cpu().numpy() for column in zip(*drawn, strict=True))
    return tokens, logprobs.astype(np.float32)


def _tempered(logits_nv: torch.Tensor, temperature: float) -> torch.Tensor:
    logits_nv = logits_nv.float()
    return logits_nv if temperature == 1 else logits_nv / temperature


# Both sum in float64. torch's fp32 log_softmax is off by 2e-5 on peaked logits, always in the same
# direction, which adds up over the thousands of tokens of a response.


def _most_likely(logits_nv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The token with the greatest fp32 logit, int64 ``[n]``, and its log-prob, float64 ``[n]``."""
    peak_n, best_n = logits_nv.max(dim=-1)
    total_n = (logits_nv - peak_n[:, None]).exp_().sum(dim=-1, dtype=torch.float64)
    return best_n, -total_n.log_()


def _from_cumulative(
    logits_nv: torch.Tensor, uniform_n: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The token at which the running sum of weights passes ``uniform_n`` of the total.

    Returns as ``_most_likely``.
    """
    peak_n1, best_n1 = logits_nv.max(dim=-1, keepdim=True)
    shifted_nv = logits_nv - peak_n1
    weights_nv = shifted_nv.exp()
    cumulative_nv = weights_nv.cumsum(dim=-1, dtype=torch.float64)
    total_n1 = cumulative_nv[:, -1:]
    token_n1 = torch.searchsorted(cumulative_nv, uniform_n[:, None] * total_n1, right=True)
    # A token of weight 0 is an empty interval and cannot be hit. But a parallel scan on a GPU may
    # not be monotonic in its last bit, and a log-prob of -inf would end the run.
    token_n1 = torch.where(weights_nv.gather(1, token_n1) > 0, token_n1, best_n1)
    logprob_n1 = shifted_nv.gather(1, token_n1) - total_n1.log()
    return token_n1[:, 0], logprob_n1[:, 0]


# On a CPU, torch finds the place of a maximum at a tenth of the speed of the maximum, and its
# cumulative sum in float64 is slower still. Blocks leave both to a few numbers.


def _most_likely_by_blocks(logits_nv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``_most_likely`` returns."""
    logits_nbk = _in_blocks(logits_nv)
    peaks_nb = logits_nbk.amax(dim=-1)
    block_n1 = peaks_nb.argmax(dim=-1, keepdim=True)
    weights_nbk = (logits_nbk - peaks_nb.gather(1, block_n1)[:, :, None]).exp_()
    total_n = weights_nbk.sum(dim=-1).sum(dim=-1, dtype=torch.float64)
    inside_n = _block(logits_nbk, block_n1).argmax(dim=-1)
    return block_n1[:, 0] * BLOCK + inside_n, -total_n.log_()


def _from_cumulative_by_blocks(
    logits_nv: torch.Tensor, uniform_n: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``_from_cumulative`` returns, but for numbers within 1e-7 of the edge of a block."""
    logits_nbk = _in_blocks(logits_nv)
    peak_n = logits_nbk.amax(dim=-1).amax(dim=-1)
    weights_nbk = (logits_nbk - peak_n[:, None, None]).exp_()
    cumulative_nb = weights_nbk.sum(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    total_n = cumulative_nb[:, -1]
    wanted_n1 = (uniform_n * total_n)[:, None]
    block_n1 = torch.searchsorted(cumulative_nb, wanted_n1, right=True)
    before_n1 = cumulative_nb.gather(1, (block_n1 - 1).clamp_(min=0)).where(block_n1 > 0, 0.0)
    weights_nk = _block(weights_nbk, block_n1)
    inside_n1 = torch.searchsorted(
        weights_nk.cumsum(dim=-1, dtype=torch.float64), wanted_n1 - before_n1, right=True
    ).clamp_(max=BLOCK - 1)
    # Rounding may lead to the end of the block, where a weight may be 0, or padding.
    likely_n1 = weights_nk.argmax(dim=-1, keepdim=True)
    inside_n1 = torch.where(weights_nk.gather(1, inside_n1) > 0, inside_n1, likely_n1)
    logit_n = _block(logits_nbk, block_n1).gather(1, inside_n1)[:, 0]
    return (block_n1 * BLOCK + inside_n1)[:, 0], logit_n - peak_n - total_n.log()


def _in_blocks(logits_nv: torch.Tensor) -> torch.Tensor:
    """``[n, b, BLOCK]``; where the vocabulary does not fill the last block, −inf does."""
    missing = -logits_nv.shape[1] % BLOCK
    if missing:
        logits_nv = torch.nn.functional.pad(logits_nv, (0, missing), value=-torch.inf)
    return logits_nv.unflatten(1, (-1, BLOCK))


def _block(values_nbk: torch.Tensor, block_n1: torch.Tensor) -> torch.Tensor:
    """One block of each row, ``[n, BLOCK]``."""
    return values_nbk.gather(1, block_n1[:, :, None].expand(-1, -1, BLOCK))[:, 0]
