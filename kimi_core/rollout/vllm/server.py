"""Starts vLLM's processes, waits for them with a deadline, gives them weights, and ends them.

``AsyncLLM`` runs the engine core in a separate process, and the core runs workers in others. The
event loop of ``AsyncLLM`` runs only while this module waits for vLLM, so it needs no thread.

Three weaknesses of vLLM 0.32.0 shape this module. A utility call never returns if the engine core
dies during the call. Workers survive when the process that started them is killed. Ctrl-C in a
terminal ends the engine core in the middle of its work.
"""

import asyncio
import os
import signal
import tempfile
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from kimi_core.models.vision import Images
from kimi_core.rollout.engine import EngineFailed

INSTALL = "python/install_vllm.sh"

START_S = 600
"""Seconds that vLLM has to start: loading and compiling take minutes on a cold machine."""

CPU_CACHE_BYTES = 1 << 30
"""Bytes for keys and values on a CPU, unless ``kv_cache_memory_bytes`` is set."""

IMAGE_CACHE_GB = 0.25
"""Of processed images, unless ``mm_processor_cache_gb`` is set."""

LOOK_S = 0.1
"""Seconds between two checks that vLLM's processes are alive."""

END_S = 15.0
"""Seconds that vLLM may take to end before it is killed."""

OURS = (
    "data_parallel_size",
    "model",
    "dtype",
    "load_format",
    "logprobs_mode",
    "skip_tokenizer_init",
    "generation_config",
    "weight_transfer_config",
    "worker_extension_cls",
    "additional_config",
    "mm_device_do_normalize",
)
"""Arguments of vLLM that a run sets itself, so that a config cannot."""


class ServerDown(Exception):
    """vLLM's processes died or did not answer in time; the message names what was waited for."""


class WeightsRefused(Exception):
    """A worker refused the new weights; all workers keep the previous version."""


class VLLMServer:
    """vLLM's processes, from their start to their end. ``llm`` is the ``AsyncLLM``.

    Args:
        config: the model's config.
        dtype: of vLLM's weights and arithmetic.
        options: further arguments of vLLM's ``AsyncEngineArgs``.
        timeout_s: longest wait for an answer, in seconds.
        images: the images of prompts; None: the model reads text only.

    Raises:
        ValueError: vLLM does not know one of the options, or there is no processor of images.
        EngineFailed: vLLM did not start.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        dtype: torch.dtype,
        options: Mapping[str, Any],
        *,
        timeout_s: float,
        images: Images | None = None,
    ):
        _set_environment()
        from vllm.v1.engine.async_llm import AsyncLLM

        self.timeout_s = timeout_s
        self.steps = 0
        """Decode steps so far."""
        self.reused_tokens = 0
        """Context tokens whose keys and values were found in the prefix cache."""
        self.loop = asyncio.new_event_loop()
        # The folder has only the config, because the weights come from the arena.
        with tempfile.TemporaryDirectory(prefix="kimi_core-vllm-") as folder:
            arguments = _arguments(config, dtype, folder, options, images)

            async def start() -> Any:  # In the loop, so that AsyncLLM watches for errors.
                return AsyncLLM.from_engine_args(arguments, stat_loggers=[self._counter()])

            try:
                with _interrupts_held():
                    self.llm = self.loop.run_until_complete(start())
            except (RuntimeError, TimeoutError) as error:
                self.loop.close()
                raise EngineFailed(
                    f"vLLM did not start within {START_S} s: {error}; set "
                    "VLLM_LOGGING_LEVEL=INFO to see what it does"
                ) from error

    @property
    def down(self) -> bool:
        return self.llm.errored

    @property
    def pids(self) -> list[int]:
        """Pids of the engine core's processes; the workers are their children."""
        return [process.pid for process in self._processes]

    def wait(self, work: Awaitable[Any], what: str) -> Any:
        """Wait for ``work`` of vLLM and return its result; errors call it ``what``.

        Raises:
            ServerDown: vLLM's processes ended, or ``timeout_s`` passed.
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
                raise ServerDown(f"vLLM's processes ended during the wait for {what}")
            if self.loop.time() > deadline:
                task.cancel()
                raise ServerDown(
                    f"vLLM did not answer within {self.timeout_s:g} s (rollout.vllm.timeout_s) "
                    f"during the wait for {what}"
                )
        return task.result()

    def connect(self, arenas: Sequence[str]) -> None:
        """Have every worker open the arena of its rank.

        Raises: WeightsRefused, ServerDown.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        request = WeightTransferInitRequest({"paths": list(arenas)})
        self._hand_over(
            self.llm.init_weight_transfer_engine(request), "the workers to open the arena"
        )

    def serve(self, version: int) -> None:
        """Have every worker verify a published version, and only then flip to it.

        Raises: WeightsRefused, ServerDown.
        """
        self.prepare(version)
        self.flip(version)

    def prepare(self, version: int) -> None:
        """Have every worker verify a version. Sampling may continue meanwhile."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        async def prepare() -> None:
            await self.llm.start_weight_update()
            await self.llm.update_weights(WeightTransferUpdateRequest({"version": version}))

        try:
            self._hand_over(prepare(), f"the workers to verify version {version}")
        except WeightsRefused:  # One rank refused; the others may have leased the version.
            self.wait(
                self.llm.collective_rpc("abandon_weight_update"), "the workers to drop an update"
            )
            raise

    def flip(self, version: int) -> None:
        """Use the prepared version from the next step on."""
        done = self.llm.finish_weight_update(weight_version=str(version))
        self._hand_over(done, f"the workers to flip to version {version}")

    def _hand_over(self, work: Awaitable[Any], what: str) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            self.wait(work, what)
        except ServerDown:
            raise
        except EngineDeadError as error:  # Noticed by the call before the processes are looked at.
            raise ServerDown(f"vLLM's processes ended during the wait for {what}") from error
        except Exception as error:  # A worker's error arrives as a plain Exception.
            raise WeightsRefused(str(error)) from error

    def close(self, *, kill: bool = False) -> None:
        """End the processes, with ``kill`` immediately. Safe to call twice."""
        if self.loop.is_closed():
            return
        if kill:
            for process in self._processes:
                process.kill()
        self.llm.shutdown(timeout=0.0 if kill else END_S)
        self.loop.run_until_complete(self._finish())
        self.loop.close()

    async def _finish(self) -> None:
        # vLLM has asked the loop to close its sockets. One that stays open would block the end of
        # this process for ever: ZeroMQ waits there for messages to a core that may be dead.
        await asyncio.sleep(0)
        tasks = asyncio.all_tasks(self.loop) - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=END_S)

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
    """Raise ValueError if vLLM is not installed, or if the run sets one of the options itself."""
    if find_spec("vllm") is None:
        raise ValueError(
            "rollout.engine = 'vllm': vLLM is not installed in this environment. It needs a "
            f"separate one; `{INSTALL}` creates it and prints how to run in it"
        )
    refused = sorted(options.keys() & set(OURS))
    if refused:
        raise ValueError(
            f"rollout.vllm.args: {', '.join(refused)} cannot be set, because the run sets them"
            + " (rollout.workers = 2 for two instances)" * ("data_parallel_size" in refused)
        )


def _arguments(
    config: PretrainedConfig,
    dtype: torch.dtype,
    folder: str,
    options: Mapping[str, Any],
    images: Images | None,
) -> Any:
    from vllm.config import WeightTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    from kimi_core.rollout.vllm.backend import BACKEND, EXTENSION, OWNER

    written = type(config).from_dict(config.to_dict())
    # The config of a model that was not loaded from a folder has no list of architectures.
    classes: Mapping[str, Any] = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if images is not None:
        classes = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        images.processor.save_for_vllm(Path(folder))
    written.architectures = [classes[config.model_type]]
    written.save_pretrained(folder)
    arguments: dict[str, Any] = {
        "model": folder,
        "dtype": str(dtype).removeprefix("torch."),
        "load_format": "dummy",
        "skip_tokenizer_init": images is None,  # A processor of images needs a tokenizer.
        "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs",  # Of the sampled distribution.
        "weight_transfer_config": WeightTransferConfig(backend=BACKEND),
        "worker_extension_cls": EXTENSION,
        "additional_config": {OWNER: os.getpid()},
    }
    if images is not None:
        arguments["mm_processor_cache_gb"] = IMAGE_CACHE_GB
        # The tower would normalise pixels with numbers that the dummy weights overwrite.
        arguments["mm_device_do_normalize"] = False
    if current_platform.is_cpu():
        arguments |= {"enforce_eager": True, "kv_cache_memory_bytes": CPU_CACHE_BYTES}
        # Only full blocks are reused, and few prompts fill a block of 128, vLLM's default here.
        arguments["block_size"] = 32
    try:
        return AsyncEngineArgs(**arguments | dict(options))
    except TypeError as error:
        raise ValueError(f"rollout.vllm.args: vLLM refuses an argument: {error}") from error


def _set_environment() -> None:
    """Set what vLLM reads from the environment on import, unless the user has set it."""
    os.environ.setdefault("VLLM_ENGINE_READY_TIMEOUT_S", str(START_S))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Child processes that start meanwhile ignore SIGINT: on Ctrl-C the trainer ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
