"""What waits in the buffer of a run right now. The file is opened to read while the run writes."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from kimi_core.buffer import RolloutBuffer, TrajectoryInfo
from kimi_core.dashboard.missing import Missing
from kimi_core.dashboard.tokens import token_texts
from kimi_core.types import PROMPT_VERSION

ROWS_SHOWN = 5_000
"""Trajectories in one list, the oldest first."""


def waiting(run: Path) -> dict[str, Any]:
    """Counts of the buffer, and its trajectories with their segments.

    Raises:
        Missing: the run has no buffer file.
        ValueError: the file is damaged.
    """
    with _opened(run) as buffer:
        stats = buffer.stats()
        infos = buffer.trajectories()
        rows = [_row(buffer, info) for info in infos[:ROWS_SHOWN]]
    newest = max(stats.tokens_by_version, default=0)
    open_tokens: dict[int, int] = defaultdict(int)
    for row in rows:
        if row["end_reason"] is None:
            for version, tokens in row["segments"]:
                open_tokens[newest - version] += tokens
    return {
        "newest_version": newest,
        "trajectories": stats.trajectories,
        "unfinished": stats.unfinished,
        "tokens": stats.tokens,
        "file_bytes": (run / "buffer.bin").stat().st_size,
        "pages_free": stats.pages_free,
        "pages": stats.pages,
        "ages": sorted((newest - v, n) for v, n in stats.tokens_by_version.items()),
        "open_ages": sorted(open_tokens.items()),
        "rows": rows,
    }


def waiting_response(run: Path, trajectory_id: int) -> dict[str, Any]:
    """One trajectory of the buffer, with the keys of a line of ``trajectories/``.

    Raises:
        Missing: there is no such buffer or trajectory; it may just have been evicted.
        ValueError: the file or the trajectory is damaged.
    """
    with _opened(run) as buffer:
        try:
            found, segments = buffer.read(trajectory_id), buffer.segments(trajectory_id)
        except KeyError:
            raise Missing(
                f"The buffer does not hold response {trajectory_id} any more: see the iteration "
                "that trained it"
            ) from None
    ids, start = found.token_ids.tolist(), found.prompt_length
    texts = token_texts(run / "tokenizer.json", ids)
    return {
        "trajectory_id": trajectory_id,
        "group_id": found.group_id,
        "prompt_id": found.prompt_id,
        "end_reason": found.end_reason,
        "prompt": None if texts is None else "".join(texts[:start]),
        "response": None if texts is None else "".join(texts[start:]),
        "versions": [(v, n) for _, n, v in segments if v != PROMPT_VERSION],
        "prompt_ids": ids[:start],
        "token_ids": ids[start:],
        "engine_logprobs": found.logprobs[start:].tolist(),
        "token_texts": None if texts is None else texts[start:],
    }


def _opened(run: Path) -> RolloutBuffer:
    try:
        return RolloutBuffer.open(run / "buffer.bin", readonly=True)
    except FileNotFoundError:
        raise Missing(f"{run.name} has no buffer.bin: its first rollout has not begun") from None


def _row(buffer: RolloutBuffer, info: TrajectoryInfo) -> dict[str, Any]:
    try:
        segments = buffer.segments(info.trajectory_id)
    except (KeyError, ValueError):  # Evicted meanwhile, or damaged.
        segments = []
    return vars(info) | {"segments": [(v, n) for _, n, v in segments if v != PROMPT_VERSION]}
