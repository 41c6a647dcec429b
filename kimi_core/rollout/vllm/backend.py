"""vLLM's side of the hand-over: lease a version, verify it, flip to it between two steps.

vLLM imports this module in each of its workers, named as ``worker_extension_cls``; that registers
the transfer backend ``kimi_arena``. No file of vLLM is changed. The phases are vLLM's own:

1. ``init_weight_transfer_engine``: open the rank's arena; its layout must be this model's.
2. ``start_weight_update``: forget what an update that broke off had prepared.
3. ``update_weights``: lease the version and verify it: names, shapes, dtypes, every checksum. The
   model is not touched, so this may go on while it serves.
4. ``finish_weight_update``: commit. On a CPU each parameter becomes a view of the leased slot.
   Where CUDA graphs or compiled code hold a parameter's address, the slot is copied there instead.

A worker handles one call at a time, a forward pass or one of these, so 4 falls between two steps. A
fault in 1 to 3 is an error to the caller, and the version before is served on.

The copying side has run on CPUs only, never on a GPU.
"""

import os
import select
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.config import CompilationMode, set_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.parameter import ModelWeightParameter

from kimi_core.weights.arena import Lease, WeightArena
from kimi_core.weights.layout import Layout

BACKEND = "kimi_arena"
EXTENSION = f"{__name__}.ArenaWorker"
OWNER = "kimi_core_owner"
"""Key of vLLM's ``additional_config``: the trainer's pid. A worker whose owner is gone ends, and
with it the engine core; else they would stay for ever."""


@dataclass
class ArenaInit(WeightTransferInitInfo):
    """Where the weights are."""

    paths: list[str]
    """The arena of each tensor-parallel rank."""
    copy: bool = False
    """Copy the slot to the parameters' own addresses even where they could be views of it."""


@dataclass
class ArenaUpdate(WeightTransferUpdateInfo):
    """What to serve next."""

    version: int


class ArenaTransferEngine(WeightTransferEngine[ArenaInit, ArenaUpdate]):
    """Serves what a ``WeightArena`` holds. vLLM makes one in each worker, behind its model."""

    init_info_cls = ArenaInit
    update_info_cls = ArenaUpdate
    supports_draft_weight_update = False

    arena: WeightArena | None = None
    prepared: Lease | None = None
    serving: Lease | None = None
    """What the parameters are views of; None where they are copies."""
    version: int | None = None
    copies: bool = False

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: nn.Module):
        super().__init__(config, vllm_config, device, model)
        self.plan: list[tuple[nn.Parameter, torch.Tensor]] = []
        if device.type == "cpu":
            keep_plain(model)  # Now, before anything is compiled or run with the packed weights.
        if owner := vllm_config.additional_config.get(OWNER):
            _end_with(owner)

    def init_transfer_engine(self, init_info: ArenaInit) -> None:
        """Open this rank's arena.

        Raises:
            ValueError: it is damaged, or of another model, dtype or rank.
        """
        rank, size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        # vLLM has changed classes of transformers that it serves models with: they want its config.
        with set_current_vllm_config(self.vllm_config):
            layout = Layout.from_config(
                self.model_config.hf_text_config,
                dtype=self.model_config.dtype,
                tp_rank=rank,
                tp_size=size,
            )
        self.arena = WeightArena.open(init_info.paths[rank], layout=layout)
        compiled = self.vllm_config.compilation_config.mode != CompilationMode.NONE
        self.copies = init_info.copy or self.device.type != "cpu" or compiled or bool(layout.note)
        if not layout.note:
            _check_fit(layout, self.model)
        if self.copies:  # To memory of the parameters' own, which they may not have yet.
            for parameter in self.model.parameters():
                parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
            self._release_served()

    def start_weight_update(self) -> None:
        self.forget_prepared()

    def receive_weights(self, update_info: ArenaUpdate) -> None:
        """Lease and verify; the model keeps what it has.

        Raises:
            ValueError: another version is served by the arena, or a tensor is damaged.
        """
        assert self.arena is not None, "init_weight_transfer_engine comes first"
        lease = self.arena.acquire()
        try:
            if lease.version != update_info.version:
                raise ValueError(
                    f"{self.arena.path} serves version {lease.version}, not {update_info.version}: "
                    "publish it first, and let one process publish"
                )
            lease.verify()
        except BaseException:
            lease.release()
            raise
        self.prepared = lease
        if not lease.layout.note:  # Now, as to walk through the model takes longer than the flip.
            views = lease.tensors
            self.plan = [(p, views[name]) for name, p in self.model.named_parameters()]

    def finish_weight_update(self) -> None:
        """Serve what was prepared, from the next step on."""
        lease = self.prepared
        assert lease is not None, "update_weights comes first"
        if self.copies:
            self._copy(lease)
            lease.release()
        else:
            for parameter, view in self.plan:
                parameter.data = view
            self._release_served()
            self.serving = lease
        self.prepared, self.version = None, lease.version

    def forget_prepared(self) -> None:
        if self.prepared is not None:
            self.prepared.release()
            self.prepared = None

    def _release_served(self) -> None:
        if self.serving is not None:
            self.serving.release()
            self.serving = None

    def shutdown(self) -> None:
        """Let go of what is not served; views stay valid as long as the model."""
        self.forget_prepared()

    @torch.no_grad()
    def _copy(self, lease: Lease) -> None:
        if lease.layout.note:  # Hugging Face's names: vLLM's loader fuses and shards.
            self.model.load_weights(lease.hf_tensors.items())
            return
        for parameter, view in self.plan:
            parameter[: len(view)].copy_(view, non_blocking=True)
        torch.accelerator.synchronize()  # The slot may be written again once it is released.


WeightTransferEngineFactory.register_engine(BACKEND, ArenaTransferEngine)


class ArenaWorker:
    """What a vLLM worker can be asked for besides; mixed into its class."""

    weight_transfer_engine: ArenaTransferEngine
    _weight_update_active: bool

    def abandon_weight_update(self) -> None:
        """End an update that failed, on this rank or another; what is served stays."""
        self._weight_update_active = False
        self.weight_transfer_engine.forget_prepared()

    def weights_served(self) -> dict[str, Any]:
        """The version served, whether its parameters are views of the arena, where the first of
        them lies, and the worker's pid."""
        engine = self.weight_transfer_engine
        return {
            "version": engine.version,
            "views": not engine.copies,
            "address": next(engine.model.parameters()).data_ptr(),
            "pid": os.getpid(),
        }


def keep_plain(model: nn.Module) -> None:
    """Undo vLLM's repacking of Linear weights on CPUs, which deletes the originals.

    A repacked copy would have to be made anew of each version; plain weights can be views. Costs 5
    to 27 % of the CPU time of a step.
    """
    packed: Any
    for packed in model.modules():
        if not hasattr(packed, "cpu_linear"):
            continue
        packed.cpu_linear = nn.functional.linear
        if packed.weight.numel() == 0:
            rows = getattr(packed, "output_size_per_partition", None) or packed.output_size
            columns = getattr(packed, "input_size_per_partition", None) or packed.input_size
            # The shape without the memory, until the first version comes.
            plain = packed.weight.new_zeros(()).expand(rows, columns)
            loader = getattr(packed, "weight_loader_v2", None) or packed.weight_loader
            packed.weight = ModelWeightParameter(
                data=plain, input_dim=1, output_dim=0, weight_loader=loader
            )


def _check_fit(layout: Layout, model: nn.Module) -> None:
    """Every parameter has its entry, of its shape; of a vocabulary, the rows that are not padding.

    Raises:
        ValueError: it is not so; the message names what differs.
    """
    entries = {entry.name: entry.shape for entry in layout.entries}
    parameters = dict(model.named_parameters())
    missing, unknown = parameters.keys() - entries.keys(), entries.keys() - parameters.keys()
    if missing or unknown:
        raise ValueError(
            f"The arena is of another model than vLLM has: it lacks {sorted(missing)[:3]}, and "
            f"vLLM does not know {sorted(unknown)[:3]}"
        )
    padded = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, VocabParallelEmbedding)
    }
    for name, parameter in parameters.items():
        shape = tuple(parameter.shape)
        rows_fit = shape[0] == entries[name][0] or (name in padded and shape[0] > entries[name][0])
        if not rows_fit or shape[1:] != entries[name][1:]:
            raise ValueError(f"{name} is {shape} in vLLM and {entries[name]} in the arena")


def _end_with(pid: int) -> None:
    """End this process when that one does.

    Raises:
        ProcessLookupError: it has ended.
    """
    owner = os.pidfd_open(pid)

    def wait() -> None:
        select.select([owner], [], [])
        os._exit(1)

    threading.Thread(target=wait, name="kimi_core owner", daemon=True).start()
