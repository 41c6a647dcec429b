"""How fast this machine is with a model, measured in some seconds on a thin one.

The thin model has the widths, vocabulary and dtype of the real one, but few layers, and zeros as
weights. It is measured with one layer and with ``DEEP``: the difference is what a layer takes.
Engine and trainer are those of a run.
"""

import copy
import math
from collections.abc import Callable
from itertools import chain
from time import perf_counter

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel

from kimi_core.config import Config
from kimi_core.models.load import auto_class
from kimi_core.models.lora import choose_trained
from kimi_core.models.packed_attention import NAME
from kimi_core.models.placement import device_of, dtype_of
from kimi_core.rollout.torch.engine import TorchEngine
from kimi_core.run.work import Lengths, Work
from kimi_core.trainer.policy import Policy
from kimi_core.trainer.trainer import Trainer
from kimi_core.types import Batch, Request, Sampling, TrainingBatch
from kimi_core.weights.publish import InPlace

DEEP = 4

SMALLEST, ENOUGH_S = 64, 0.05
"""A call begins with so many tokens, or with two rows, and doubles until it takes this time. So the
measuring takes some seconds, however slow the machine and however long the contexts."""

DECODED = 4
"""Decode steps of a timed call."""


def measure(architecture: PretrainedConfig, config: Config, lengths: Lengths) -> Work:
    """Seconds of one decode step, sampled token, read token, update and trained token.

    Attention is measured at the given lengths, as far as ``ENOUGH_S`` allows them.

    Raises:
        ValueError, RuntimeError and others: engine or trainer cannot run such a model.
    """
    layers = architecture.get_text_config().num_hidden_layers
    if layers <= 2:
        return _measured(architecture, config, lengths, layers)
    deep = min(DEEP, layers)
    one, more = (np.array(_measured(architecture, config, lengths, n)) for n in (1, deep))
    each = np.maximum(0.0, more - one) / (deep - 1)
    trained = config.trainer.trainable_layers or layers
    # What lies below the trained layers is read forward, as an engine reads a context.
    frozen = Work(trained=Work(*each).read * (layers - trained))
    counts = np.array([layers, layers, layers, trained, trained]) - 1
    return Work(*np.maximum(0.0, one + each * counts + np.array(frozen)).tolist())


def thin_model(architecture: PretrainedConfig, config: Config, layers: int) -> PreTrainedModel:
    """A model of few layers whose weights are all 0, on the device of the run."""
    architecture = copy.deepcopy(architecture)
    text = architecture.get_text_config()
    if types := getattr(text, "layer_types", None):
        text.layer_types = types[:layers]
    text.num_hidden_layers = layers
    if architecture._attn_implementation == NAME:  # The trainer chooses it a second time.
        architecture._attn_implementation = "sdpa"
    device = device_of(config.model.device)
    with torch.device("meta"):
        model = auto_class(architecture).from_config(
            architecture, dtype=dtype_of(config.model.dtype, device)
        )
    model = model.to_empty(device=device)
    model.tie_weights()
    for tensor in chain(model.parameters(), model.buffers()):
        tensor.data.zero_()
    return model.eval()


def _measured(
    architecture: PretrainedConfig, config: Config, lengths: Lengths, layers: int
) -> Work:
    model = thin_model(architecture, config, layers)
    return Work(*_engine_s(model, config, lengths), *_trainer_s(model, config, lengths, layers))


def _engine_s(
    model: PreTrainedModel, config: Config, lengths: Lengths
) -> tuple[float, float, float]:
    """Seconds of a decode step, a sampled token and a token of a prompt."""
    rollout = config.rollout
    engine = TorchEngine(model, batch_rows=rollout.batch_rows)
    sampling = Sampling(rollout.temperature, seed=0, stop_token_ids=frozenset())

    def generate_s(contexts: list[np.ndarray], tokens: int) -> float:
        requests = [Request(i, ids, len(ids), tokens, tokens) for i, ids in enumerate(contexts)]
        return _seconds(lambda: list(engine.generate(requests, sampling)))

    def shape(size: int) -> tuple[int, int]:
        width = max(1, min(int(lengths.prompt), size))
        return max(1, size // width), width

    def read_s(size: int) -> float:
        count, width = shape(size)
        return generate_s([_tokens(width, number) for number in range(count)], 1)

    prompts = min(rollout.prompts_per_iteration, rollout.batch_rows)
    size, all_s = _grown(read_s, SMALLEST, int(prompts * lengths.prompt))
    end = lengths.prompt + lengths.response
    middle = _tokens(min(end - lengths.response / 2, end - 1 - DECODED, size), 0)

    def step_s(rows: int) -> float:
        first, all_s = (generate_s([middle] * rows, n) for n in (1, 1 + DECODED))
        return max(0.0, all_s - first) / DECODED

    most = min(rollout.prompts_per_iteration * rollout.samples_per_prompt, rollout.batch_rows)
    one, (rows, several) = step_s(1), _grown(step_s, 2, max(2, most))
    sampled = max(0.0, several - one) / (rows - 1)
    return max(0.0, one - sampled), sampled, all_s / math.prod(shape(size))


def _trainer_s(
    model: PreTrainedModel, config: Config, lengths: Lengths, layers: int
) -> tuple[float, float]:
    """Seconds of an update and of a token in its passes."""
    one_rank = {"ranks": 1, "tensor_parallel": 1, "context_parallel": 1, "replicas": 1}
    partly = config.trainer.trainable_layers and layers
    changes = {"objective": "omd", "updates_per_iteration": 1, "logprob_gap_limit": float("inf")}
    settings = config.trainer.model_copy(update={**one_rank, **changes, "trainable_layers": partly})
    choose_trained(model, settings, seed=0)
    policy = Policy(model, temperature=config.rollout.temperature, head_chunk=settings.head_chunk)
    trainer = Trainer(policy, settings, InPlace())
    rollout = config.rollout

    def train_s(groups: int, samples: int, prompt: int, response: int) -> float:
        batch = _batch(groups, samples, prompt, response)
        return _seconds(lambda: trainer.train(batch, policy_version=0, seed=(0,)))

    def sizes(tokens: int) -> tuple[int, int, int, int]:
        prompt, response = (
            max(1, int(min(length, tokens / 2))) for length in (lengths.prompt, lengths.response)
        )
        samples = max(2, min(rollout.samples_per_prompt, (tokens - prompt) // response))
        groups = min(rollout.prompts_per_iteration, tokens // (prompt + samples * response))
        return max(1, groups), samples, prompt, response

    train_s(1, 1, 1, 1)  # The first call measures what a pass keeps.
    few_s = train_s(1, 1, 1, 1)
    each = lengths.prompt + rollout.samples_per_prompt * lengths.response
    tokens, many_s = _grown(
        lambda tokens: train_s(*sizes(tokens)), SMALLEST, int(rollout.prompts_per_iteration * each)
    )
    groups, samples, prompt, response = sizes(tokens)
    trained_s = max(0.0, many_s - few_s) / (groups * (prompt + samples * response) - 2)
    return max(0.0, few_s - 2 * trained_s), trained_s


def _grown(seconds: Callable[[int], float], size: int, most: int) -> tuple[int, float]:
    """The size from which on a call takes ``ENOUGH_S``, at most ``most``; and its seconds."""
    size = min(size, most)
    while (taken := seconds(size)) < ENOUGH_S and size < most:
        size = min(2 * size, most)
    return size, taken


def _batch(groups: int, samples: int, prompt: int, response: int) -> TrainingBatch:
    """Made-up responses, of which half were right."""
    count = groups * samples
    group_ids = np.arange(groups).repeat(samples)
    signs = np.where(np.arange(count) % 2, 1.0, -1.0)
    is_response = np.tile(np.array([0, 1], np.uint8).repeat([prompt, response]), count)
    tokens = Batch(
        token_ids=np.concatenate([_tokens(prompt + response, n) for n in group_ids.tolist()]),
        logprobs=np.zeros(len(is_response), np.float32),
        mask=is_response,
        policy_versions=is_response.astype(np.int32) - 1,
        cu_seqlens=np.arange(count + 1, dtype=np.int32) * (prompt + response),
    )
    ended = {number: np.zeros(samples) for number in range(groups)}
    return TrainingBatch(tokens, group_ids, signs, signs, signs, ended)


def _tokens(length: float, number: int) -> np.ndarray:
    """A sequence of ``length`` tokens whose first ones tell it from those of other numbers."""
    ids = np.zeros(max(1, int(length)), np.int32)
    bits = min(len(ids), 10)
    ids[:bits] = (number >> np.arange(bits)) & 1
    return ids


def _seconds(call: Callable[[], object]) -> float:
    """Of the faster of two calls, or of one that takes long."""
    times: list[float] = []
    while len(times) < 2 and sum(times) < ENOUGH_S:
        started = perf_counter()
        call()
        times.append(perf_counter() - started)
    return min(times)
