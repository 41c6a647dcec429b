"""vLLM's processes: started, waited for with a deadline, given new weights, ended.

``AsyncLLM`` runs its engine core, and that its workers, in processes of their own. Its event loop
turns only while something of vLLM is waited for, so the trainer needs no thread for it.

vLLM's own weaknesses that this is built around (0.32.0): a utility call never returns if the
engine core dies meanwhile; workers live on when the process that started them is killed; Ctrl-C
in a terminal ends the engine core along with whatever it does.
"""

import asyncio
import os
import signal
import tempfile
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kimi_core.rollout.engine import EngineFailed

INSTALL = "python/install_vllm.sh"

START_S = 600
"""Seconds that vLLM has to start: loading and compiling take minutes on a cold machine."""

CPU_CACHE_BYTES = 1 << 30
"""Of keys and values on a CPU, unless ``kv_cache_memory_bytes`` says otherwise."""

LOOK_S = 0.1
"""How often a wait looks whether vLLM's processes are alive."""

END_S = 15.0
"""How long vLLM may take to end of itself, before it is killed."""

OURS = (
    "model",
    "dtype",
    "load_format",
    "logprobs_mode",
    "skip_tokenizer_init",
    "generation_config",
    "weight_transfer_config",
    "worker_extension_cls",
    "additional_config",
)
"""Arguments of vLLM that a run sets and its config may not."""


class ServerDown(Exception):
    """vLLM's processes died, or did not answer in time; the message says what was waited for."""


class WeightsRefused(Exception):
    """The workers found the new weights unfit; they serve what they had."""


class VLLMServer:
    """One life of vLLM's processes. ``llm`` is the ``AsyncLLM``.

    Args:
        config: the model's.
        dtype: what vLLM computes in.
        options: further arguments of vLLM's ``AsyncEngineArgs``.
        timeout_s: longest wait for an answer.

    Raises:
        ValueError: vLLM does not know one of the options.
        EngineFailed: vLLM did not start.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        dtype: torch.dtype,
        options: Mapping[str, Any],
        *,
        timeout_s: float,
    ):
        _set_environment()
        from vllm.v1.engine.async_llm import AsyncLLM

        self.timeout_s = timeout_s
        self.steps = 0
        """Steps that gave tokens."""
        self.reused_tokens = 0
        """Tokens of contexts whose keys and values were in the prefix cache."""
        self.loop = asyncio.new_event_loop()
        # Only the config is there: the weights come from the arena.
        with tempfile.TemporaryDirectory(prefix="kimi_core-vllm-") as folder:
            arguments = _arguments(config, dtype, folder, options)

            async def start() -> Any:  # Within the loop, where AsyncLLM then watches for errors.
                return AsyncLLM.from_engine_args(arguments, stat_loggers=[self._counter()])

            try:
                with _interrupts_held():
                    self.llm = self.loop.run_until_complete(start())
            except (RuntimeError, TimeoutError) as error:
                self.loop.close()
                raise EngineFailed(
                    f"vLLM did not start (it had {START_S} s): {error}; "
                    "VLLM_LOGGING_LEVEL=INFO shows what it did"
                ) from error

    @property
    def down(self) -> bool:
        return self.llm.errored

    @property
    def pids(self) -> list[int]:
        """Of the engine core's processes; the workers are their children."""
        return [process.pid for process in self._processes]

    def wait(self, work: Awaitable[Any], what: str) -> Any:
        """The result of ``work``, which is vLLM's.

        Raises:
            ServerDown: its processes ended, or the time was up.
            Exception: what ``work`` raises.
        """
        return self.loop.run_until_complete(
            self._wait(asyncio.ensure_future(work, loop=self.loop), what)
        )

    async def _wait(self, task: asyncio.Future[Any], what: str) -> Any:
        deadline = self.loop.time() + self.timeout_s
        while not task.done():
            await asyncio.wait({task}, timeout=LOOK_S)
            if task.done():
                break
            if self.down:
                task.cancel()
                raise ServerDown(f"vLLM's processes ended while {what} was waited for")
            if self.loop.time() > deadline:
                task.cancel()
                raise ServerDown(
                    f"vLLM did not answer within {self.timeout_s:g} s (rollout.vllm.timeout_s) "
                    f"while {what} was waited for"
                )
        return task.result()

    def connect(self, arenas: Sequence[str]) -> None:
        """Name the arena of each rank.

        Raises: WeightsRefused, ServerDown.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        request = WeightTransferInitRequest({"paths": list(arenas)})
        self._hand_over(self.llm.init_weight_transfer_engine(request), "the arena to be opened")

    def serve(self, version: int) -> None:
        """Have every worker verify a version that was published, and only then flip to it.

        Raises: WeightsRefused, ServerDown.
        """
        self.prepare(version)
        self.flip(version)

    def prepare(self, version: int) -> None:
        """Verify; what is served goes on meanwhile."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        async def prepare() -> None:
            await self.llm.start_weight_update()
            await self.llm.update_weights(WeightTransferUpdateRequest({"version": version}))

        try:
            self._hand_over(prepare(), f"version {version} to be verified")
        except WeightsRefused:  # By one rank, and the others may have leased it.
            self.wait(self.llm.collective_rpc("abandon_weight_update"), "an update to be dropped")
            raise

    def flip(self, version: int) -> None:
        """Serve what was prepared, from the next step on."""
        done = self.llm.finish_weight_update(weight_version=str(version))
        self._hand_over(done, f"version {version} to be served")

    def _hand_over(self, work: Awaitable[Any], what: str) -> None:
        try:
            self.wait(work, what)
        except ServerDown:
            raise
        except Exception as error:  # A worker's error comes as a bare one with the message.
            raise WeightsRefused(str(error)) from error

    def close(self, *, kill: bool = False) -> None:
        """End the processes, with ``kill`` at once. Again: nothing happens."""
        if self.loop.is_closed():
            return
        if kill:
            for process in self._processes:
                process.kill()
        self.llm.shutdown(timeout=0.0 if kill else END_S)
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        if tasks:
            self.loop.run_until_complete(asyncio.wait(tasks, timeout=END_S))
        self.loop.close()

    @property
    def _processes(self) -> list[Any]:
        return self.llm.engine_core.resources.engine_manager.processes

    def _counter(self) -> Any:
        from vllm.v1.metrics.loggers import StatLoggerBase

        server = self

        class Counter(StatLoggerBase):
            def __init__(self, vllm_config: Any, engine_index: int = 0):
                pass

            def record(
                self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any
            ) -> None:
                if iteration_stats is not None and iteration_stats.num_generation_tokens:
                    server.steps += 1
                if scheduler_stats is not None:
                    server.reused_tokens += scheduler_stats.prefix_cache_stats.hits

            def log_engine_initialized(self) -> None:
                pass

        return Counter


def check_options(options: Mapping[str, Any]) -> None:
    """Raise ValueError where vLLM is not installed, or the run sets an option itself."""
    if find_spec("vllm") is None:
        raise ValueError(
            "rollout.engine = 'vllm': vLLM is not installed here, and needs an environment of its "
            f"own; `{INSTALL}` makes one and says how to run in it"
        )
    refused = sorted(options.keys() & set(OURS))
    if refused:
        raise ValueError(f"rollout.vllm.args: {', '.join(refused)} cannot be set, the run does")


def _arguments(
    config: PretrainedConfig, dtype: torch.dtype, folder: str, options: Mapping[str, Any]
) -> Any:
    from vllm.config import WeightTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    from kimi_core.rollout.vllm.backend import BACKEND, EXTENSION, OWNER

    written = type(config).from_dict(config.to_dict())
    # A model made from a config alone has no list of architectures.
    written.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    written.save_pretrained(folder)
    arguments: dict[str, Any] = {
        "model": folder,
        "dtype": str(dtype).removeprefix("torch."),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs",  # Of the distribution sampled from.
        "weight_transfer_config": WeightTransferConfig(backend=BACKEND),
        "worker_extension_cls": EXTENSION,
        "additional_config": {OWNER: os.getpid()},
    }
    if current_platform.is_cpu():
        arguments |= {"enforce_eager": True, "kv_cache_memory_bytes": CPU_CACHE_BYTES}
        # Only full blocks are reused, and prompts seldom fill vLLM's default of 128 here.
        arguments["block_size"] = 32
    try:
        return AsyncEngineArgs(**arguments | dict(options))
    except TypeError as error:
        raise ValueError(f"rollout.vllm.args: vLLM does not take this: {error}") from error


def _set_environment() -> None:
    """vLLM reads these when it is imported; what the user has set stays."""
    os.environ.setdefault("VLLM_ENGINE_READY_TIMEOUT_S", str(START_S))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Children born meanwhile never see SIGINT: Ctrl-C is for the trainer, which ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
