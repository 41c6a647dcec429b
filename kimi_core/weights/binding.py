"""An embedded engine on an arena: a model whose parameters are views of the active version.

In the engine's process, with a model of the trainer's config:

    arena = WeightArena.open("/dev/shm/run")
    binding = bind(model, arena.acquire())
    engine = TorchEngine(model, batch_rows=64, policy_version=binding.version)

and between rollouts, to switch to the newest version:

    engine.policy_version = binding.follow()

Nothing is copied, because the parameters point into the slot. ``rollout/torch/worker.py`` is such
an engine; ``rollout.workers`` starts it.
"""

import torch
from torch import nn

from kimi_core.weights.arena import Lease
from kimi_core.weights.layout import Layout


class Binding:
    """A model that reads its weights from an arena, and the lease on them; made by ``bind``.

    Flip only between forward passes. A pass that runs during a flip would mix both versions.
    """

    def __init__(self, model: nn.Module, lease: Lease, plan: list[tuple[nn.Parameter, str]]):
        self.model = model
        self.lease = lease
        self._plan = plan

    @property
    def version(self) -> int:
        return self.lease.version

    def flip(self, lease: Lease) -> None:
        """Switch to another version of the same layout, and release the previous one.

        The binding takes the lease over. If the lease was verified before, a flip only changes one
        pointer for each parameter.

        Raises:
            ValueError: the version is damaged, older, or of another layout. The model keeps its
                version, and the new lease is released.
        """
        try:
            if lease.version < self.version:
                raise ValueError(
                    f"Cannot go back from version {self.version} to {lease.version}: versions must "
                    "not decrease"
                )
            if lease.layout.hash != self.lease.layout.hash:
                raise ValueError(
                    f"Version {lease.version} has another layout: "
                    f"{self.lease.layout.difference(lease.layout)}; bind the model again"
                )
            if not lease.verified:
                lease.verify()
        except ValueError:
            lease.release()
            raise
        self._point_at(lease)
        before, self.lease = self.lease, lease
        before.release()

    def follow(self) -> int:
        """Flip to the arena's active version if it is newer; return the version the model has now.

        Raises:
            ValueError: as ``flip``; the model keeps its version.
        """
        if self.lease.arena.active_version != self.version:
            self.flip(self.lease.arena.acquire())
        return self.version

    def release(self) -> None:
        """Copy the weights into private memory, and give the lease back."""
        for parameter, _ in self._plan:
            parameter.data = parameter.data.clone()
        self.lease.release()

    def _point_at(self, lease: Lease) -> None:
        views = lease.hf_tensors
        for parameter, name in self._plan:
            parameter.data = views[name]


def bind(model: nn.Module, lease: Lease) -> Binding:
    """Make every parameter of a Hugging Face model a view of the leased version, without a copy.

    The binding takes the lease over; keep the binding as long as the model. Tied embeddings stay
    tied. The parameters stop requiring gradients. A write into them is a segmentation fault,
    because the memory is shared and read-only.

    Raises:
        ValueError: names, shapes or dtypes of model and arena differ, the arena holds one rank's
            shard, or the version is damaged. The model is unchanged.
    """
    plan = [(parameter, name) for name, parameter in model.named_parameters()]
    _check(plan, lease.layout)
    if not lease.verified:
        lease.verify()
    binding = Binding(model, lease, plan)
    for parameter, _ in plan:
        parameter.requires_grad_(False)
        parameter.grad = None
    binding._point_at(lease)
    return binding


def _check(plan: list[tuple[nn.Parameter, str]], layout: Layout) -> None:
    names = {name for _, name in plan}
    missing = sorted(names - layout.by_hf_name.keys())
    unread = sorted(layout.by_hf_name.keys() - layout.tied.keys() - names)
    if missing or unread:
        raise ValueError(
            f"Cannot bind the model: only the model has {missing[:3] or 'nothing'}, and only the "
            f"arena has {unread[:3] or 'nothing'}; make both from the same config"
        )
    for parameter, name in plan:
        entry, part = layout.by_hf_name[name]
        held = (part.shape, getattr(torch, entry.dtype))
        if held != (tuple(parameter.shape), parameter.dtype) or part.shape != part.whole:
            raise ValueError(
                f"Cannot bind {name}: the model has {list(parameter.shape)} {parameter.dtype}, the "
                f"arena {list(part.shape)} {held[1]} on rank {layout.tp_rank} of {layout.tp_size}"
            )
        if parameter.device.type != "cpu":
            raise ValueError(
                f"Cannot bind {name} on {parameter.device}: an arena is CPU memory; move the model "
                "to the CPU first"
            )
