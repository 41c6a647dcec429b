"""Handing new weights from the trainer to the engine, between iterations.

The embedded engine samples from the trainer's own parameters, so there is nothing to move: to
publish is to say which version they are from now on. vLLM gets them by way of an arena.
"""

from kimi_core.rollout.engine import Engine
from kimi_core.types import WeightVersion


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
