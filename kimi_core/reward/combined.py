"""Several reward functions at once: a weighted sum whose parts stay visible."""

from collections.abc import Sequence
from dataclasses import dataclass

from kimi_core.reward.base import InfrastructureError, RewardFunction
from kimi_core.types import Score


@dataclass(frozen=True)
class Part:
    """One of several functions."""

    name: str
    """Under which metrics and trajectories show its result."""
    weight: float
    function: RewardFunction


class CombinedReward:
    """Reward functions whose results are added, each times its weight.

    ``judging`` calls the parts, each in the way that it asks for, and then ``combine``.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)

    def combine(
        self, results: Sequence[Score | InfrastructureError]
    ) -> Score | InfrastructureError:
        """One verdict from those of the parts; without one of them there is none.

        The parts of a part's score are shown as ``name.part``.
        """
        total, shown, notes = 0.0, {}, []
        for part, result in zip(self.parts, results, strict=True):
            if isinstance(result, InfrastructureError):
                return result
            total += part.weight * result.value
            shown[part.name] = result.value
            shown |= {f"{part.name}.{name}": value for name, value in result.parts.items()}
            notes += [f"{part.name}: {result.note}"] if result.note else []
        return Score(total, shown, "\n".join(notes))

    def close(self) -> None:
        """Close the parts that can be closed."""
        for part in self.parts:
            close = getattr(part.function, "close", None)
            if close is not None:
                close()


Reward = RewardFunction | CombinedReward
"""What a run judges by."""
