"""Draws tokens: counter-based random numbers, inverse distribution function, log-probs."""

import numpy as np
import torch

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""The increment of splitmix64 (Steele, Lea and Flood, 2014)."""

MAX_ELEMENTS = 1 << 22
"""Logits handled at the same time; the float64 sums of a large vocabulary need much memory."""


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
    blocks_nv = logits_nv.split(max(1, MAX_ELEMENTS // logits_nv.shape[1]))
    if temperature == 0:
        drawn = [_most_likely(block_nv.float()) for block_nv in blocks_nv]
    else:
        assert uniform_n is not None
        uniform = torch.from_numpy(uniform_n).to(logits_nv.device, non_blocking=True)
        uniform_blocks_n = uniform.split(len(blocks_nv[0]))
        drawn = [
            _from_cumulative(block_nv.float() / temperature, block_n)
            for block_nv, block_n in zip(blocks_nv, uniform_blocks_n, strict=True)
        ]
    tokens, logprobs = (torch.cat(column).cpu().numpy() for column in zip(*drawn, strict=True))
    return tokens, logprobs.astype(np.float32)


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
