"""The learning rate over the steps of SFT and over the iterations of RL.

It depends on the number of the step and on nothing else, so a resumed run goes on exactly. Within
an iteration of RL it is constant, because the optimizer is new in each.
"""

import math

from kimi_core.config import ScheduleConfig


def share_of_peak(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """What the peak learning rate is multiplied by in step ``step`` of ``steps``, from 0 on.

    Step ``i`` of a warm-up of ``n`` steps has the share ``(i + 1) / n``. Then comes the peak, from
    which the rate falls towards ``schedule.lowest``. Steps after the last one have that of the end.

    >>> half = ScheduleConfig(shape="linear", warmup=0.5, lowest=0.0)
    >>> [share_of_peak(half, step, 8) for step in range(8)]
    [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    warmup = max(1, int(schedule.warmup * steps)) if schedule.warmup else 0
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    fall = 1 - schedule.lowest
    if schedule.shape == "linear":
        return 1 - fall * progress
    if schedule.shape == "cosine":
        return schedule.lowest + fall / 2 * (1 + math.cos(math.pi * progress))
    return 1.0
