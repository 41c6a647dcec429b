"""Weight updates inside vLLM's workers: lease a version, verify it, flip to it between two steps.

vLLM imports this module in each worker, because it is the ``worker_extension_cls``. The import
registers the transfer backend ``kimi_arena``. No file of vLLM is changed. vLLM defines the phases:

1. ``init_weight_transfer_engine``: open the rank's arena and compare its layout with the model.
2. ``start_weight_update``: drop what an unfinished update has prepared.
3. ``update_weights``: lease the version and verify names, shapes, dtypes and every checksum. The
   model does not change, so sampling may continue meanwhile.
4. ``finish_weight_update``: flip. On a CPU each parameter becomes a view of the leased slot. CUDA
   graphs and compiled code keep the addresses of parameters, so there the slot is copied instead.

A worker handles one call at a time, a forward pass or a phase, so phase 4 happens between two
steps. If phase 1, 2 or 3 fails, the caller gets the error, and vLLM keeps the previous version.

The copy has run on CPUs only, never on a GPU.
"""

import os
import select
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
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

from kimi_core.models.load import auto_class
from kimi_core.models.names import names_in_files
from kimi_core.weights.arena import Lease, WeightArena
from kimi_core.weights.layout import Layout

BACKEND = "kimi_arena"
EXTENSION = f"{__name__}.ArenaWorker"
OWNER = "kimi_core_owner"
"""Key of vLLM's ``additional_config`` with the trainer's pid. A worker ends when the trainer has
ended, and the engine core ends with the worker. Otherwise both would run for ever."""


@dataclass
class ArenaInit(WeightTransferInitInfo):
    """Argument of ``init_weight_transfer_engine``: where the weights are."""

    paths: list[str]
    """The arena of each tensor-parallel rank."""
    copy: bool = False
    """Copy the weights even if the parameters could be views of the slot."""


@dataclass
class ArenaUpdate(WeightTransferUpdateInfo):
    """Argument of ``update_weights``: the version to verify."""

    version: int


class ArenaTransferEngine(WeightTransferEngine[ArenaInit, ArenaUpdate]):
    """Takes a worker's weights from a ``WeightArena``. vLLM creates one in each worker."""

    init_info_cls = ArenaInit
    update_info_cls = ArenaUpdate
    supports_draft_weight_update = False

    arena: WeightArena | None = None
    prepared: Lease | None = None
    serving: Lease | None = None
    """The lease on the slot that the parameters are views of; None if they are copies."""
    version: int | None = None
    copies: bool = False

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: nn.Module):
        super().__init__(config, vllm_config, device, model)
        self.plan: list[tuple[nn.Parameter, torch.Tensor]] = []
        self.names: dict[str, str] = {}
        """Name of a tensor in the arena → its name in files that vLLM loads, where they differ."""
        if device.type == "cpu":
            keep_plain(model)  # Before anything is compiled or run with the packed weights.
        if owner := vllm_config.additional_config.get(OWNER):
            _end_with(owner)

    def init_transfer_engine(self, init_info: ArenaInit) -> None:
        """Open this rank's arena.

        Raises:
            ValueError: the arena is damaged, or has another model, dtype or rank.
        """
        rank, size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        whole = self.model_config.hf_config
        reads_images = getattr(whole, "vision_config", None) is not None
        # vLLM has patched classes of transformers so that they need its config.
        with set_current_vllm_config(self.vllm_config):
            layout = Layout.from_config(
                whole if reads_images else self.model_config.hf_text_config,
                dtype=self.model_config.dtype,
                tp_rank=rank,
                tp_size=size,
            )
            if reads_images:
                self.names = published_names(whole, layout)
        self.arena = WeightArena.open(init_info.paths[rank], layout=layout)
        compiled = self.vllm_config.compilation_config.mode != CompilationMode.NONE
        self.copies = init_info.copy or self.device.type != "cpu" or compiled or bool(layout.note)
        if not layout.note:
            _check_fit(layout, self.model)
        if self.copies:  # Allocate the parameters, which have no memory yet after keep_plain.
            for parameter in self.model.parameters():
                parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
            self._release_served()

    def start_weight_update(self) -> None:
        self.forget_prepared()

    def receive_weights(self, update_info: ArenaUpdate) -> None:
        """Lease the version and verify it; the model does not change.

        Raises:
            ValueError: the arena's active version is another one, or a tensor is damaged.
        """
        assert self.arena is not None, "init_weight_transfer_engine comes first"
        lease = self.arena.acquire()
        try:
            if lease.version != update_info.version:
                raise ValueError(
                    f"The active version of {self.arena.path} is {lease.version}, not "
                    f"{update_info.version}; publish that version first, from one process only"
                )
            lease.verify()
        except BaseException:
            lease.release()
            raise
        self.prepared = lease
        if not lease.layout.note:  # Collected now, because it takes longer than the flip.
            views = lease.tensors
            self.plan = [(p, views[name]) for name, p in self.model.named_parameters()]

    def finish_weight_update(self) -> None:
        """Use the prepared version from the next step on."""
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
        """Release a prepared version. The parameters stay valid as long as the model."""
        self.forget_prepared()

    @torch.no_grad()
    def _copy(self, lease: Lease) -> None:
        if lease.layout.note:  # Hugging Face names, which vLLM's loader fuses and shards.
            named = lease.hf_tensors.items()
            self.model.load_weights((self.names.get(name, name), one) for name, one in named)
            return
        for parameter, view in self.plan:
            parameter[: len(view)].copy_(view, non_blocking=True)
        torch.accelerator.synchronize()  # A released slot may be overwritten.


WeightTransferEngineFactory.register_engine(BACKEND, ArenaTransferEngine)


class ArenaWorker:
    """Methods that vLLM mixes into its worker class, to be called by ``collective_rpc``."""

    weight_transfer_engine: ArenaTransferEngine
    _weight_update_active: bool

    def abandon_weight_update(self) -> None:
        """Drop an update that failed on any rank; keep the present version."""
        self._weight_update_active = False
        self.weight_transfer_engine.forget_prepared()

    def weights_served(self) -> dict[str, Any]:
        """The worker's version, whether parameters are views of the arena, the address of the first
        parameter, and the pid."""
        engine = self.weight_transfer_engine
        return {
            "version": engine.version,
            "views": not engine.copies,
            "address": next(engine.model.parameters()).data_ptr(),
            "pid": os.getpid(),
        }


def published_names(config: PretrainedConfig, layout: Layout) -> dict[str, str]:
    """Name of a tensor in the arena → its name in the files of published models of that family."""
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    names = names_in_files(model, layout.by_hf_name, published=True)
    return {name: other for name, other in names.items() if other}


def keep_plain(model: nn.Module) -> None:
    """Undo vLLM's repacking of Linear weights on CPUs, which deletes the originals.

    Every new version would have to be repacked, while plain weights can be views of a slot. Plain
    weights cost 5 to 27 % of the CPU time of a step.
    """
    packed: Any
    for packed in model.modules():
        if not hasattr(packed, "cpu_linear"):
            continue
        packed.cpu_linear = nn.functional.linear
        if packed.weight.numel() == 0:
            rows = getattr(packed, "output_size_per_partition", None) or packed.output_size
            columns = getattr(packed, "input_size_per_partition", None) or packed.input_size
            # The shape without memory, until the first version arrives.
            plain = packed.weight.new_zeros(()).expand(rows, columns)
            loader = getattr(packed, "weight_loader_v2", None) or packed.weight_loader
            packed.weight = ModelWeightParameter(
                data=plain, input_dim=1, output_dim=0, weight_loader=loader
            )


def _check_fit(layout: Layout, model: nn.Module) -> None:
    """Check that each parameter has an entry of the same shape. A vocabulary may have padding rows.

    Raises:
        ValueError: names or shapes differ; the message says which.
    """
    entries = {entry.name: entry.shape for entry in layout.entries}
    parameters = dict(model.named_parameters())
    missing, unknown = parameters.keys() - entries.keys(), entries.keys() - parameters.keys()
    if missing or unknown:
        raise ValueError(
            f"The arena and vLLM have different models: only vLLM has {sorted(missing)[:3]}, and "
            f"only the arena has {sorted(unknown)[:3]}"
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
    """End this process when the process ``pid`` ends.

    Raises:
        ProcessLookupError: it has ended already.
    """
    owner = os.pidfd_open(pid)

    def wait() -> None:
        select.select([owner], [], [])
        os._exit(1)

    threading.Thread(target=wait, name="kimi_core owner", daemon=True).start()
