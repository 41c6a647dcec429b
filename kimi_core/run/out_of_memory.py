"""What to lower, and to how much, when memory runs out."""

import traceback

from kimi_core.config import Config


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of the CPU or of a GPU ran out, however torch says it."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or "allocate memory" in said or "out of memory" in said


def advice(error: BaseException, config: Config) -> str:
    """One line: what ran out, in which phase, and settings that need about half of it there.

    >>> advice(MemoryError(), Config())[:64]
    'Out of memory (MemoryError). Give rollout.batch_rows=512 (now 10'
    """
    trainer, rollout = config.trainer, config.rollout
    rows, passes = rollout.batch_rows, trainer.tokens_per_micro_batch
    sampling: dict[str, tuple[float, float]] = {"rollout.batch_rows": (max(1, rows // 2), rows)}
    training: dict[str, tuple[float, float]] = {
        "trainer.tokens_per_micro_batch": (max(1, passes // 2), passes),
        "trainer.head_chunk": (max(1, trainer.head_chunk // 2), trainer.head_chunk),
    }
    if trainer.memory_gb is not None:
        training["trainer.memory_gb"] = (trainer.memory_gb / 2, trainer.memory_gb)
    phase = _phase(error)
    lower = {"rollout": sampling, "training": training}.get(phase, sampling | training)
    settings = ", ".join(f"{key}={to:g} (now {now})" for key, (to, now) in lower.items())
    what = " ".join(str(error).split())[:200] or type(error).__name__
    return (
        f"Out of memory{f' in {phase}' if phase else ''} ({what}). Give {settings}. --resume takes "
        "them and goes on from the last saved state; `kimi train --dry-run` names the memory of a "
        "run"
    )


def _phase(error: BaseException) -> str:
    """``rollout`` or ``training``, by the code that the error came from; empty: neither."""
    places = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    for place in reversed(places):
        for folder, phase in (("rollout", "rollout"), ("trainer", "training")):
            if f"kimi_core/{folder}/" in place:
                return phase
    return ""
