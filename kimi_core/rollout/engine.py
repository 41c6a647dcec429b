"""What the loop asks of an engine. ``TorchEngine``, ``VLLMEngine`` and ``Fleet`` implement it."""

from collections.abc import Iterator, Sequence
from typing import Protocol

from kimi_core.types import Request, Sampling, Segment, SegmentColumns


def check_request(
    request: Request, *, vocabulary: int, context: int | None, images: int = 0
) -> None:
    """Refuse a request that an engine cannot extend.

    Args:
        vocabulary: number of token ids that the model knows.
        context: number of positions that the model attends to; None: no limit.
        images: number of images that the engine knows, which the ids from -1 down name.

    Raises:
        ValueError: the request has no tokens or no budget, or exceeds vocabulary or context.
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
    if lowest < -images or highest >= vocabulary:
        named = f", with images from {-images}" if images else ""
        raise ValueError(
            f"Cannot extend {who}: token ids {lowest} to {highest} are not all within the "
            f"model's vocabulary, 0 to {vocabulary - 1}{named}; is this the model's tokenizer?"
        )
    if context is not None and length + request.steps > context:
        raise ValueError(
            f"Cannot extend {who} from {length} tokens by up to {request.steps}: the model "
            f"attends to {context} positions; lower rollout.max_response_tokens or "
            "rollout.token_budget, or drop the longest prompts"
        )


def order(request: Request) -> tuple[int, bytes]:
    """How requests are sorted: by length, and equal contexts are neighbours."""
    return len(request.token_ids), request.token_ids.tobytes()


def check_newer(version: int, present: int) -> None:
    """Refuse to go back to older weights.

    Raises:
        ValueError: ``version`` is lower than the engine's present one.
    """
    if version < present:
        raise ValueError(
            f"Cannot serve version {version}: the engine serves {present}, and versions only grow"
        )


class EngineFailed(RuntimeError):
    """The engine's processes died, hung or refused their input; the message says which.

    Segments that were yielded before stay valid. The next call starts the engine again.
    """


class Engine(Protocol):
    """An inference engine.

    It samples from weights that the trainer published: it either reads a module that shares the
    trainer's parameters, or binds to an arena in shared memory. One call of ``generate`` is one
    rollout phase, and the weights never change within a call.
    """

    policy_version: int
    """The version of the weights that the engine samples from; it is written on every segment."""

    @property
    def decode_steps(self) -> int:
        """Decode steps since the engine was made; a step adds at most one token to a trajectory."""
        ...

    @property
    def restarts(self) -> int:
        """How often a process of the engine was started in place of one that was lost."""
        ...

    def generate(
        self, requests: Sequence[Request], sampling: Sampling
    ) -> Iterator[list[Segment] | SegmentColumns]:
        """Extend every request by at most its budget; yield segments as they are complete.

        Segments of one decode step, or of one message, come together. A request is answered by one
        segment, or by several in order if ``sampling`` streams; all but its last have
        ``end_reason`` None.
        """
        ...

    def serve(self, version: int) -> None:
        """Sample from the weights that were published as ``version`` from now on.

        Raises:
            ValueError: a rollout is under way, or the version is older than the present one.
            EngineFailed: the weights could not be loaded; the engine keeps the previous version.
        """
        ...

    def sleep(self) -> None:
        """Give the device to the trainer until ``wake``. Safe to call twice."""
        ...

    def wake(self) -> None:
        """Take the device back for a rollout. Safe to call twice."""
        ...

    def close(self) -> None:
        """End the engine's processes and free its memory. Safe to call twice."""
        ...
