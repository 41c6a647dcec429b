"""Handing new weights from the trainer to the engines.

An engine in the trainer's own process samples from the trainer's parameters, so there is nothing to
move: to ``publish`` is to say which version they are from now on. Engines in other processes read
them in an arena: ``publish_model`` puts a copy there, as the vLLM engine does when it is updated.
Either happens between iterations, never while a rollout runs.

The trainer does not keep its parameters in a slot, though publishing would then be a flip: the slot
that was flipped must not be trained in, so that the next update would have to begin in another one,
with a copy of the same bytes. The one pass of publishing is that copy.
"""

from torch import nn

from kimi_core.rollout.engine import Engine
from kimi_core.types import WeightVersion
from kimi_core.weights.arena import PUBLISH_S, WeightArena


def publish(engine: Engine, version: WeightVersion) -> None:
    """Make ``engine`` sample from, and write on its segments, ``version``.

    Raises:
        ValueError: the version is not newer than the one that the engine has.
        EngineFailed: the weights did not get there; the engine serves what it had.
    """
    if not version > WeightVersion(engine.policy_version):
        raise ValueError(
            f"Cannot publish version {version.number}: the engine has {engine.policy_version} "
            "already, and versions only grow"
        )
    engine.update(version.number)


def publish_model(
    model: nn.Module,
    version: WeightVersion,
    arena: WeightArena,
    *,
    deadline_s: float = PUBLISH_S,
    threads: int | None = None,
) -> None:
    """Serve a Hugging Face model's parameters as ``version`` to every engine on ``arena``.

    Parameters on a GPU are first copied to host memory, all of them.

    Raises: ValueError and TimeoutError as `WeightArena.publish`; what was served is served on.
    """
    arena.publish(
        model.named_parameters(), version=version.number, deadline_s=deadline_s, threads=threads
    )
