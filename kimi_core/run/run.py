"""A whole run: load, fine-tune, then RL iterations with metrics, states and evaluations.

Life of a run: the parts are built from the config; SFT runs if the config asks for it; the state of
iteration 0 is saved and evaluated; then every iteration is reported and saved. Ctrl-C ends the
iteration at hand and saves; ``resume`` goes on from the last state saved, and with the tokens that
were sampled since.
"""

import hashlib
import json
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event, current_thread, main_thread
from time import perf_counter
from typing import Any

import numpy as np
import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kimi_core.buffer import RolloutBuffer
from kimi_core.config import Config, RolloutConfig
from kimi_core.evaluation.held_out import Evaluator
from kimi_core.loop import Loop
from kimi_core.metrics import MetricsWriter
from kimi_core.models.codec import Codec
from kimi_core.models.load import freeze_below, limit_threads, load_model
from kimi_core.prompts.curriculum import Curriculum
from kimi_core.prompts.load import load_examples, load_prompts, split
from kimi_core.reward.base import RewardFunction, close_reward, load_reward
from kimi_core.reward.groups import GroupScorer
from kimi_core.rollout.engine import Engine
from kimi_core.rollout.phase import buffer_size, sampling_for
from kimi_core.rollout.torch.engine import TorchEngine
from kimi_core.rollout.vllm.engine import VLLMEngine
from kimi_core.run import state as live_buffer
from kimi_core.run.folder import RunFolder, holds_state
from kimi_core.tasks import multiply, programs
from kimi_core.trainer.sft import Example, train_sft
from kimi_core.trainer.trainer import Trainer
from kimi_core.types import Prompt

EVALUATION_SEED = 1_000_003
"""Added to the run's seed for the sampled half of an evaluation."""

SAMPLES_SHOWN = 8
"""Trajectories written to ``samples/`` at each evaluation."""

VOLATILE_SETTINGS = ("_name_or_path", "transformers_version", "use_cache", "dtype")
"""Of a model's config: they do not make it another model."""


@dataclass(frozen=True)
class Parts:
    """What a config describes, built and wired."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    codec: Codec
    train_prompts: list[Prompt]
    reward: RewardFunction
    evaluator: Evaluator
    loop: Loop
    new_buffer: Callable[[Path], RolloutBuffer]
    """Makes an empty buffer of the size that the run needs."""

    def close(self) -> None:
        """End what the reward function holds and give the buffer's file free."""
        close_reward(self.reward)
        self.loop.close()


def train(config: Config, *, resume: bool = False, console: Console | None = None) -> Path:
    """Carry out the run that ``config`` describes and return its folder.

    ``resume`` continues the run that is there; where there is none yet, it starts one.

    Raises:
        ValueError: anything in the config or the files it names that cannot work; before training.
        RewardError, RewardOutage, TrainingDiverged, LogprobMismatch, EngineFailed, OSError:
            training had to stop. The last state saved is intact, and ``resume`` continues from it.
    """
    console = console or Console()
    parts = build(config)
    path = Path(config.runs) / config.name
    if resume and not holds_state(path):
        console.print(f"no run to resume in {path}: starting it", highlight=False, soft_wrap=True)
        resume = False
    with (
        RunFolder.resume(path, config) if resume else RunFolder.create(path, config) as folder,
        closing(parts),
    ):
        if resume:
            sft_s = _restore(parts, folder, console)
        else:
            parts.loop.buffer = live_buffer.start(folder.buffer, parts.new_buffer)
            started = perf_counter()
            fine_tune(parts.model, parts.codec, config, parts.train_prompts, console)
            sft_s = perf_counter() - started
            _save(parts, folder, sft_s)
        with MetricsWriter(
            folder.path,
            total_iterations=config.iterations,
            start_iteration=parts.loop.iteration,
            console=console,
        ) as metrics:
            try:
                _reinforce(parts, config, folder, metrics, sft_s)
            finally:
                metrics.close(sft_s=sft_s)
        folder.save_checkpoint(parts.model, parts.tokenizer)
    return folder.path


def build(config: Config) -> Parts:
    """Load and wire everything; nothing is trained or written.

    Raises:
        ValueError: as the parts raise it, or a prompt that does not fit into the context.
    """
    everything = load_prompts(config.prompts)
    train_prompts, held_out = split(everything, config.prompts.held_out, config.prompts.split_seed)
    reward = load_reward(config.reward)
    model, tokenizer = load_model(config.model, alphabet=alphabet(config), seed=config.seed)
    limit_threads(model)
    freeze_below(model, config.trainer.trainable_layers)
    codec = Codec(tokenizer, config.rollout.stop)
    encoded = {prompt.id: codec.encode_prompt(prompt) for prompt in everything}
    _check_context(model, encoded, config)
    engine = _engine(model, config.rollout)
    tokens, trajectories = buffer_size(list(encoded.values()), config.rollout)
    new_buffer = partial(
        RolloutBuffer.create, capacity_tokens=tokens, max_trajectories=trajectories
    )
    loop = Loop(
        config=config,
        prompts={prompt.id: prompt for prompt in train_prompts},
        encode=lambda prompt: encoded[prompt.id],
        curriculum=Curriculum(train_prompts, config.curriculum),
        engine=engine,
        sampling=sampling_for(config.rollout, codec.stop_token_ids, seed=config.seed),
        buffer=live_buffer.nameless(new_buffer),
        scorer=GroupScorer(config, reward, codec.response_text),
        trainer=Trainer(model, config.trainer, temperature=config.rollout.temperature),
    )
    evaluator = Evaluator(
        engine=engine,
        prompts=held_out,
        encode=lambda prompt: encoded[prompt.id],
        response_text=codec.response_text,
        reward=reward,
        rollout=config.rollout,
        stop_token_ids=codec.stop_token_ids,
        workers=config.reward.workers,
    )
    return Parts(model, tokenizer, codec, train_prompts, reward, evaluator, loop, new_buffer)


def _engine(model: PreTrainedModel, rollout: RolloutConfig) -> Engine:
    if rollout.engine == "torch":
        return TorchEngine(model, batch_rows=rollout.batch_rows)
    # Nothing of vLLM is loaded or started before the first response is asked for.
    return VLLMEngine(
        model,
        batch_rows=rollout.batch_rows,
        options=rollout.vllm.args,
        timeout_s=rollout.vllm.timeout_s,
        start_timeout_s=rollout.vllm.start_timeout_s,
    )


def fine_tune(
    model: PreTrainedModel,
    codec: Codec,
    config: Config,
    train_prompts: list[Prompt],
    console: Console,
) -> None:
    """The SFT phase; nothing where the config has none.

    Raises:
        ValueError: the data is unknown, missing or malformed.
        TrainingDiverged: a loss is not finite.
    """
    if config.sft.data == "none" or not config.sft.steps:
        return
    examples = _sft_examples(config, codec, train_prompts)
    every = max(1, config.sft.steps // 10)

    def report(step: int, loss: float) -> None:
        if step % every == 0:
            console.print(f"sft {step}/{config.sft.steps}  loss {loss:.3f}", highlight=False)

    train_sft(model, examples, config.sft, config.trainer, seed=config.seed, report=report)


def _sft_examples(config: Config, codec: Codec, train_prompts: list[Prompt]) -> list[Example]:
    if config.sft.data in ("multiply", "multiply_lengths"):
        shares = multiply.MIXED if config.sft.data == "multiply" else multiply.LENGTHS
        pairs = multiply.examples(train_prompts, shares, seed=config.seed)
    elif config.sft.data == "programs":
        pairs = programs.examples(train_prompts, programs.MIXED, seed=config.seed)
    elif config.sft.data.endswith(".jsonl"):
        pairs = load_examples(config.sft.data)
    else:
        raise ValueError(
            f"sft.data = {config.sft.data!r}; allowed are none, multiply, multiply_lengths, "
            "programs, or a file that ends in .jsonl"
        )
    if config.sft.examples is not None:
        pairs = random.Random(config.seed).sample(pairs, min(config.sft.examples, len(pairs)))
    return [codec.encode_example(prompt, response) for prompt, response in pairs]


def alphabet(config: Config) -> str:
    """What a model made from scratch must be able to read and write."""
    if config.prompts.source == "programs":
        return programs.ALPHABET
    if config.model.name == "scratch" and config.prompts.source != "multiply":
        raise ValueError(
            "model.name = 'scratch' knows the characters of prompts.source = 'multiply' and "
            f"'programs' only, not of {config.prompts.source!r}: name a pretrained model in "
            "model.name"
        )
    return multiply.ALPHABET


def _check_context(model: PreTrainedModel, encoded: dict[int, np.ndarray], config: Config) -> None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(encoded, key=lambda key: len(encoded[key]))
    needed = len(encoded[longest]) + config.rollout.max_response_tokens
    if context is not None and needed > context:
        raise ValueError(
            f"Prompt {longest} has {len(encoded[longest])} tokens; with "
            f"rollout.max_response_tokens = {config.rollout.max_response_tokens} that is {needed}, "
            f"and the model's context is {context}: shorten the prompt or lower the limit"
        )


def _reinforce(
    parts: Parts, config: Config, folder: RunFolder, metrics: MetricsWriter, sft_s: float
) -> None:
    loop = parts.loop
    if not any(evaluation.iteration == loop.iteration for evaluation in metrics.evaluations):
        evaluate(parts, config, metrics, limit=None if loop.iteration == 0 else _limit(config))
    with _stop_on_interrupt() as stop:
        while not (stop.is_set() or _is_done(loop, config)):
            metrics.iteration(loop.iterate())
            last = stop.is_set() or _is_done(loop, config)
            if last or loop.iteration % config.save_every == 0:
                _save(parts, folder, sft_s)
            if last:
                evaluate(parts, config, metrics)
            elif loop.iteration % config.evaluation.every == 0:
                evaluate(parts, config, metrics, limit=_limit(config))


def _limit(config: Config) -> int | None:
    return config.evaluation.prompts


def _is_done(loop: Loop, config: Config) -> bool:
    enough = config.samples is not None and loop.samples_trained >= config.samples
    return enough or loop.iteration >= config.iterations


def evaluate(
    parts: Parts, config: Config, metrics: MetricsWriter, *, limit: int | None = None
) -> None:
    """Report accuracy on the first ``limit`` held-out prompts; show some trained trajectories."""
    iteration = parts.loop.iteration
    metrics.evaluation(
        parts.evaluator.evaluate(
            iteration=iteration, seed=config.seed + EVALUATION_SEED, limit=limit
        )
    )
    shown = [
        (
            group.prompt.text,
            parts.codec.response_text(trajectory.response_ids),
            float(reward),
            trajectory.end_reason,
            trajectory.policy_versions[trajectory.prompt_length :].tolist(),
        )
        for group in parts.loop.latest_groups
        for trajectory, reward in zip(group.trajectories, group.rewards, strict=True)
    ]
    if shown:
        metrics.sample_text(iteration, shown[:SAMPLES_SHOWN])


def _fingerprint(model: PreTrainedModel) -> str:
    """Tells models apart by what training never changes: settings and frozen parameters."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    settings = {k: v for k, v in model.config.to_dict().items() if k not in VOLATILE_SETTINGS}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            # In the precision that a GPU and a CPU both have the weights in.
            some = parameter.detach().flatten()[:1000].bfloat16().float().cpu()
            digest.update(name.encode() + some.numpy().tobytes())
    return f"{type(model).__name__}, {parameters} parameters, {digest.hexdigest()[:12]}"


def _save(parts: Parts, folder: RunFolder, sft_s: float) -> None:
    """Only what training changes: frozen layers come with the model, and the optimizer is new in
    each iteration."""
    trained = {name: p for name, p in parts.model.named_parameters() if p.requires_grad}
    folder.save_state(
        parts.loop.iteration,
        trained,
        {"buffer.bin": parts.loop.buffer.snapshot},
        parts.loop.state() | {"sft_s": sft_s},
        fingerprint=_fingerprint(parts.model),
    )


def _restore(parts: Parts, folder: RunFolder, console: Console) -> float:
    """Take over the newest state; the seconds that SFT took, back when it ran."""
    saved = folder.load_state(_fingerprint(parts.model))
    with torch.no_grad():
        for name, parameter in parts.model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(saved.tensors[name])
    buffer, remark = live_buffer.resume(folder.buffer, saved.folder / "buffer.bin", saved.iteration)
    console.print(remark, highlight=False, soft_wrap=True)
    parts.loop.load_state(saved.state, buffer)
    return float(saved.state["sft_s"])


@contextmanager
def _stop_on_interrupt() -> Iterator[Event]:
    """The first Ctrl-C sets the event; a second one interrupts at once, as ever."""
    stop = Event()
    if current_thread() is not main_thread():
        yield stop  # Only the main thread may handle signals.
        return

    def request_stop(*_: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, request_stop)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)
