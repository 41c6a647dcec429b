"""The life of one engine of this host: stopped, asleep or awake, and one step at a time.

    stopped ── start ──► asleep ── wake ──► awake
       ▲                  │  ▲               │ │
       └────── stop ──────┘  └──── sleep ────┘ │
       └──────────────── stop ─────────────────┘

Asleep, the engine's processes have ended. The weights stay in the arena in this host's shared
memory, and ``serve`` puts another version there, asleep or awake (section 2.6.3).
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np

from kimi_core.config import ClusterConfig, Config
from kimi_core.models.load import check_weights, load_model
from kimi_core.models.placement import limit_threads
from kimi_core.rollout.engine import Engine, check_newer
from kimi_core.rollout.load import load_engine
from kimi_core.rollout.texts import complete
from kimi_core.types import Sampling, Segment
from kimi_core.weights.publish import Publisher

State = Literal["stopped", "asleep", "awake"]


class NotNow(RuntimeError):
    """Another step is under way, or the engine's state does not allow this one; it was not done."""


class EngineLife:
    """An engine with its weights. Thread-safe: a step during another one raises NotNow.

    Args:
        config: which engine; ``model``, ``rollout`` and ``cluster.silent_s`` of it are used.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._engine: Engine | None = None
        self._publisher: Publisher | None = None
        self._state: State = "stopped"
        self._model = ""
        self._lock = threading.Lock()
        self._doing = self._fault = ""

    def state(self) -> dict[str, Any]:
        """What the engine is, does, and last failed at. Never waits."""
        engine = self._engine
        return {
            "state": self._state,
            "doing": self._doing,
            "fault": self._fault,
            "model": self._model,
            "version": engine.policy_version if engine else None,
            "decode_steps": engine.decode_steps if engine else 0,
            "restarts": engine.restarts if engine else 0,
        }

    def start(self, model: str, version: int) -> None:
        """Load a model, and have the engine serve its weights as ``version``. It is asleep then.

        Raises:
            NotNow: the engine is not stopped.
            ValueError, ModelUnavailable: there is no such model, or no engine for it.
            EngineFailed: its weights could not be served.
        """
        with self._step("start", "stopped"):
            loaded, _ = load_model(self._config.model.model_copy(update={"name": model}))
            check_weights(loaded)
            limit_threads(loaded)
            hybrid = ClusterConfig(hybrid=True)
            engine, publisher = load_engine(loaded, self._config.rollout, None, cluster=hybrid)
            try:
                publisher.publish(loaded.named_parameters(), version)
                engine.serve(version)
            except BaseException:
                engine.close()
                publisher.close()
                raise
            self._engine, self._publisher, self._model = engine, publisher, model
            self._state = "asleep"

    def serve(self, model: str, version: int) -> None:
        """Sample from the weights of another checkpoint of the same shape from now on.

        Raises:
            NotNow: the engine is stopped.
            ValueError, ModelUnavailable: the version is older, or there are no such weights.
            EngineFailed: they could not be served; the engine keeps the previous version.
        """
        with self._step("serve", "asleep", "awake") as engine:
            assert self._publisher is not None
            check_newer(version, engine.policy_version)
            loaded, _ = load_model(self._config.model.model_copy(update={"name": model}))
            check_weights(loaded)
            self._publisher.publish(loaded.named_parameters(), version)
            engine.serve(version)
            self._model = model

    def wake(self) -> None:
        """Start the engine's processes, with the version that is served.

        Raises:
            NotNow: the engine is not asleep.
            EngineFailed: they did not start; the engine sleeps on.
        """
        with self._step("wake", "asleep") as engine:
            try:
                engine.wake()
            except BaseException:
                engine.sleep()
                raise
            self._state = "awake"

    def sleep(self) -> None:
        """End the engine's processes; their memory is free then. Raises NotNow if not awake."""
        with self._step("sleep", "awake") as engine:
            engine.sleep()
            self._state = "asleep"

    def stop(self) -> None:
        """Give everything back. Raises NotNow if the engine is stopped."""
        with self._step("stop", "asleep", "awake") as engine:
            assert self._publisher is not None
            engine.close()
            self._publisher.close()
            self._engine = self._publisher = None
            self._state, self._model = "stopped", ""

    def generate(
        self, contexts: Sequence[np.ndarray], sampling: Sampling, max_tokens: int
    ) -> list[Segment]:
        """One response to each context, as `texts.complete`. Raises NotNow if not awake."""
        with self._step("generate", "awake") as engine:
            return complete(engine, contexts, sampling, max_tokens=max_tokens)

    @contextmanager
    def _step(self, what: str, *allowed: State) -> Iterator[Any]:
        """Alone, and in a state that allows it. An error is kept for ``state`` as well."""
        if not self._lock.acquire(blocking=False):
            raise NotNow(
                f"Cannot {what}: the engine is busy ({self._doing}); ask again once /state has no "
                "`doing`"
            )
        try:
            if self._state not in allowed:
                raise NotNow(
                    f"Cannot {what}: the engine is {self._state}, and has to be "
                    f"{' or '.join(allowed)}"
                )
            self._doing, self._fault = what, ""
            try:
                yield self._engine
            except Exception as error:
                self._fault = f"{what}: {error}"
                raise
        finally:
            self._doing = ""
            self._lock.release()
