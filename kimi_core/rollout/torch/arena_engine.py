"""The embedded engine on an arena, for a trainer whose parameters are sharded over ranks."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from kimi_core.rollout.engine import EngineFailed, check_newer
from kimi_core.rollout.torch.engine import TorchEngine
from kimi_core.weights.arena import WeightArena
from kimi_core.weights.binding import Binding, bind


class ArenaEngine(TorchEngine):
    """A ``TorchEngine`` whose module has the weights of an arena's active version.

    On a CPU the module's parameters are views of the slot, and its own memory is given back at the
    first ``serve``. On a GPU the weights are copied there.

    Args:
        model: a module that nothing else uses, on any device. Its weights are checked here.
        arena: gives the arena, after the first publication.
        settings: as for ``TorchEngine``.

    Raises: as ``TorchEngine``.
    """

    def __init__(
        self, model: PreTrainedModel, arena: Callable[[], WeightArena], **settings: Any
    ) -> None:
        super().__init__(model, **settings)
        self._arena = arena
        self._binding: Binding | None = None

    def serve(self, version: int) -> None:
        """Switch to the version that was published last.

        Raises:
            ValueError: the version is older than the present one.
            EngineFailed: the published weights are damaged or not those of the model; the engine
                keeps the previous version.
        """
        check_newer(version, self.policy_version)
        if self.images is not None:
            self.features.clear()
        try:
            if self.model.device.type != "cpu":
                self._copy()
            elif self._binding is None:
                self._binding = bind(self.model, self._arena().acquire())
            else:
                self._binding.follow()
        except ValueError as error:
            raise EngineFailed(f"Cannot serve version {version}: {error}") from error
        self.policy_version = version

    def close(self) -> None:
        """Give the lease back; the module must not be used any more. Safe to call twice."""
        if self._binding is not None:
            self._binding.lease.release()

    @torch.no_grad()
    def _copy(self) -> None:
        with self._arena().acquire() as lease:
            lease.verify()
            for name, parameter in self.model.named_parameters():
                parameter.copy_(lease.hf_tensors[name])
