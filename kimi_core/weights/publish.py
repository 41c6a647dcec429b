"""Handing new weights from the trainer to the engine.

The embedded engine samples from the trainer's own parameters, so there is nothing to move: to
publish is to say which version they are from now on. It happens between iterations, never while a
rollout runs.
"""

from kimi_core.rollout.engine import Engine
from kimi_core.types import WeightVersion


def publish(engine: Engine, version: WeightVersion) -> None:
    """Make ``engine`` sample from, and write on its segments, ``version``.

    Raises:
        ValueError: the version is not newer than the one that the engine has.
    """
    if not version > WeightVersion(engine.policy_version):
        raise ValueError(
            f"Cannot publish version {version.number}: the engine has {engine.policy_version} "
            "already, and versions only grow"
        )
    engine.policy_version = version.number
