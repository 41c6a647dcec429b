"""Whole responses to given contexts, for evaluations and for models that judge."""

from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np

from kimi_core.rollout.engine import Engine
from kimi_core.types import Request, Sampling, Segment


def complete(
    engine: Engine,
    contexts: Sequence[np.ndarray],
    sampling: Sampling,
    *,
    max_tokens: int,
    ids: Sequence[int] | None = None,
    on_end: Callable[[Segment], None] = lambda response: None,
) -> list[Segment]:
    """One response to each context, in order, as one segment with token ids and log-probs.

    Args:
        contexts: token ids, int32 ``[n]`` each; not empty.
        sampling: how to draw.
        max_tokens: length limit of a response, at least 1.
        ids: number of each context's trajectory, which seeds its sampling; None: 0, 1, …
        on_end: called with each response as soon as it has ended.

    Raises:
        ValueError: a context does not fit into the model's vocabulary or context length.
        EngineFailed: the engine could not be kept alive.
    """
    requests = [
        Request(id, context, len(context), budget=max_tokens, remaining=max_tokens)
        for id, context in zip(ids or range(len(contexts)), contexts, strict=True)
    ]
    parts: dict[int, list[Segment]] = {request.trajectory_id: [] for request in requests}
    for segment in chain.from_iterable(engine.generate(requests, sampling)):
        parts[segment.trajectory_id].append(segment)
        if segment.end_reason is not None:
            on_end(_joined(parts[segment.trajectory_id]))
    return [_joined(segments) for segments in parts.values()]


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
