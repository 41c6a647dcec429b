"""The embedded engine: batched decoding with a Hugging Face model in the trainer's process.

1. Requests wait in the order of their contexts' lengths, the longest first.
2. Free rows take the next requests. Each distinct context is prefilled once, in micro-batches of
   about equal lengths, and stored in the rows of all samples that share it. A long context is
   prefilled alone, in chunks of ``PREFILL_TOKENS`` that begin at fixed positions.
3. A decode step extends every row by one token. Rows of about the same length attend together (see
   ``kv_cache``). Other rows move into the places of rows that end, so the batch stays dense. A
   row's tokens are handed over when it ends, and every ``stream_tokens`` before that.
"""

import logging
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from inspect import signature
from itertools import groupby, product
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from kimi_core.models import packed_attention
from kimi_core.models.inputs import Inputs, has_mrope
from kimi_core.models.switches import length_to_check, switches
from kimi_core.models.vision import Bounded, Images, inputs_of, is_frozen
from kimi_core.rollout.engine import check_newer, check_request, order
from kimi_core.rollout.sampling import draw, uniforms
from kimi_core.rollout.torch import attention
from kimi_core.rollout.torch.head import head_logits
from kimi_core.rollout.torch.kv_cache import WORTH_A_COHORT, Cohort, KVCache
from kimi_core.rollout.torch.layers import attention_layers, has_alibi
from kimi_core.rollout.torch.rows import Rows
from kimi_core.types import Request, Sampling, Segment

PREFILL_TOKENS = 4096
"""Tokens, padding included, in one forward pass of a prefill, and so of a chunk of a context."""

WORTH_A_PASS = 64
"""Tokens that a prefill waits for; with fewer, reading the weights takes longer than using them."""

WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Kernels of SDPA on a GPU. cuDNN's would make a plan for every new shape, which every decode step
has: on an H100 the calls took 8 ms each, 80 % of a small model's rollout."""

log = logging.getLogger(__name__)

Mask = torch.Tensor | dict[str, torch.Tensor | None] | None


class TorchEngine:
    """Implements ``Engine`` on any causal model of transformers with plain attention.

    Every step reads the module's parameters as they are. In the trainer's process they are the
    trainer's parameters (``weights.publish.module_to_read``), so ``serve`` only names the version.

    Args:
        model: the module to read, on any device, in any dtype. The constructor checks that a small
            batch decoded through the cache has the logits of a plain forward pass.
        batch_rows: sequences decoded together at most.
        policy_version: the version written on every segment.
        longest: tokens of the longest sequence of the run, if it is known; the check crosses the
            windows and original contexts that such sequences cross.
        images: the run's images, if prompts have some.

    Raises:
        ValueError: the model keeps a state other than keys and values, or the check fails.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        batch_rows: int,
        policy_version: int = 0,
        longest: int | None = None,
        images: Images | None = None,
    ):
        if batch_rows < 1:
            raise ValueError(f"batch_rows = {batch_rows}: at least 1 row is needed")
        self.model = model
        self.batch_rows = batch_rows
        self.policy_version = policy_version
        self.decode_steps = 0
        self.restarts = 0
        self.images = images
        self.features = Bounded()
        """Of images, for as long as the weights that make them stay the same."""
        self.windows, self.max_positions = attention_layers(model)
        self.embedding = model.get_input_embeddings()
        self.plain_head = True
        # transformers renames the argument; models from before 5.24 have the old name alone.
        takes = signature(model.base_model.forward).parameters
        self.cache_argument = "cache" if "cache" in takes else "past_key_values"
        self.split = (
            model.config._attn_implementation in ("sdpa", packed_attention.NAME)
            and model._supports_attention_backend
        )
        self.position_bytes = WORTH_A_COHORT  # Until it is known.
        self._check_model(length_to_check(model, longest))
        if not self.split and (longest or self.max_positions or np.inf) > PREFILL_TOKENS:
            log.warning(
                "%s does not take the engine's attention, so each context is prefilled in one pass",
                type(model).__name__,
            )

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[list[Segment]]:
        """Extend every request by at most its budget; yield segments as they are complete.

        The model is in eval mode, and attends by ``attention``, until the iterator is exhausted or
        closed.

        Raises:
            ValueError: a request is empty, exceeds the model's vocabulary or its context. Raised at
                once, before anything is generated.
        """
        for request in requests:
            self.check(request)
        return self._generate(requests, sampling)

    def check(self, request: Request) -> None:
        """Raise ValueError if the model cannot extend ``request``."""
        limits = self.embedding.num_embeddings, self.max_positions
        images = 0 if self.images is None else len(self.images)
        check_request(request, vocabulary=limits[0], context=limits[1], images=images)

    def serve(self, version: int) -> None:
        """Write ``version`` on segments from now on: the module shares the published parameters.

        Raises:
            ValueError: the version is older than the present one.
        """
        check_newer(version, self.policy_version)
        if self.images is not None and not is_frozen(self.model):
            self.features.clear()
        self.policy_version = version

    def sleep(self) -> None:
        """Do nothing: the trainer works on the same parameters, and the cache lives in a call."""

    def wake(self) -> None:
        """Do nothing, as ``sleep`` does."""

    def close(self) -> None:
        """Do nothing: the module belongs to the caller."""

    def _generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[list[Segment]]:
        if not requests:
            return
        waiting, most = sorted(requests, key=order), max(request.steps for request in requests)
        rows = Rows(min(self.batch_rows, len(requests)), most, sampling)
        with closing(self.steps(waiting, rows)) as steps:
            yield from filter(None, steps)

    def steps(self, waiting: list[Request], rows: Rows) -> Generator[list[Segment]]:
        """Extend requests that ``check`` allows; one list of segments a step, which may be empty.

        Args:
            waiting: sorted by ``order``; entries are taken from the end. Between two steps the
                caller may put in others, or take some out.
            rows: where they grow. Empty, and with room for as many tokens as any request may add.
        """
        cache = self._cache()
        with self._lent():
            while waiting or rows.count:
                free = rows.capacity - rows.count
                if _time_to_enter(waiting, free, rows.capacity):
                    entering = waiting[-free:][::-1]
                    del waiting[-free:]
                    first_row = rows.count
                    logits_nv = self._enter(rows, cache, entering)
                else:
                    first_row = 0
                    logits_nv = self._decode(rows, cache)
                self.decode_steps += 1
                yield self._append(rows, cache, first_row, logits_nv)

    @contextmanager
    def _lent(self) -> Iterator[None]:
        """Put the model into eval mode with our attention, and afterwards back."""
        model, was_training = self.model, self.model.training
        text = model.config.get_text_config()  # A vision tower attends as it always does.
        implementation = text._attn_implementation
        model.eval()
        if self.split:
            text._attn_implementation = attention.NAME
        on_gpu = self.embedding.weight.is_cuda
        try:
            with sdpa_kernel(WITHOUT_PLANS) if on_gpu else nullcontext():
                yield
        finally:
            text._attn_implementation = implementation
            model.train(was_training)

    def _cache(self) -> KVCache:
        like = self.embedding.weight
        return KVCache(
            len(self.windows), like, self.position_bytes, split=self.split, windows=self.windows
        )

    @torch.inference_mode()
    def _enter(self, rows: Rows, cache: KVCache, entering: list[Request]) -> torch.Tensor:
        """Give each request, longest first, a row with its context; return logits ``[m, V]``."""
        lengths = np.array([len(request.token_ids) for request in entering])
        logits = []
        for part in cache.cut(lengths):
            bound = max(len(request.token_ids) + request.steps for request in entering[part])
            cache.add(lengths[part], bound)
            contexts = [request.token_ids for request in entering[part]]
            logits += self._prefill(cache, contexts, PREFILL_TOKENS)
        shifts = [self._shift(request.token_ids) for request in entering]
        rows.add(entering, shifts)
        return torch.cat(logits)

    def _prefill(self, cache: KVCache, contexts: list[np.ndarray], most: int) -> list[torch.Tensor]:
        """Fill the rows of the newest cohort, longest first; return their logits, ``[m, V]`` each.

        Equal contexts are neighbours. Padding is on the right, so causal attention hides it without
        a mask. Chunks of ``most`` tokens begin at multiples of it, whatever the other rows are.
        """
        samples = [list(equal) for _, equal in groupby(contexts, key=lambda ids: ids.tobytes())]
        logits = []
        first_row = start = 0
        while start < len(samples):
            longest = len(samples[start][0])
            batch = samples[start : start + max(1, most // longest)]
            start += len(batch)
            ids_bs = np.zeros((len(batch), longest), np.int64)
            for row, (context, *_) in zip(ids_bs, batch, strict=True):
                row[: len(context)] = context
            counts_b = np.array([len(equal) for equal in batch])
            shared = counts_b.max() > 1
            context_m = self._tensor(np.arange(len(batch)).repeat(counts_b)) if shared else None
            rows = slice(first_row, first_row := first_row + int(counts_b.sum()))
            last_b = self._tensor(np.array([len(context) - 1 for context, *_ in batch]))
            chunk = most if self.split and longest > most else longest
            ids, positions = self._tensor(ids_bs), self._tensor(np.arange(longest))
            positions = positions.expand(len(batch), -1)
            inputs = inputs_of(self.images, self.model, ids, positions, self.features)
            for begin in range(0, longest, chunk):
                end = min(begin + chunk, longest)
                cache.begin_prefill(rows, begin, end, context_m)
                at_b = last_b.clamp(max=end - 1) - begin
                logits_bv = self._logits(inputs.part(begin, end), None, cache, at_b)
            logits.append(logits_bv[context_m] if shared else logits_bv)
        return logits

    @torch.inference_mode()
    def _decode(self, rows: Rows, cache: KVCache) -> torch.Tensor:
        """Logits ``[n, V]`` after each live row's newest token."""
        n = rows.count
        positions_n = rows.length[:n] - 1
        cache.begin_decode(positions_n)
        newest, positions = self._tensor(rows.newest[:n]), self._tensor(positions_n)
        if has_mrope(self.model):
            turned = self._tensor(positions_n + rows.shift[:n])
            positions = torch.stack([positions, turned, turned, turned])
        mask = None if cache.split else _mask(cache.cohorts[0])
        return self._logits(Inputs(newest[:, None], positions[..., None]), mask, cache, None)

    def _shift(self, ids: np.ndarray) -> int:
        return 0 if self.images is None else self.images.shift(self.model, ids)

    def _logits(
        self, inputs: Inputs, mask: Mask, cache: KVCache, last_b: torch.Tensor | None
    ) -> torch.Tensor:
        """Logits ``[b, V]`` at position ``last_b`` of each row; None: at the only position."""
        settings: dict[str, Any] = {"attention_mask": mask, "use_cache": True}
        settings[self.cache_argument] = cache
        rows = range(len(inputs.ids_rl))
        if self.plain_head:
            hidden_bsd = inputs.hidden(self.model, **settings)
            hidden_bd = hidden_bsd[:, 0] if last_b is None else hidden_bsd[rows, last_b]
            return head_logits(self.model.get_output_embeddings(), hidden_bd)
        # A head that scales or caps its logits computes them itself, at the positions that a row
        # needs.
        settings |= inputs.arguments()
        if last_b is None:
            return self.model(**settings).logits[:, 0]
        keep, column_b = last_b.unique(return_inverse=True)
        return self.model(**settings, logits_to_keep=keep).logits[rows, column_b]

    def _append(
        self, rows: Rows, cache: KVCache, first_row: int, logits_nv: torch.Tensor
    ) -> list[Segment]:
        """Draw a token for every row from ``first_row`` on, remove ended rows, return segments."""
        sampling = rows.sampling
        live = slice(first_row, rows.count)
        uniform_n = None
        if sampling.temperature > 0:
            uniform_n = uniforms(sampling.seed, rows.trajectory_id[live], rows.length[live])
        ended = rows.append(first_row, *draw(logits_nv, sampling.temperature, uniform_n))
        ready = ended | rows.due()
        if not ready.any():
            return []
        segments = [
            rows.segment(int(row), self.policy_version, ended=bool(ended[row]))
            for row in np.flatnonzero(ready)
        ]
        if not ended.any():
            return segments
        rows.keep(cache.remove(ended))
        return segments

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.embedding.weight.device, non_blocking=True)

    @torch.inference_mode()
    def _check_model(self, length: int) -> None:
        """Decode two rows, of ``length`` tokens and half as many, with the cache and without."""
        tokens = np.random.default_rng(0).integers(self.embedding.num_embeddings, size=length)
        contexts = [tokens, tokens[: length // 2]]
        splits = (True, False) if self.split else (False,)
        self.split = False
        expected_bv = self._plain_last(contexts)
        tolerance = 1e-3 if self.model.dtype in (torch.float32, torch.float64) else 0.05
        reason = "the logits differ"
        # A model that ignores our attention gives wrong logits with two cohorts.
        for self.split, self.plain_head in product(splits, (True, False)):
            try:
                with self._lent():
                    logits_bv, cache = self._decode_last(contexts)
            except torch.OutOfMemoryError:
                raise
            except (
                AttributeError,
                AssertionError,
                IndexError,
                TypeError,
                ValueError,
                RuntimeError,
            ) as error:
                reason = f"{type(error).__name__}: {error}"
                continue
            error_max = (logits_bv.float() - expected_bv).abs().max()
            if error_max <= tolerance * expected_bv.abs().max():
                self.position_bytes = cache.cohorts[0].position_bytes()
                return
        raise ValueError(
            f"The embedded engine cannot run {type(self.model).__name__}: decoding with its cache "
            f"differs from a plain forward pass ({reason}; rows of {length} and {length // 2} "
            f"tokens; windows and original contexts: {sorted(switches(self.model)) or 'none'}"
            f"{'; it has ALiBi' if has_alibi(self.model) else ''}). It needs a causal model whose "
            "only state is the keys and values of all positions or of a sliding window, and that "
            "takes position_ids and a 4D mask. Use such a model (Llama, Qwen, Mistral, GPT-2, "
            "GPT-NeoX, Gemma and the like)"
        )

    def _plain_last(self, contexts: list[np.ndarray]) -> torch.Tensor:
        """Logits ``[n, V]`` after each context, with the model's own attention and no cache."""
        keep: dict[str, Any] = {"logits_to_keep": 1}
        if "logits_to_keep" not in signature(self.model.forward).parameters:
            keep = {}
        try:
            with self._lent():
                outputs = [self.model(input_ids=self._tensor(c)[None], **keep) for c in contexts]
        except (AttributeError, AssertionError, IndexError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"The embedded engine cannot run {type(self.model).__name__}: a forward pass of "
                f"{len(contexts[0])} tokens ended with {type(error).__name__}: {error}"
            ) from error
        return torch.stack([output.logits[0, -1] for output in outputs]).float()

    def _decode_last(self, contexts: list[np.ndarray]) -> tuple[torch.Tensor, KVCache]:
        """Logits ``[n, V]`` after each context, whose last token is decoded with the cache."""
        rows = Rows(len(contexts), 1, Sampling(0, seed=0, stop_token_ids=frozenset()))
        cache = self._cache()
        for context in contexts:
            cache.add(np.array([len(context) - 1]), len(context))
            self._prefill(cache, [context[:-1]], most=-(-len(context) // 3))
        rows.add([Request(0, context, 0, 1, 1) for context in contexts])
        return self._decode(rows, cache), cache


def _time_to_enter(waiting: list[Request], free: int, capacity: int) -> bool:
    """Whether to prefill now or to wait for more free rows.

    If the time of a step grows with its rows, an idle row costs nothing, so at least an eighth of
    the rows must be free. If it does not, waiting for a full pass pays until half are idle.
    """
    if not waiting or not free:
        return False
    if free >= min(len(waiting), capacity / 2):
        return True
    tokens = sum(len(request.token_ids) for request in waiting[-free:])
    return free >= capacity / 8 and tokens >= WORTH_A_PASS


def _mask(cohort: Cohort) -> Mask:
    """What a model that attends to all rows at once takes: one mask, or one for a type of layer."""
    masks = cohort.masks
    if len(masks) == 1 or not any(mask is not None for mask in masks.values()):
        return next(iter(masks.values()))
    (window,) = masks.keys() - {None}
    return {"full_attention": masks[None], "sliding_attention": masks[window]}
