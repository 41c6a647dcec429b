"""``--dry-run``: the settings of a run, and the memory and the time that it would take."""

import copy
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kimi_core.buffer import RolloutBuffer
from kimi_core.config import Config
from kimi_core.models import smollm2
from kimi_core.models.codec import Codec
from kimi_core.models.load import auto_class, check_folder, context_of
from kimi_core.models.lora import adapted_bytes, choose_trained
from kimi_core.models.placement import device_of, dtype_of, limit_threads
from kimi_core.models.scratch import scratch_llama
from kimi_core.models.vision import Images
from kimi_core.models.vision_load import load_images
from kimi_core.prompts.tokens import PromptTokens
from kimi_core.rollout.load import reads_trainer
from kimi_core.rollout.phase import buffer_size
from kimi_core.rollout.torch.kv_cache import ROUND_TO
from kimi_core.rollout.vllm.server import CPU_CACHE_BYTES
from kimi_core.run.build import check_settings
from kimi_core.run.config_file import dump_toml
from kimi_core.run.data import Data, load_data, scratch_tokenizer
from kimi_core.run.duration import Sizes, expected
from kimi_core.trainer.activations import Footprint, Recompute, measure, trained_layers
from kimi_core.trainer.master_weights import SIXTEEN_BITS
from kimi_core.trainer.parallel import check_axes
from kimi_core.types import Prompt


@dataclass(frozen=True)
class Memory:
    """Estimated bytes by part, of all ranks of the trainer together."""

    weights: int
    master_weights: int
    """float32 copies of the trained parameters; 0 if the model itself is float32."""
    gradients: int
    """float32, and once more in the model's dtype if that has 16 bits."""
    optimizer_moments: int
    """AdamW: two float32 numbers per trained parameter."""
    merged_weights: int
    """The engine's copy of the weights under adapters; 0 without adapters."""
    arena: int
    """Three versions of the weights in shared memory, for vLLM, several ranks and rollout workers.
    On a CPU the engine reads them there; on a GPU it has another copy."""
    kv_cache: int
    """For vLLM the configured size; 0 if vLLM decides itself, on a GPU."""
    logits: int
    """``head_chunk`` rows over the vocabulary, float32; their gradient replaces them."""
    activations: int
    """Of the largest training pass; ``trainer/activations.py`` has the formula."""
    images: int
    """Pixels and features of the prompts' images, of which 256 MB each are kept; 0: there are
    none."""
    buffer: int
    """At most. The buffer is a file that grows with the responses, and takes the same space on the
    disk."""


def describe(config: Config) -> str:
    """The settings as TOML; the memory of each part in MB, and the time, as TOML comments.

    No weights are loaded and nothing is fetched. If the model is not on this machine, a comment
    says so, and memory and time are left out.

    Raises:
        ValueError: the model or the prompts do not exist or do not fit the config.
    """
    data = load_data(config)
    check_settings(config)
    found = _skeleton(config, data)
    if found is None:
        remark = [f"# {config.model.name} is not on this machine: a run would fetch it first."]
        return "\n".join([dump_toml(config), *remark, ""])
    model, tokenizer = found
    images = load_images(model, config, data.prompts)
    codec, encode = _encoders(config, model, tokenizer, data.prompts, images)
    memory = _memory(config, model, encode.longest, images)
    parts = asdict(memory)
    parts["total"] = sum(parts.values())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    lines = [
        f"# {total:,} parameters, {trained:,} of them trained. Memory in MB:",
        *(f"#   {part.replace('_', ' '):<18}{size / 1e6:>12.1f}" for part, size in parts.items()),
    ]
    limit_threads(model, config.trainer.ranks)
    time = expected(
        config,
        model.config,
        total,
        lambda: Sizes.of(
            config,
            data.train,
            encode,
            codec,
            tokenizer,
            data.examples,
            data.held_out,
            data.sets,
        ),
    )
    lines += [_disk(config, memory.buffer), *_price(config), f"# Time: {time}."]
    return "\n".join([dump_toml(config), *lines, ""])


def _disk(config: Config, most: int) -> str:
    """How large the buffer's file may get, and what its disk has."""
    runs = Path(config.runs).absolute()
    free = shutil.disk_usage(next(one for one in (runs, *runs.parents) if one.is_dir())).free
    return (
        f"# The buffer's file grows with the responses, to at most {most / 1e6:,.1f} MB if each is "
        f"as long as allowed; {free / 1e6:,.1f} MB are free on the disk of {config.runs}."
    )


def _price(config: Config) -> list[str]:
    """What partial rollouts cost: each time a response goes on, its context is computed again."""
    longest, budget = config.rollout.max_response_tokens, config.rollout.token_budget
    if budget is None or budget >= longest:
        return []
    iterations = -(-longest // budget)
    again = sum(budget * number for number in range(1, iterations)) / longest
    return [
        f"# Partial rollouts: a response of {longest:,} tokens takes {iterations} iterations and "
        f"computes {again:.2f} tokens again for each that it samples, and its prompt each time."
    ]


def estimate(
    config: Config,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
) -> Memory:
    """Bytes that a run with this model needs; its parameters may be on torch's meta device.

    Raises:
        ValueError: a prompt or a stop string cannot be tokenized.
    """
    images = load_images(model, config, prompts)
    _, encode = _encoders(config, model, tokenizer, prompts, images)
    return _memory(config, model, encode.longest, images)


def _encoders(
    config: Config,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    images: Images | None,
) -> tuple[Codec, PromptTokens]:
    codec = Codec(tokenizer, config.rollout.stop, model, images)
    response = config.rollout.max_response_tokens
    return codec, PromptTokens(codec, prompts, context=context_of(model), response=response)


def _memory(
    config: Config, model: PreTrainedModel, longest_prompt: int, images: Images | None
) -> Memory:
    tokens, trajectories = buffer_size(longest_prompt, config.rollout)
    copies, passes = (
        config.trainer.replicas,
        config.trainer.ranks // config.trainer.context_parallel,
    )
    trained = 4 * copies * sum(p.numel() for p in model.parameters() if p.requires_grad)
    in_16_bits = model.dtype in SIXTEEN_BITS
    longest = longest_prompt + config.rollout.max_response_tokens
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    on_cpu = device_of(config.model.device).type == "cpu"
    shares = reads_trainer(config.rollout, config.cluster) and config.trainer.ranks == 1
    arena = 0 if shares else 3 * weights
    if config.rollout.engine == "vllm":
        each = config.rollout.vllm.args.get("kv_cache_memory_bytes", CPU_CACHE_BYTES * on_cpu)
        kv_cache = config.rollout.workers * each
    else:
        kv_cache = _rows(config) * -(-longest // ROUND_TO) * ROUND_TO * _kv_bytes(model)
    return Memory(
        weights=copies * weights,
        master_weights=trained * in_16_bits,
        gradients=trained + trained // 2 * in_16_bits,
        optimizer_moments=2 * trained,
        merged_weights=adapted_bytes(model) if shares else 0,
        arena=arena,
        kv_cache=kv_cache,
        activations=passes * _activations(config, model, longest),
        logits=4 * config.trainer.head_chunk * model.get_input_embeddings().num_embeddings,
        images=0 if images is None else images.memory(model),
        buffer=RolloutBuffer.file_bytes(tokens, trajectories),
    )


def _rows(config: Config) -> int:
    """Trajectories decoded together: all that can be open at the same time, up to
    ``batch_rows`` of each worker."""
    rollout = config.rollout
    open_iterations = -(-rollout.max_response_tokens // (rollout.token_budget or 1 << 62))
    open_at_once = rollout.prompts_per_iteration * rollout.samples_per_prompt * open_iterations
    return min(rollout.workers * rollout.batch_rows, open_at_once)


def _activations(config: Config, model: PreTrainedModel, longest: int) -> int:
    """Of a micro-batch that is full, or as full as an iteration's longest responses make it."""
    budget = Recompute.budget_of(config.trainer.memory_gb, device_of(config.model.device))
    footprint = _footprint(model)
    responses = config.rollout.prompts_per_iteration * config.rollout.samples_per_prompt
    update = longest * -(-responses // config.trainer.updates_per_iteration)
    most = min(config.trainer.tokens_per_micro_batch, footprint.most_tokens(budget), update)
    tokens = max(longest, most)
    plan = footprint.plan(tokens, budget) or footprint.least(tokens)
    return footprint.bytes(tokens, plan)


def _footprint(model: PreTrainedModel) -> Footprint:
    """What a training pass keeps, measured on the top layer without the model's weights."""
    trained = len(trained_layers(model))
    model = copy.deepcopy(model)
    decoder = model.get_decoder()
    if isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        decoder.layers = decoder.layers[-1:]
    # Values do not matter. What no layer writes takes no memory.
    model = model.to_empty(device="cpu")
    one = measure(model, lambda ids: model.base_model(input_ids=ids, use_cache=False))
    # The loss takes the hidden states of the tokens, and returns their gradient.
    return replace(one, layers=trained, rest=one.rest + 2 * one.stream)


def _kv_bytes(model: PreTrainedModel) -> int:
    """Bytes that one token of one trajectory takes in the key-value cache."""
    text = model.config.get_text_config()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return 2 * text.num_hidden_layers * kv_heads * head_dim * model.dtype.itemsize


def _skeleton(config: Config, data: Data) -> tuple[PreTrainedModel, PreTrainedTokenizerBase] | None:
    """The model without weights, and its tokenizer; None if they would have to be fetched."""
    settings = config.model
    device = device_of(settings.device)
    if scratch := scratch_tokenizer(config, data):
        model, tokenizer = scratch_llama(settings, scratch, config.seed), scratch
    else:
        source = settings.name
        if source == smollm2.SMOLLM2:
            source = str(smollm2.cache_folder() / smollm2.SMOLLM2)
            if not Path(source).is_dir():
                return None
        is_folder = Path(source).is_dir()
        if is_folder:
            check_folder(Path(source))
        try:
            architecture = AutoConfig.from_pretrained(source, local_files_only=True)
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
        except (OSError, ValueError) as error:
            if is_folder or source.startswith((".", "/", "~")):
                raise ValueError(f"Cannot load the model in {source}: {error}") from error
            return None
        with torch.device("meta"):
            model = auto_class(architecture).from_config(
                architecture, dtype=dtype_of(settings.dtype, device)
            )
        with suppress(OSError):  # Not every model has one.
            model.generation_config = GenerationConfig.from_pretrained(
                source, local_files_only=True
            )
    check_axes(model.config, config.trainer)
    choose_trained(model, config.trainer, config.seed)
    return model, tokenizer
