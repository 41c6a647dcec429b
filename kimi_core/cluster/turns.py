"""Who has the device: trainer and engine take turns, and never both are awake (section 2.6.3).

One iteration, with ``cluster.hybrid``:

1. ``engine()``: the engine wakes with the version that was published last, and samples;
2. it sleeps: on a CPU its processes end, and their memory is free;
3. ``trainer()``: the trainer trains and publishes into the arena in host memory;
4. it rests: gradients and cached blocks are given back, and the optimizer has ended with its phase.

Without ``cluster.hybrid`` both have their own device, and only the times are taken.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, Protocol

from kimi_core.rollout.engine import Engine


class Rests(Protocol):
    """What is asked of a trainer here."""

    def rest(self) -> None:
        """Free the device until the next training phase."""
        ...


class Turns:
    """Wakes and rests engine and trainer in turn, and measures each step.

    Args:
        engine: asleep, if the device is shared.
        trainer: at rest.
        shared: whether both have one device.
    """

    def __init__(self, engine: Engine, trainer: Rests, *, shared: bool) -> None:
        self._engine, self._trainer, self._shared = engine, trainer, shared
        self._awake: Literal["engine", "trainer", ""] = ""
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def engine(self) -> Iterator[None]:
        """The engine may sample in the block. An error ends the run, so nothing sleeps then.

        Raises:
            RuntimeError: the device is shared, and the trainer is awake.
        """
        with self._turn("engine"):
            with self.timed("wake"):
                self._engine.wake()
            yield
            with self.timed("sleep"):
                self._engine.sleep()

    @contextmanager
    def trainer(self) -> Iterator[None]:
        """The trainer may train and publish in the block.

        Raises:
            RuntimeError: the device is shared, and the engine is awake.
        """
        with self._turn("trainer"):
            yield
            with self.timed("rest"):
                self._trainer.rest()

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Add the seconds of the block to those of ``step``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[step] += time.perf_counter() - start

    def seconds(self) -> dict[str, float]:
        """Step → its seconds since the last call."""
        found = dict(self._seconds)
        self._seconds.clear()
        return found

    @contextmanager
    def _turn(self, who: Literal["engine", "trainer"]) -> Iterator[None]:
        if self._shared and self._awake:
            raise RuntimeError(
                f"The {who} cannot wake: the {self._awake} is awake, and both share the device"
            )
        before, self._awake = self._awake, who
        try:
            yield
        finally:
            self._awake = before
