"""A Hugging Face causal LM as the trainer sees it: tokens in, log-probs or a loss out."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from kimi_core.kernels import Head, OmdLoss, linear_logprob, omd_loss
from kimi_core.models.packed_attention import use_packed_attention
from kimi_core.models.processors import Pixels
from kimi_core.models.switches import length_to_check
from kimi_core.models.vision import Bounded, Images, SentImages, inputs_of, is_frozen
from kimi_core.trainer.context import ContextParallel
from kimi_core.trainer.layouts import layouts_of
from kimi_core.trainer.objectives import Responses
from kimi_core.trainer.packing import Layout, MicroBatch, micro_batches
from kimi_core.types import Batch, Normalize

log = logging.getLogger(__name__)

CHEAP_MASKS = 512
"""On a CPU, masks of rows up to this length cost less than to gather their sequences:
``benches/bench_attention.py``."""

MASKED = (
    "%s cannot be told where the sequences of a row begin, so training makes masks of l × l for "
    "rows of l tokens: long ones take much memory"
)


class Policy(nn.Module):
    """The body of a model, with its head computed by ``kimi_core.kernels``.

    A model's own head would form all logits. This one takes the output matrix and what the
    architecture does to the logits (bias, scale, soft cap), and never holds more than
    ``head_chunk`` rows of logits.

    To shard a policy with FSDP2, make it from the whole model first, because the head is checked
    here. Then call ``fully_shard`` on each decoder layer, and last on the policy: the root whose
    forward gathers embeddings, final norm and head for whatever the loss reads.

    ``layout`` is how micro-batches are laid out for the model. Sequences up to ``masks_up_to``
    tokens are laid into ``rows`` where that is cheaper.

    Args:
        model: any ``AutoModelForCausalLM``.
        temperature: the temperature that the tokens were sampled with.
        head_chunk: rows of logits that exist at once.
        longest: tokens of the longest sequence of the run, if it is known; the check crosses the
            windows and original contexts that such sequences cross.
        images: the run's images, if prompts or SFT examples have some.
        checked: ``layout`` and ``masks_up_to`` of the same model on rank 0, which has checked it;
            this one may have no weights yet.

    Raises:
        ValueError: the model is sharded already, its logits are not made from its last hidden state
            in a known way, or its log-probs depend on what else is in a batch.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        temperature: float,
        head_chunk: int,
        longest: int | None = None,
        images: Images | None = None,
        checked: tuple[Layout, int] | None = None,
    ) -> None:
        super().__init__()
        if any(isinstance(module, FSDPModule) for module in model.modules()):
            raise ValueError(
                f"Cannot make a policy of a sharded {type(model).__name__}: make the Policy first, "
                "then call fully_shard on its layers and on the policy itself"
            )
        self.model = model
        self.temperature = temperature
        self.head_chunk = head_chunk
        self.images = images
        frozen = images is not None and is_frozen(model)
        self._features = Bounded() if frozen else None
        self.context: ContextParallel | None = None
        """The ranks that share the columns of a row; None: this one has them all."""
        self.tp_group: dist.ProcessGroup | None = None
        """The ranks that share heads, widths and vocabulary; None: this one has them all."""
        self.averaged_over = 1
        """Ranks whose gradients FSDP2 averages, so a loss is multiplied by it before
        ``backward``."""
        if model.get_output_embeddings() is None:
            raise ValueError(f"{type(model).__name__} has no output embeddings: not a causal LM")
        text = model.config.get_text_config()
        self._softcap: float | None = getattr(text, "final_logit_softcapping", None)
        # Cohere multiplies its logits by logit_scale, Granite divides them by logits_scaling.
        self._scale: float = (getattr(text, "logit_scale", None) or 1.0) / (
            getattr(text, "logits_scaling", None) or 1.0
        )
        if checked is not None:
            use_packed_attention(model)
            self.layout, self.masks_up_to = checked
            return
        self._check_head()
        # One mask serves all layers only without windows.
        short = model.device.type == "cpu" and getattr(text, "sliding_window", None) is None
        self.layout, *others = layouts_of(
            model, self.logprobs, length_to_check(model, longest), masks_too=short
        )
        # On a CPU short sequences are laid into rows all the same, unless that pads much.
        self.masks_up_to = CHEAP_MASKS if "rows" in others else 0
        if self.layout == "rows":
            log.warning(MASKED, type(model).__name__)

    def forward(
        self,
        micro: MicroBatch,
        responses: Responses | None = None,
        *,
        tau: float = 0.0,
        normalize: Normalize = "none",
    ) -> tuple[Tensor, Tensor] | OmdLoss:
        """Log-probs and entropies of the wanted tokens or, given ``responses``, the loss.

        Everything that reads a parameter happens in here: a sharded policy is whole where it must.

        Raises:
            FloatingPointError: a log-prob is NaN.
        """
        if self.context is not None:
            return self._shared(micro, self.context)
        hidden, head, chunk = self._hidden(micro), self._kernel_head(), self.head_chunk
        if responses is None:
            return linear_logprob(hidden, head, micro.ids_t, return_entropy=True, chunk=chunk)
        return omd_loss(
            hidden,
            head,
            micro.ids_t,
            ref_logprobs=responses.ref_logprobs_t,
            advantages=responses.advantages_n,
            cu_seqlens=responses.cu_seqlens,
            tau=tau,
            normalize=normalize,
            chunk=chunk,
        )

    def _shared(self, micro: MicroBatch, context: ContextParallel) -> tuple[Tensor, Tensor]:
        """What ``forward`` gives; this rank computes that of its columns."""
        part, mine_t = context.cut(micro)
        hidden, head, chunk = self._hidden(part), self._kernel_head(), self.head_chunk
        try:
            own = linear_logprob(hidden, head, part.ids_t, return_entropy=True, chunk=chunk)
        except FloatingPointError:  # The other ranks wait in ``unite``, and it tells them.
            own = (torch.full_like(part.ids_t, math.nan, dtype=torch.float32),) * 2
        logprobs_t, entropy_t = (context.unite(one, mine_t, len(micro.ids_t)) for one in own)
        return logprobs_t, entropy_t

    def logprobs(self, micro: MicroBatch) -> Tensor:
        """Log-probs of the wanted tokens, float32 ``[t]``; differentiable unless under no_grad.

        Raises: as ``forward``.
        """
        return self(micro)[0]

    def omd_loss(
        self, micro: MicroBatch, responses: Responses, *, tau: float, normalize: Normalize
    ) -> OmdLoss:
        """``objectives.omd`` of the wanted tokens, averaged over the responses, as one operation.

        Not with ``context``, whose log-probs have to be united first.

        Raises: as ``forward``.
        """
        return self(micro, responses, tau=tau, normalize=normalize)

    def probe(self, ids_1l: Tensor) -> None:
        """One forward pass of one sequence, int64 ``[1, l]``: for what it makes autograd save."""
        # The last token is not laid out: nothing follows that it would predict.
        with suppress(FloatingPointError):  # The update that follows tells of a NaN.
            self.logprobs(self._one_sequence(np.append(ids_1l[0].cpu().numpy(), 0)))

    def nothing(self) -> Tensor:
        """A loss of 0 from a pass of one token: for a rank that has no micro-batch.

        The pass gathers and reduces what the other ranks' passes do, and its gradient is 0.

        Raises: as ``forward``.
        """
        return self.logprobs(self._one_sequence(np.zeros(2))).sum() * 0.0

    @torch.no_grad()
    def on_sequences(self, sequences: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Each sequence, int32 ``[n]``, with the log-probs of its tokens but the first, float64.

        At temperature 1, all in one micro-batch; of token 0 at the places of images. A sequence
        ends with a token of text.
        """
        edges = np.cumsum([0, *map(len, sequences)]).astype(np.int32)
        ids = np.concatenate(sequences)
        blank = np.zeros(len(ids), np.float32)
        batch = Batch(ids, blank, blank.astype(np.uint8), blank.astype(np.int32), edges)
        wanted = np.ones(len(ids), bool)
        wanted[edges[:-1]] = False
        found = np.zeros(len(ids))
        with self.at_temperature(1.0):
            for micro in micro_batches(
                batch,
                wanted,
                range(len(batch)),
                max_tokens=len(ids),
                layout=self.layout,
                device=self.model.device,
            ):
                micro = replace(micro, ids_t=micro.ids_t.clamp(min=0))
                found[micro.source_t.cpu().numpy()] = self.logprobs(micro).double().cpu().numpy()
        parts = np.split(found, edges[1:-1])
        return [(one, part[1:]) for one, part in zip(sequences, parts, strict=True)]

    @contextmanager
    def at_temperature(self, temperature: float) -> Iterator[None]:
        """Another temperature until the block ends."""
        before, self.temperature = self.temperature, temperature
        try:
            yield
        finally:
            self.temperature = before

    @contextmanager
    def reading(self, images: Images) -> Iterator[None]:
        """Another table of images until the block ends."""
        before, self.images = self.images, images
        try:
            yield
        finally:
            self.images = before
            if self._features is not None:  # Of images with the same numbers.
                self._features.clear()

    def forget_gathered(self) -> None:
        """Show this rank's shards again after a forward pass without a backward pass.

        A policy that is not sharded stays as it is.
        """
        if isinstance(self, FSDPModule):
            self.reshard()

    def _one_sequence(self, ids: np.ndarray) -> MicroBatch:
        """Wants every token of ``ids`` but the first."""
        blank = np.zeros(len(ids), np.float32)
        edges = np.array([0, len(ids)], np.int32)
        batch = Batch(
            ids.astype(np.int32), blank, blank.astype(np.uint8), blank.astype(np.int32), edges
        )
        wanted = np.arange(len(ids)) > 0
        device = self.model.device
        (micro,) = micro_batches(
            batch, wanted, [0], max_tokens=len(ids), layout=self.layout, device=device
        )
        return micro

    def take_images(self, sent: Mapping[int, Pixels]) -> None:
        """On a rank above 0: know the images that rank 0 has sent, and no others any more."""
        if isinstance(self.images, SentImages):
            self.images.forget()
            self.images.take(sent)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters that require a gradient by their names in the model, in the model's order."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def _head(self) -> Any:
        return self.model.get_output_embeddings()

    def _hidden(self, micro: MicroBatch) -> Tensor:
        """Hidden states that predict the wanted tokens, ``[t, d]``."""
        sharded = self.averaged_over > 1
        hidden_rld = inputs_of(
            self.images,
            self.model,
            micro.ids_rl,
            micro.positions_rl,
            self._features,
            reach_tower=sharded and self._features is None,
        ).hidden(
            self.model,
            attention_mask=self._mask(micro),
            use_cache=False,
            **({} if micro.packing is None else {"packing": micro.packing}),
        )
        return hidden_rld[micro.row_t, micro.column_t]

    def _kernel_head(self) -> Head:
        temperature = self.temperature / self._scale
        weight, bias = self._head.weight, self._head.bias
        if self.tp_group is not None:
            weight, bias = weight.to_local(), None if bias is None else bias.to_local()
        return Head(weight, bias, temperature, self._softcap, self.tp_group)

    @property
    def shares_prompts(self) -> bool:
        """Whether responses may share their prompt.

        With masks not if there are sliding windows, because the layers then need different ones.
        """
        text = self.model.config.get_text_config()
        if self.layout == "rows":
            return getattr(text, "sliding_window", None) is None
        return self.layout == "end_to_end"

    def _mask(self, micro: MicroBatch) -> Tensor | None:
        """Additive ``[r, 1, l, l]``, as eager and SDPA attention take it, or None."""
        dtype = self._head.weight.dtype
        if micro.packing is not None:
            # transformers makes no mask where it is given one of four dimensions.
            return torch.zeros(1, 1, 1, 1, dtype=dtype, device=micro.ids_rl.device)
        if micro.visible_rll is None:
            return None
        mask_rll = torch.zeros_like(micro.visible_rll, dtype=dtype)
        mask_rll.masked_fill_(~micro.visible_rll, torch.finfo(dtype).min)
        return mask_rll[:, None]

    @torch.no_grad()
    def _check_head(self) -> None:
        device = self._head.weight.device
        ids = torch.arange(min(8, self._head.weight.shape[0]), device=device)[None]
        was_training = self.model.training
        self.model.eval()
        theirs = self.model(input_ids=ids, use_cache=False).logits[0].float()
        body = self.model.base_model(input_ids=ids, use_cache=False)
        self.model.train(was_training)
        if not hasattr(body, "last_hidden_state"):
            raise ValueError(
                f"Cannot train {type(self.model).__name__}: its body gives "
                f"{type(body).__name__} without a last hidden state; take the class of its text "
                "model alone"
            )
        hidden = body.last_hidden_state[0]
        ours = self._head(hidden).float() * self._scale
        if self._softcap is not None:
            ours = self._softcap * torch.tanh(ours / self._softcap)
        if not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2):
            gap = float((ours - theirs).abs().max())
            raise ValueError(
                f"Cannot train {type(self.model).__name__}: its logits differ by {gap:.3g} from "
                "hidden states times output matrix; its head does something that is not supported"
            )
