"""Whole responses to given contexts, for evaluations and for models that judge."""

from collections.abc import Sequence
from itertools import chain

import numpy as np

from kimi_core.rollout.engine import Engine
from kimi_core.types import Request, Sampling, Segment


def complete(
    engine: Engine, contexts: Sequence[np.ndarray], sampling: Sampling, *, max_tokens: int
) -> list[Segment]:
    """One response to each context, in order, as one segment with token ids and log-probs.

    Args:
        contexts: token ids, int32 ``[n]`` each; not empty.
        sampling: how to draw. Context ``i`` is trajectory ``i``, which seeds its sampling.
        max_tokens: length limit of a response, at least 1.

    Raises:
        ValueError: a context does not fit into the model's vocabulary or context length.
        EngineFailed: the engine could not be kept alive.
    """
    requests = [
        Request(index, ids, len(ids), budget=max_tokens, remaining=max_tokens)
        for index, ids in enumerate(contexts)
    ]
    parts: list[list[Segment]] = [[] for _ in contexts]
    for segment in chain.from_iterable(engine.generate(requests, sampling)):
        parts[segment.trajectory_id].append(segment)
    return [_joined(segments) for segments in parts]


def _joined(segments: Sequence[Segment]) -> Segment:
    if len(segments) == 1:
        return segments[0]
    last = segments[-1]
    return Segment(
        trajectory_id=last.trajectory_id,
        token_ids=np.concatenate([part.token_ids for part in segments]),
        logprobs=np.concatenate([part.logprobs for part in segments]),
        policy_version=last.policy_version,
        end_reason=last.end_reason,
    )
