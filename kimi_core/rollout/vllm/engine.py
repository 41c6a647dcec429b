"""The vLLM engine: sampling in processes of its own, with the trainer's weights by way of an arena.

1. The first call starts vLLM, from the model's config alone. The trainer's weights are published
   into an arena in shared memory; the workers serve them from there (``weights/vllm_backend.py``).
2. A call asks for all responses at once; what comes is cut into segments as the embedded engine
   cuts them, and repeats are looked for on the way.
3. ``update`` publishes new weights; the workers verify them, then flip. Keys and values of older
   weights are not reused: the version is part of the prefix cache's key.
4. Processes that die or hang are replaced at once, with the current version, and asked for the rest
   of each response. Twice without a token in between ends the call.
"""

import asyncio
import os
import shutil
import tempfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kimi_core.rollout.engine import EngineFailed, Request, Sampling, check_request
from kimi_core.rollout.sampling import derived_seed
from kimi_core.rollout.vllm.response import Response
from kimi_core.rollout.vllm.server import (
    END_S,
    ServerDown,
    VLLMServer,
    WeightsRefused,
    check_options,
)
from kimi_core.types import Segment, WeightVersion
from kimi_core.weights.arena import WeightArena
from kimi_core.weights.layout import Layout
from kimi_core.weights.publish import publish_model

CHUNK = 16
"""Tokens of a response that vLLM hands over at once, at most; by then a repeat is noticed."""

SLOTS = 3
"""Of an arena: the version served, one that was refused, and the one after that."""

MARGIN = 1 << 24
"""Bytes of shared memory left free: the arena's header and what vLLM itself puts there."""

COLDEST = 0.01
"""Below this temperature vLLM samples at another one than it was told."""


class VLLMEngine:
    """Implements ``Engine`` with vLLM.

    The same seed gives the same run on the same machine: vLLM draws a response with a seed that
    derives from (seed, trajectory, position at which the call took it up). So a token does not
    depend on the batch it was drawn in; but, unlike with the embedded engine, it does on where the
    response was cut: to continue it draws other tokens, of the same distribution, than to go on
    would have. A restart is such a cut. Greedy responses do not depend on cuts.

    Args:
        model: the trainer's; its parameters are what ``update`` hands over.
        batch_rows: sequences decoded side by side at most.
        options: further arguments of vLLM's ``AsyncEngineArgs``.
        timeout_s: longest wait for the next tokens, or for an update of the weights.
        start_timeout_s: longest wait for vLLM to start.
        policy_version: written on every segment.

    Raises:
        ValueError: vLLM is not installed here, or an option is one that the engine sets itself.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        batch_rows: int,
        options: Mapping[str, Any] | None = None,
        timeout_s: float = 300.0,
        start_timeout_s: float = 600.0,
        policy_version: int = 0,
    ):
        self.options = {"max_num_seqs": batch_rows} | dict(options or {})
        check_options(self.options)
        self.model = model
        self.timeout_s = timeout_s
        self.start_timeout_s = start_timeout_s
        self.policy_version = policy_version
        self.server: VLLMServer | None = None
        self.starts = 0
        """How often vLLM was started."""
        text = model.config.get_text_config(decoder=True)
        self._vocabulary: int = text.vocab_size
        limits = getattr(text, "max_position_embeddings", None), self.options.get("max_model_len")
        self._context = min((limit for limit in limits if limit is not None), default=None)
        self._arenas: list[tuple[WeightArena, int]] = []
        """Of each tensor-parallel rank, with a file descriptor that keeps it open."""
        self._steps_before = 0
        self._requests = 0
        self._busy = False

    @property
    def decode_steps(self) -> int:
        return self._steps_before + (self.server.steps if self.server else 0)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[list[Segment]]:
        """Extend every request by at most its budget; yield segments as they are complete.

        Raises:
            ValueError: a request is empty, out of the model's vocabulary or longer than its
                context, or vLLM would not sample at this temperature; at once, before anything is
                generated.
            EngineFailed: vLLM did not start, or went down twice with no token in between.
        """
        for request in requests:
            check_request(request, vocabulary=self._vocabulary, context=self._context)
        if 0 < sampling.temperature < COLDEST:
            raise ValueError(
                f"temperature = {sampling.temperature}: vLLM samples at {COLDEST} instead; give at "
                "least that, or 0 for the most likely tokens"
            )
        return self._generate([Response(request, sampling) for request in requests], sampling)

    def _generate(self, open_: list[Response], sampling: Sampling) -> Iterator[list[Segment]]:
        if self._busy:
            raise ValueError("The engine is generating already: exhaust or close that call first")
        self._busy, went_down = True, False
        try:
            while open_:
                try:
                    with closing(self._stream(self._started(), open_, sampling)) as stream:
                        for segments in stream:
                            went_down = False
                            yield segments
                except ServerDown as error:
                    self._stop()
                    if went_down:
                        raise EngineFailed(f"{error}; twice, with nothing in between") from error
                    went_down = True
                open_ = [response for response in open_ if not response.ended]
        finally:
            self._busy = False

    def _stream(
        self, server: VLLMServer, open_: Sequence[Response], sampling: Sampling
    ) -> Generator[list[Segment], None, None]:
        """Ask for the rest of each response; segments as they are complete.

        Raises: ServerDown; responses keep what had come.
        """
        queue: asyncio.Queue[Any] = asyncio.Queue()
        tasks = {
            response: server.loop.create_task(self._follow(server, response, sampling, queue))
            for response in open_
        }
        for task in tasks.values():
            task.add_done_callback(queue.put_nowait)
        running = set(open_)
        try:
            while running:
                segments: list[Segment] = []
                done: list[asyncio.Task[None]] = []
                for item in server.wait(_take_all(queue), "the next tokens"):
                    if isinstance(item, asyncio.Task):
                        done.append(item)
                        continue
                    response, output = item
                    if response in running:  # Else it ended with a repeat, and this came after it.
                        self._add(response, output)
                        segments += response.ready(self.policy_version)
                        if response.ended:
                            running.remove(response)
                            tasks[response].cancel()  # Aborts the request where vLLM would go on.
                if segments:
                    yield segments
                for task in done:  # Only now: what came along with an error counts.
                    _raise_its_error(task)
        finally:
            for task in tasks.values():
                task.cancel()
            ended, _ = server.loop.run_until_complete(asyncio.wait(tasks.values(), timeout=END_S))
            for task in ended:
                task.cancelled() or task.exception()  # Seen, so that asyncio does not complain.

    async def _follow(
        self, server: VLLMServer, response: Response, sampling: Sampling, queue: asyncio.Queue[Any]
    ) -> None:
        """Put what vLLM makes of one response into the queue, with the response."""
        from vllm import TokensPrompt

        context = response.context
        prompt = TokensPrompt(
            prompt_token_ids=context.tolist(), cache_salt=str(self.policy_version)
        )
        params = _sampling_params(response, sampling, position=len(context))
        self._requests += 1
        async for output in server.llm.generate(prompt, params, str(self._requests)):
            queue.put_nowait((response, output))

    def _add(self, response: Response, output: Any) -> None:
        (completion,) = output.outputs
        if completion.token_ids:
            response.add(completion.token_ids, completion.logprobs.logprobs)
        who = f"trajectory {response.request.trajectory_id}"
        if completion.finish_reason is not None and not response.ended:
            raise EngineFailed(
                f"vLLM ended {who} ({completion.finish_reason}) with {response.left} tokens to go"
            )
        versions = {span.version for span in completion.weight_versions or ()}
        if versions - {str(self.policy_version)}:
            raise EngineFailed(
                f"vLLM sampled {who} with versions {sorted(versions)} of the weights, and not with "
                f"{self.policy_version} alone: does anything else update it?"
            )

    def update(self, version: int) -> None:
        """Hand the trainer's present weights over, and write ``version`` from now on.

        Raises:
            ValueError: a rollout is under way, or the version is not newer than the last.
            EngineFailed: the workers refused the weights, and serve what they had.
            TimeoutError: the arena has no idle slot; the message names its readers.
        """
        if self._busy:
            raise ValueError(f"Cannot serve version {version} while a rollout is under way")
        if self.server is not None:
            self._publish(version)
            try:
                self.server.serve(version)
            except WeightsRefused as error:
                raise EngineFailed(
                    f"vLLM refused version {version} and serves {self.policy_version} on: {error}"
                ) from error
            except ServerDown:
                self._stop()  # The next call starts with these weights.
        self.policy_version = version

    def close(self) -> None:
        """End vLLM's processes and give the arena's memory back. Again: nothing happens."""
        if self.server is not None:
            self.server.close()
        self._stop()
        for arena, descriptor in self._arenas:
            arena.close()
            os.close(descriptor)
        self._arenas = []

    def _started(self) -> VLLMServer:
        """vLLM, serving the current version; started if it is not there or not alive."""
        if self.server is not None and self.server.down:
            self._stop()
        if self.server is None:
            self._make_arenas()
            if self._arenas[0][0].active_version != self.policy_version:
                self._publish(self.policy_version)
            self.server = VLLMServer(
                self.model,
                self.options,
                timeout_s=self.timeout_s,
                start_timeout_s=self.start_timeout_s,
            )
            self.starts += 1
            try:
                # By way of our descriptors: the files have no names.
                self.server.connect([f"/proc/{os.getpid()}/fd/{fd}" for _, fd in self._arenas])
                self.server.serve(self.policy_version)
            except WeightsRefused as error:
                self._stop()
                raise EngineFailed(f"vLLM cannot serve this model's weights: {error}") from error
        return self.server

    def _stop(self) -> None:
        """End what there is of vLLM at once."""
        if self.server is not None:
            self._steps_before += self.server.steps
            self.server.close(kill=True)
            self.server = None

    def _make_arenas(self) -> None:
        """In shared memory and nameless, so that nothing is left of them if we are killed."""
        size = self.options.get("tensor_parallel_size", 1)
        for rank in range(len(self._arenas), size):
            layout = Layout.from_config(
                self.model.config, dtype=self.model.dtype, tp_rank=rank, tp_size=size
            )
            folder = tempfile.TemporaryDirectory(
                dir=_memory(SLOTS * layout.payload_bytes), prefix="kimi_core-"
            )
            with folder as name:
                path = Path(name) / "weights"
                arena = WeightArena.create(path, layout, slots=SLOTS)
                self._arenas.append((arena, os.open(path, os.O_RDWR)))

    def _publish(self, version: int) -> None:
        for arena, _ in self._arenas:
            publish_model(self.model, WeightVersion(version), arena)


def _memory(size: int) -> str | None:
    """A folder in shared memory; None, for one on disk, where it has no room (as in containers).

    A file on disk is as fast while its pages are in memory.
    """
    memory = Path("/dev/shm")
    room = shutil.disk_usage(memory).free if memory.is_dir() else 0
    return str(memory) if room > size + MARGIN else None


def _sampling_params(response: Response, sampling: Sampling, *, position: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=sampling.temperature,
        seed=derived_seed(sampling.seed, response.request.trajectory_id, position),
        stop_token_ids=sorted(sampling.stop_token_ids),
        ignore_eos=True,  # What ends a response is in stop_token_ids.
        max_tokens=response.left,
        logprobs=0,  # The sampled token's alone.
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        stream_interval=min(CHUNK, sampling.stream_tokens or CHUNK),
    )


async def _take_all(queue: asyncio.Queue[Any]) -> list[Any]:
    """What is in the queue, at least one item."""
    items = [await queue.get()]
    while not queue.empty():
        items.append(queue.get_nowait())
    return items


def _raise_its_error(task: asyncio.Task[None]) -> None:
    """Raise ServerDown if vLLM went down under it, and any other error as it is."""
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    if task.cancelled() or task.exception() is None:
        return
    try:
        task.result()
    except (EngineDeadError, EngineGenerateError) as error:
        raise ServerDown("vLLM's processes ended in the middle of a response") from error
