"""Every architecture of transformers that can be built tiny: what engine and trainer make of it.

    python benches/sweep_architectures.py                # all, about 5 minutes
    python benches/sweep_architectures.py llama gemma2   # some

Weights are random, 8 times as large as fresh ones, because near-zero weights hide errors. A plain
forward pass of each sequence alone, in float64, is the truth. *engine* is the largest error of the
log-probs that the embedded engine reports for what it samples, *trainer* that of the trainer's,
both in float32 and in nats. Rows have unlike lengths and cross windows and original contexts. An
architecture is right if both errors are at most ``TOLERANCE``, or if it is refused at the start.
"alone": the trainer gives each sequence a row, because the model cannot tell packed ones apart.
"""

import copy
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kimi_core.rollout.torch.engine import TorchEngine
from kimi_core.trainer.packing import Layout, micro_batches
from kimi_core.trainer.policy import Policy
from kimi_core.types import Batch, Request, Sampling

TOLERANCE, LARGEST = 2e-5, 5_000_000
VOCABULARY, WINDOW, CONTEXT = 64, 10, 128
SMALL = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=CONTEXT,
    sliding_window=WINDOW,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    tie_word_embeddings=False,
)
FLOAT32_ONLY = ("gpt_oss",)
"""Architectures whose experts have no float64 product; a float32 pass is the truth for them."""
LENGTHS = (33, 21, 12, 5, 27, 3)


@dataclass(frozen=True)
class Outcome:
    """What became of one architecture; ``refused`` is the reason, or empty."""

    name: str
    engine: float = float("nan")
    trainer: float = float("nan")
    layout: str = ""
    refused: str = ""
    unbuilt: str = ""

    @property
    def right(self) -> bool:
        return bool(self.refused) or max(self.engine, self.trainer) <= TOLERANCE


def build(name: str) -> PreTrainedModel:
    default = AutoConfig.for_model(name)
    config = AutoConfig.for_model(name, **{k: v for k, v in SMALL.items() if hasattr(default, k)})
    text = config.get_text_config(decoder=True)
    if text is not config:
        for key, value in SMALL.items():
            if hasattr(text, key):
                setattr(text, key, value)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f} M parameters: its config has other names")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model


@torch.no_grad()
def plain(model: PreTrainedModel, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Log-probs of each token but the first, float64, one forward pass a sequence."""
    exact = copy.deepcopy(model).double()
    if model.config.model_type in FLOAT32_ONLY:
        exact = model
    found = []
    for ids in sequences:
        given = torch.from_numpy(ids.astype(np.int64))[None]
        logits = exact(input_ids=given, use_cache=False).logits[0, :-1].double()
        picked = logits.log_softmax(-1).gather(1, given[0, 1:, None])[:, 0]
        found.append(picked.numpy())
    return found


def engine_error(model: PreTrainedModel) -> float:
    engine = TorchEngine(model, batch_rows=4)
    rng = np.random.default_rng(0)
    contexts = [rng.integers(3, VOCABULARY, n).astype(np.int32) for n in LENGTHS]
    steps = 14
    requests = [Request(i, ids, len(ids), steps, steps) for i, ids in enumerate(contexts)]
    sampling = Sampling(1.0, seed=0, stop_token_ids=frozenset())
    parts = [one for some in engine.generate(requests, sampling) for one in some]
    whole = [np.concatenate([contexts[p.trajectory_id], p.token_ids]) for p in parts]
    truth = plain(model, whole)
    return max(
        float(np.abs(part.logprobs - true[-len(part.logprobs) :]).max())
        for part, true in zip(parts, truth, strict=True)
    )


def trainer_error(model: PreTrainedModel) -> tuple[float, Layout]:
    """The largest error, and how sequences are laid out."""
    policy = Policy(model, temperature=1.0, head_chunk=64)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, VOCABULARY, 9).astype(np.int32)] * 3
    sequences = [rng.integers(3, VOCABULARY, n).astype(np.int32) for n in LENGTHS]
    sequences += [np.concatenate([p, rng.integers(3, VOCABULARY, 4)]) for p in prompts]
    tokens = np.concatenate(sequences).astype(np.int32)
    edges = np.cumsum([0, *map(len, sequences)]).astype(np.int32)
    blank = np.zeros(len(tokens), np.float32)
    batch = Batch(tokens, blank, np.ones(len(tokens), np.uint8), blank.astype(np.int32), edges)
    wanted = np.ones(len(tokens), bool)
    wanted[edges[:-1]] = False
    for first in edges[len(LENGTHS) : -1]:
        wanted[first : first + 9] = False  # Prompts, which may be shared.
    truth = np.concatenate([np.concatenate([[0.0], one]) for one in plain(model, sequences)])
    worst = 0.0
    for shared in {False, policy.shares_prompts}:
        for micro in micro_batches(
            batch,
            wanted,
            range(len(sequences)),
            max_tokens=80,
            share_prompts=shared,
            layout=policy.layout,
        ):
            with torch.no_grad():
                found = policy.logprobs(micro).double().numpy()
            worst = max(worst, float(np.abs(found - truth[micro.source_t.numpy()]).max()))
    return worst, policy.layout


def sweep(names: Sequence[str]) -> list[Outcome]:
    outcomes = []
    for name in names:
        try:
            model = build(name)
            plain(model, [np.arange(3, 9)])
        except Exception as error:  # noqa: BLE001 - configs fail in every way
            outcomes.append(Outcome(name, unbuilt=f"{type(error).__name__}: {error}"[:80]))
            continue
        try:
            outcomes.append(Outcome(name, engine_error(model), *trainer_error(model)))
        except ValueError as error:
            outcomes.append(Outcome(name, refused=str(error)[:200]))
        except Exception as error:  # noqa: BLE001 - a fault of ours, shown as such
            outcomes.append(Outcome(name, float("inf"), float("inf"), refused=""))
            print(f"{name}: {error!r}", file=sys.stderr)
    return outcomes


def main() -> None:
    warnings.simplefilter("ignore")
    outcomes = sweep(sys.argv[1:] or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    print("| architecture | engine | trainer | |\n|---|---|---|---|")
    built = [one for one in outcomes if not one.unbuilt]
    for one in built:
        errors = "| |" if one.refused else f"{one.engine:.1e} | {one.trainer:.1e} |"
        remark = one.refused[:90] or one.layout
        print(f"| {one.name} | {errors} {remark}{'' if one.right else ' WRONG'} |")
    for one in outcomes:
        if one.unbuilt:
            print(f"not built: {one.name}: {one.unbuilt}", file=sys.stderr)
    wrong = [one.name for one in built if not one.right]
    equal = sum(one.right and not one.refused for one in built)
    print(f"{len(built)} built, {equal} equal, {sum(bool(o.refused) for o in built)} refused")
    if wrong:
        sys.exit(f"wrong: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
