"""An embedded engine on the arena: a model whose parameters are views of the version served.

In the engine's process, with a model of the trainer's config:

    arena = WeightArena.open("/dev/shm/run")
    binding = bind(model, arena.acquire())
    engine = TorchEngine(model, batch_rows=64, policy_version=binding.version)

and between rollouts, to go on with the newest version:

    engine.policy_version = binding.follow()

Nothing is copied: the parameters point into the slot.
"""

import torch
from torch import nn

from kimi_core.weights.arena import Lease
from kimi_core.weights.layout import Layout


class Binding:
    """A model that reads its weights in an arena, and the lease that lets it; ``bind`` makes one.

    Flip only between forward passes: one that runs meanwhile would use both versions.
    """

    def __init__(self, model: nn.Module, lease: Lease, plan: list[tuple[nn.Parameter, str]]):
        self.model = model
        self.lease = lease
        self._plan = plan

    @property
    def version(self) -> int:
        return self.lease.version

    def flip(self, lease: Lease) -> None:
        """Read another version of the same layout from now on, and release the one before.

        The binding takes the lease over. Verified before, this is a pointer for each parameter.

        Raises:
            ValueError: the version is damaged, older, or of another layout; the model keeps what it
                has, and the lease is released.
        """
        try:
            if lease.version < self.version:
                raise ValueError(
                    f"Cannot go back from version {self.version} to {lease.version}: versions only "
                    "grow"
                )
            if lease.layout.hash != self.lease.layout.hash:
                raise ValueError(
                    f"Version {lease.version} has another layout: "
                    f"{self.lease.layout.difference(lease.layout)}; bind the model anew"
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
        """Flip to what the arena serves, if that is newer; the version that the model has now.

        Raises:
            ValueError: as ``flip``; the model keeps what it has.
        """
        if self.lease.arena.active_version != self.version:
            self.flip(self.lease.arena.acquire())
        return self.version

    def release(self) -> None:
        """Give the model a copy of its weights that is its own, and the lease back."""
        for parameter, _ in self._plan:
            parameter.data = parameter.data.clone()
        self.lease.release()

    def _point_at(self, lease: Lease) -> None:
        views = lease.hf_tensors
        for parameter, name in self._plan:
            parameter.data = views[name]


def bind(model: nn.Module, lease: Lease) -> Binding:
    """Make every parameter of a Hugging Face model a view of what ``lease`` holds, with no copy.

    The binding takes the lease over: keep the binding as long as the model. Tied embeddings stay
    tied. The parameters no longer require gradients, and a store into them is a segmentation fault:
    the memory is read-only, as it is everyone's.

    Raises:
        ValueError: the model has other names, shapes or dtypes than the arena, the arena holds one
            rank's shard, or the version is damaged; the model is untouched.
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
            f"Cannot bind the model: the arena lacks {missing[:3] or 'nothing'}, and holds "
            f"{unread[:3] or 'nothing'} besides; they are of different models"
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
            raise ValueError(f"Cannot bind {name} on {parameter.device}: an arena is CPU memory")
