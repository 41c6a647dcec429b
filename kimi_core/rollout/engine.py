"""What the loop asks of an inference engine. The embedded torch engine and vLLM both answer it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kimi_core.types import Segment


@dataclass(frozen=True)
class Request:
    """One open trajectory to extend.

    Args:
        trajectory_id: names the trajectory in the segment that comes back, and seeds its sampling.
        token_ids: int32 ``[n]``, the prompt and every segment so far; not empty.
        prompt_length: where the response begins; repeats are looked for from here on.
        budget: output tokens that this call may add, at least 1.
        remaining: output tokens left until the total length limit, at least 1. Reaching it ends the
            response with ``"length"``; spending the budget first leaves it open.
    """

    trajectory_id: int
    token_ids: np.ndarray
    prompt_length: int
    budget: int
    remaining: int

    @property
    def steps(self) -> int:
        """The most tokens that the call may add."""
        return min(self.budget, self.remaining)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, the same for all requests of a call.

    Log-probs are those of the distribution sampled from: ``softmax(logits / temperature)``.
    ``temperature = 0`` takes the most likely token and reports its log-prob at temperature 1.
    A token depends on ``(seed, trajectory_id, position)`` and the model only: not on the batch it
    was drawn in, nor on how a response was cut into segments.
    """

    temperature: float
    seed: int
    stop_token_ids: frozenset[int]
    repeat_window: int = 0
    """A response in which the same ``repeat_window`` tokens stand ``repeat_count`` times ends there
    with ``"repeat"``. 0 looks for nothing."""
    repeat_count: int = 0
    stream_tokens: int = 0
    """A response is handed over every so many tokens while it grows. 0: only when it is done."""


def check_request(request: Request, *, vocabulary: int, context: int | None) -> None:
    """Whether an engine can extend it.

    Args:
        vocabulary: token ids are below it.
        context: positions that the model attends to; None: no limit.

    Raises:
        ValueError: it is empty, or out of the vocabulary or the context.
    """
    who, length = f"trajectory {request.trajectory_id}", len(request.token_ids)
    if length == 0:
        raise ValueError(f"Cannot extend {who}: token_ids is empty; give at least one token")
    if request.steps < 1:
        raise ValueError(
            f"Cannot extend {who}: budget = {request.budget}, remaining = {request.remaining}; "
            "both must be at least 1, leave finished trajectories out"
        )
    lowest, highest = int(request.token_ids.min()), int(request.token_ids.max())
    if lowest < 0 or highest >= vocabulary:
        raise ValueError(
            f"Cannot extend {who}: token ids {lowest} to {highest} are not all within the "
            f"model's vocabulary, 0 to {vocabulary - 1}; is this the model's tokenizer?"
        )
    if context is not None and length + request.steps > context:
        raise ValueError(
            f"Cannot extend {who} from {length} tokens by up to {request.steps}: the model "
            f"attends to {context} positions; lower rollout.max_response_tokens or "
            "rollout.token_budget, or drop the longest prompts"
        )


class EngineFailed(RuntimeError):
    """The engine's processes died, hung or refused what they were given; the message says which.

    What was yielded before stands. The next call starts the engine anew.
    """


class Engine(Protocol):
    """An inference engine. One call is one rollout phase; weights never change within a call."""

    policy_version: int
    """The version of the weights that the engine samples from; written on every segment."""

    @property
    def decode_steps(self) -> int:
        """Steps taken since the engine was made; one adds at most one token to each trajectory."""
        ...

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[list[Segment]]:
        """Extend every request by at most its budget; yield segments as they are complete.

        Those of one step come together. Every request is answered by one segment, or by several in
        order where ``sampling`` streams; each but its last has ``end_reason`` None.
        """
        ...

    def update(self, version: int) -> None:
        """Sample with the trainer's present weights from now on, and write ``version``.

        Raises:
            EngineFailed: they did not get there; what was served before is served on.
        """
        ...

    def close(self) -> None:
        """End its processes and give its memory back. Again: nothing happens."""
        ...
