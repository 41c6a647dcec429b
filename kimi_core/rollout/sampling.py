"""Drawing tokens: counter-based random numbers, inverse distribution function, log-probs."""

import numpy as np
import torch

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""The increment of splitmix64 (Steele, Lea and Flood, 2014)."""

MAX_ELEMENTS = 1 << 22
"""Logits worked on at a time: the float64 sums of a large vocabulary would not fit otherwise."""


def uniforms(seed: int, trajectory_ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """One number in [0, 1 − 2⁻⁵²] for each (seed, trajectory, position), whatever the batch.

    There is no generator and so no state: a token is drawn with the same number when its trajectory
    goes on in another iteration, another row or another batch.

    Args:
        seed: of the run; any integer.
        trajectory_ids, positions: int64 ``[n]``.

    Returns:
        float64 ``[n]``.
    """
    key = _mix(np.full(1, seed & 0xFFFFFFFFFFFFFFFF, np.uint64) + GOLDEN)
    key = _mix(key + (trajectory_ids.astype(np.uint64) + np.uint64(1)) * GOLDEN)
    bits = _mix(key + (positions.astype(np.uint64) + np.uint64(1)) * GOLDEN)
    # 52 bits, not 53: then u × total rounds below total, and the last token's edge is never passed.
    return (bits >> np.uint64(12)) * 2.0**-52


def _mix(x: np.ndarray) -> np.ndarray:
    """The output function of splitmix64 on uint64 ``[n]``; products wrap round."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def draw(
    logits_nv: torch.Tensor, temperature: float, uniform_n: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one token a row from ``softmax(logits / temperature)``.

    Args:
        logits_nv: any float dtype, any device; raised to fp32 here.
        temperature: 0 takes the most likely token and reports its log-prob at temperature 1.
        uniform_n: float64, what ``uniforms`` returns; not read at temperature 0.

    Returns:
        Tokens int64 ``[n]`` and their log-probs float32 ``[n]`` in nats, never −inf.
    """
    uniform = torch.from_numpy(uniform_n).to(logits_nv.device, non_blocking=True)
    rows = max(1, MAX_ELEMENTS // logits_nv.shape[1])
    drawn = [
        _draw(block_nv, temperature, block_n)
        for block_nv, block_n in zip(logits_nv.split(rows), uniform.split(rows), strict=True)
    ]
    # Token ids fit a float64 exactly, so that one transfer brings both.
    tokens, logprobs = torch.cat(drawn, dim=1).cpu().numpy()
    return tokens.astype(np.int64), logprobs.astype(np.float32)


def _draw(logits_nv: torch.Tensor, temperature: float, uniform_n: torch.Tensor) -> torch.Tensor:
    """``draw`` for rows that fit in memory at once; tokens and log-probs as float64 ``[2, n]``."""
    scaled_nv = logits_nv.float() / (temperature or 1.0)
    peak_n1, best_n1 = scaled_nv.max(dim=-1, keepdim=True)
    shifted_nv = scaled_nv - peak_n1
    weights_nv = shifted_nv.exp()
    # The sum is taken in float64: torch's fp32 log_softmax is off by 2e-5 on peaked logits, always
    # to the same side, which adds up over the thousands of tokens of a response.
    if temperature == 0:
        token_n1 = best_n1
        total_n1 = weights_nv.sum(dim=-1, keepdim=True, dtype=torch.float64)
    else:
        cumulative_nv = weights_nv.cumsum(dim=-1, dtype=torch.float64)
        total_n1 = cumulative_nv[:, -1:].contiguous()
        token_n1 = torch.searchsorted(cumulative_nv, uniform_n[:, None] * total_n1, right=True)
        # A token of weight 0 is an empty interval and cannot be hit. A parallel scan, as on a GPU,
        # need not be monotonic in its last bit, though, and a log-prob of -inf would end the run.
        token_n1 = torch.where(weights_nv.gather(1, token_n1) > 0, token_n1, best_n1)
    logprob_n1 = shifted_nv.gather(1, token_n1).double() - total_n1.log()
    return torch.stack([token_n1[:, 0].double(), logprob_n1[:, 0]])
