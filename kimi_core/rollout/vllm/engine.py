"""The vLLM engine: sampling in vLLM's processes, with weights from an arena in shared memory.

1. The first call starts vLLM from the model's config alone. The workers open the arenas that the
   trainer publishes into, and serve the weights from there (``rollout/vllm/backend.py``).
2. A call asks for all responses at once. The tokens that come are cut into the same segments as
   the embedded engine's, and repeats are looked for on the way.
3. ``serve`` makes the workers verify the published weights and then flip to them. Keys and values
   of older weights are not reused, because the version is part of the prefix cache's key.
4. Processes that die or hang are replaced at once, with the current version, and asked for the rest
   of each response. Two failures with no token in between end the call.
"""

import asyncio
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig

from kimi_core.models.vision import Images
from kimi_core.rollout.engine import EngineFailed, check_newer, check_request
from kimi_core.rollout.sampling import derived_seed
from kimi_core.rollout.vllm.images import expanded, prompt_with_images
from kimi_core.rollout.vllm.response import Response
from kimi_core.rollout.vllm.server import (
    END_S,
    ServerDown,
    VLLMServer,
    WeightsRefused,
    check_options,
)
from kimi_core.types import Request, Sampling, Segment

CHUNK = 16
"""Most tokens of a response that vLLM hands over at once; a repeat is noticed by then."""

COLDEST = 0.01
"""Below this temperature vLLM replaces the temperature that it was given."""


class VLLMEngine:
    """Implements ``Engine`` with vLLM.

    The same seed gives the same run on the same machine. vLLM draws a response with a seed that
    derives from (seed, trajectory, position at which the call took it up), so a token does not
    depend on the batch it was drawn in. Unlike with the embedded engine it depends on where the
    response was cut: a continued response draws other tokens, of the same distribution, than an
    unbroken one. A restart is such a cut. Greedy responses do not depend on cuts.

    Args:
        config: the model's config.
        dtype: what vLLM computes in.
        arenas: gives the paths of the arenas to bind to, one for each tensor-parallel rank, when
            vLLM starts.
        batch_rows: sequences that an instance decodes together at most.
        instances: of vLLM on this host, over which it spreads the responses. They start and end
            together.
        options: further arguments of vLLM's ``AsyncEngineArgs``.
        timeout_s: longest wait for the next tokens or for new weights, seconds.
        policy_version: the version written on segments until the first ``serve``.
        hybrid: whether vLLM's processes end while the engine sleeps.
        images: the run's images, if prompts have some.

    Raises:
        ValueError: vLLM is not installed here, or the engine sets one of the options itself.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        dtype: torch.dtype,
        arenas: Callable[[], Sequence[str]],
        *,
        batch_rows: int,
        instances: int = 1,
        options: Mapping[str, Any] | None = None,
        timeout_s: float = 300.0,
        policy_version: int = 0,
        hybrid: bool = False,
        images: Images | None = None,
    ):
        self.options = {"max_num_seqs": batch_rows} | dict(options or {})
        check_options(self.options)
        if instances > 1:
            self.options["data_parallel_size"] = instances
        self.config = config
        self.dtype = dtype
        self.timeout_s = timeout_s
        self.policy_version = policy_version
        self.images = images
        self.server: VLLMServer | None = None
        self.hybrid = hybrid
        self.starts = 0
        """How often vLLM was started."""
        text = config.get_text_config(decoder=True)
        self._vocabulary: int = text.vocab_size
        limits = getattr(text, "max_position_embeddings", None), self.options.get("max_model_len")
        self._context = min((limit for limit in limits if limit is not None), default=None)
        self._arenas = arenas
        self._steps_before = 0
        self._requests = 0
        self._busy = False

    @property
    def decode_steps(self) -> int:
        return self._steps_before + (self.server.steps if self.server else 0)

    @property
    def restarts(self) -> int:
        return max(0, self.starts - 1)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[list[Segment]]:
        """Extend every request by at most its budget; yield segments as they are complete.

        Raises:
            ValueError: a request is empty, out of the model's vocabulary or longer than its
                context, or vLLM would not sample at this temperature; at once, before anything is
                generated.
            EngineFailed: vLLM did not start, or went down twice with no token in between.
        """
        images = 0 if self.images is None else len(self.images)
        for request in requests:
            check_request(
                request, vocabulary=self._vocabulary, context=self._context, images=images
            )
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
                        raise EngineFailed(
                            f"{error}; this happened twice with no token in between"
                        ) from error
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
        running, aborted = set(open_), False
        try:
            while running:
                segments: list[Segment] = []
                done: list[asyncio.Task[None]] = []
                for item in server.wait(_take_all(queue), "the next tokens"):
                    if isinstance(item, asyncio.Task):
                        done.append(item)
                        continue
                    response, output = item
                    if response in running:  # Otherwise a repeat has ended it already.
                        aborted |= self._add(response, output)
                        segments += response.ready(self.policy_version)
                        if response.ended:
                            running.remove(response)
                            tasks[response].cancel()  # Aborts the request where vLLM would go on.
                if segments:
                    yield segments
                for task in done:  # Only now, because tokens that came with an error count.
                    _raise_its_error(task)
                if aborted:
                    raise ServerDown("One of vLLM's instances ended in the middle of a response")
        finally:
            for task in tasks.values():
                task.cancel()
            ended, _ = server.loop.run_until_complete(asyncio.wait(tasks.values(), timeout=END_S))
            for task in ended:
                task.cancelled() or task.exception()  # Retrieved, or asyncio would warn.

    async def _follow(
        self, server: VLLMServer, response: Response, sampling: Sampling, queue: asyncio.Queue[Any]
    ) -> None:
        """Put each output of vLLM for one response into the queue, as (response, output)."""
        context = response.context
        params = _sampling_params(response, sampling, position=len(context))
        shown = self.images if (context < 0).any() else None
        self._requests += 1
        async for output in server.llm.generate(
            self._prompt(context, shown), params, str(self._requests)
        ):
            if shown is not None:
                self._check_places(response, output.prompt_token_ids, context)
                shown = None
            queue.put_nowait((response, output))

    def _prompt(self, context: np.ndarray, images: Images | None) -> Any:
        """A context as vLLM takes it, with the salt of its prefix cache."""
        if images is not None:
            return prompt_with_images(images, self.config, context, self.policy_version)
        from vllm import TokensPrompt

        return TokensPrompt(prompt_token_ids=context.tolist(), cache_salt=str(self.policy_version))

    def _check_places(
        self, response: Response, computed: list[int] | None, context: np.ndarray
    ) -> None:
        """Raises EngineFailed: vLLM computes other tokens than the trainer will."""
        expected = expanded(self.config, context)
        if computed not in (None, expected):
            raise EngineFailed(
                f"vLLM took the prompt of trajectory {response.request.trajectory_id} for "
                f"{len(computed)} other tokens than the trainer's {len(expected)}: its processor "
                "does not expand an image as the model's own does; use rollout.engine = 'torch'"
            )

    def _add(self, response: Response, output: Any) -> bool:
        """Add what came to a response. True: vLLM gave it up, because an instance has ended."""
        (completion,) = output.outputs
        if completion.token_ids:
            response.add(completion.token_ids, completion.logprobs.logprobs)
        who = f"trajectory {response.request.trajectory_id}"
        aborted: bool = completion.finish_reason == "abort"
        if completion.finish_reason is not None and not response.ended and not aborted:
            raise EngineFailed(
                f"vLLM ended {who} ({completion.finish_reason}) with {response.left} tokens to go"
            )
        versions = {span.version for span in completion.weight_versions or ()}
        if versions - {str(self.policy_version)}:
            raise EngineFailed(
                f"vLLM sampled {who} with versions {sorted(versions)} of the weights, and not with "
                f"{self.policy_version} alone: does anything else update it?"
            )
        return aborted

    def serve(self, version: int) -> None:
        """Make the workers verify the published weights and sample from them from now on.

        Raises:
            ValueError: a rollout is under way, or the version is older than the present one.
            EngineFailed: the workers refused the weights and keep serving the previous version.
        """
        if self._busy:
            raise ValueError(f"Cannot serve version {version} while a rollout is under way")
        check_newer(version, self.policy_version)
        if self.server is not None and version != self.policy_version:
            try:
                self.server.serve(version)
            except WeightsRefused as error:
                raise EngineFailed(
                    f"vLLM refused version {version} and keeps serving version "
                    f"{self.policy_version}: {error}"
                ) from error
            except ServerDown:
                self._stop()  # The next call starts with these weights.
        self.policy_version = version

    def sleep(self) -> None:
        """End vLLM's processes, if they share the devices with the trainer."""
        if self.hybrid and self.server is not None:
            self.close()
            self.starts -= 1  # The next start is no restart.

    def wake(self) -> None:
        """Start vLLM with the current version, if it ends in every sleep.

        Otherwise it starts with the first request.

        Raises:
            EngineFailed: vLLM did not start.
        """
        if self.hybrid:
            try:
                self._started()
            except ServerDown:
                self._stop()  # The first request starts it again.

    def close(self) -> None:
        """End vLLM's processes. Safe to call twice."""
        if self.server is not None:
            self.server.close()
        self._stop()

    def _started(self) -> VLLMServer:
        """vLLM, serving the current version; started if it is not there or not alive."""
        if self.server is not None and self.server.down:
            self._stop()
        if self.server is None:
            arenas = self._arenas()
            if not arenas:
                raise EngineFailed(
                    f"vLLM has no weights to serve as version {self.policy_version}: publish them "
                    "before the first rollout"
                )
            self.server = VLLMServer(
                self.config,
                self.dtype,
                self.options,
                timeout_s=self.timeout_s,
                images=self.images,
            )
            self.starts += 1
            try:
                self.server.connect(arenas)
                self.server.serve(self.policy_version)
            except WeightsRefused as error:
                self._stop()
                raise EngineFailed(f"vLLM cannot serve this model's weights: {error}") from error
        return self.server

    def _stop(self) -> None:
        """End what is left of vLLM at once."""
        if self.server is not None:
            self._steps_before += self.server.steps
            self.server.close(kill=True)
            self.server = None


def _sampling_params(response: Response, sampling: Sampling, *, position: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=sampling.temperature,
        seed=derived_seed(sampling.seed, response.request.trajectory_id, position),
        stop_token_ids=sorted(sampling.stop_token_ids),
        ignore_eos=True,  # stop_token_ids has everything that ends a response.
        max_tokens=response.left,
        logprobs=0,  # Of the sampled token only.
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        stream_interval=min(CHUNK, sampling.stream_tokens or CHUNK),
    )


async def _take_all(queue: asyncio.Queue[Any]) -> list[Any]:
    """Every item of the queue; waits for the first."""
    items = [await queue.get()]
    while not queue.empty():
        items.append(queue.get_nowait())
    return items


def _raise_its_error(task: asyncio.Task[None]) -> None:
    """Raise ServerDown if vLLM went down during the task, and any other error as it is."""
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    if task.cancelled() or task.exception() is None:
        return
    try:
        task.result()
    except (EngineDeadError, EngineGenerateError) as error:
        raise ServerDown("vLLM's processes ended in the middle of a response") from error
