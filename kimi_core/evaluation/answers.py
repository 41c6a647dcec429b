"""Draws n answers of a model to each prompt, judges them, and records them.

Curation, warm-up sets, evaluation and shortest rejection sampling share this::

    with closing(Responder(config)) as responder, closing(Record(path)) as record:
        draw = Draw("solve", samples=10, max_tokens=256)
        answers = answers_to(prompts, draw, responder, record, Console())

A prompt is recorded as soon as its answers are judged. After a crash the same call goes on with the
prompts that are not recorded. What a token is sampled with depends on the seed, the draw's name,
the prompt and the position alone, so a resumed record holds what an uninterrupted one would (up to
rounding: other rows of a batch may change the last bits of a log-prob).
"""

import hashlib
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from kimi_core import _C
from kimi_core.config import Config
from kimi_core.evaluation.record import Answer, Record, key_of
from kimi_core.models.codec import Codec
from kimi_core.models.load import check_weights, context_of, load_model
from kimi_core.models.placement import limit_threads
from kimi_core.models.vision_load import load_images
from kimi_core.reward.base import (
    InfrastructureError,
    LimitReached,
    RewardFunction,
    RewardOutage,
    name_of,
)
from kimi_core.reward.judging import verdicts_on
from kimi_core.reward.load import close_reward, load_reward
from kimi_core.rollout.load import load_engine
from kimi_core.rollout.phase import sampling_for
from kimi_core.types import Prompt, Request, Segment

log = logging.getLogger(__name__)

OUTAGE = 3
"""Prompts in a row without any verdict, after which the reward function is taken to be away."""


@dataclass(frozen=True)
class Draw:
    """How many answers to draw to each prompt, and how."""

    name: str
    """Names the answers in a record."""
    samples: int
    max_tokens: int
    """Length limit of an answer."""
    temperature: float = 1.0
    """0 takes the most likely token."""


class Responder:
    """A model with its engine and a reward function, as a config describes them.

    Of the config, ``model``, ``rollout``, ``reward`` and ``seed`` are read.

    Args:
        reward: judges in place of ``config.reward``, and is closed here; its name is recorded.

    Raises:
        ValueError: a setting cannot work, or the model is an untrained one from scratch.
    """

    def __init__(self, config: Config, *, reward: RewardFunction | None = None) -> None:
        if config.model.name == "scratch":
            raise ValueError(
                "model.name = 'scratch' is a model with random weights, whose answers tell "
                "nothing: name a trained one, such as the checkpoint that `kimi sft` writes"
            )
        self.config = config
        self._named = None if reward is None else name_of(reward)
        self._reward = reward or load_reward(config.reward)
        model, tokenizer = load_model(config.model)
        check_weights(model)
        limit_threads(model)
        self._images = load_images(model, config)
        self.codec = Codec(tokenizer, config.rollout.stop, model, self._images)
        self._context = context_of(model)
        self.weights = _checksum(model)
        """CRC-32C of the model's parameters."""
        self._engine, self._publisher = load_engine(
            model, config.rollout, None, images=self._images
        )
        self._publisher.publish(model.named_parameters(), 0)
        self._engine.serve(0)

    def fits(self, prompt: Prompt, max_tokens: int) -> bool:
        """Whether the model's context has room for the prompt and an answer of ``max_tokens``.

        Raises:
            ValueError: the prompt cannot be tokenized.
        """
        tokens = len(self._encode(prompt))
        return self._context is None or tokens + max_tokens <= self._context

    def draw(
        self,
        draw: Draw,
        prompts: Sequence[Prompt],
        record: Record,
        *,
        advance: Callable[[], object] = lambda: None,
    ) -> None:
        """Draw and judge the answers to all prompts that are not yet recorded.

        Args:
            advance: called once for each prompt that was recorded.

        Raises:
            ValueError: the record has answers under this name with other settings, or a prompt
                does not fit into the context.
            RewardError: the reward function raised, or returned no finite number.
            RewardOutage: the reward function has no verdicts. Those prompts are not recorded.
            EngineFailed: the engine could not be kept alive.
        """
        record.begin(draw.name, self._settings(draw))
        left = {key_of(prompt): prompt for prompt in prompts}
        left = {key: prompt for key, prompt in left.items() if not record.has(draw.name, key)}
        silent: list[tuple[str, list[Answer]]] = []
        missing = None
        for key, segments in self._sampled(draw, left):
            answers, missing = self._judged(left[key], segments)
            silent = [*silent, (key, answers)] if missing else silent
            if missing is None:
                for one in [*silent, (key, answers)]:
                    record.add(draw.name, *one)
                    advance()
                silent = []
            elif len(silent) >= OUTAGE:
                raise _outage(missing)
        if silent and missing and not record.count(draw.name):
            raise _outage(missing)
        for one in silent:
            record.add(draw.name, *one)
            advance()

    def _encode(self, prompt: Prompt) -> np.ndarray:
        if self._images is not None:
            self._images.add([prompt])
        return self.codec.encode_prompt(prompt)

    def close(self) -> None:
        """End the processes of reward function and engine, and free the memory they shared."""
        close_reward(self._reward)
        self._engine.close()
        self._publisher.close()

    def _settings(self, draw: Draw) -> dict[str, Any]:
        """What must be the same for answers to belong together."""
        config = self.config
        reward = config.reward.model_dump(exclude={"workers", "timeout_s", "sandbox"})
        return {
            "samples": draw.samples,
            "max_tokens": draw.max_tokens,
            "temperature": draw.temperature,
            "seed": config.seed,
            "model": config.model.name,
            "weights": self.weights,
            "stop": config.rollout.stop,
            "repeat": [config.rollout.repeat_window, config.rollout.repeat_count],
            "reward": self._named or reward,
        }

    def _sampled(
        self, draw: Draw, prompts: dict[str, Prompt]
    ) -> Iterator[tuple[str, list[Segment]]]:
        """The key of each prompt and its answers, as soon as all of them have ended."""
        requests, owners = [], {}
        for key, prompt in prompts.items():
            ids, first = self._encode(prompt), _first_id(draw, key)
            owners[first // draw.samples] = key
            requests += [
                Request(first + n, ids, len(ids), budget=draw.max_tokens, remaining=draw.max_tokens)
                for n in range(draw.samples)
            ]
        sampling = sampling_for(
            self.config.rollout,
            self.codec.stop_token_ids,
            self.codec.stop_strings,
            seed=self.config.seed,
            greedy=draw.temperature == 0,
        )
        sampling = replace(sampling, temperature=draw.temperature, stream_tokens=0)
        grown: dict[int, list[Segment]] = defaultdict(list)
        for segments in self._engine.generate(requests, sampling):
            for segment in segments:
                owner = segment.trajectory_id // draw.samples
                grown[owner].append(segment)
                if len(grown[owner]) == draw.samples:
                    whole = sorted(grown.pop(owner), key=lambda one: one.trajectory_id)
                    yield owners[owner], whole

    def _judged(
        self, prompt: Prompt, segments: Sequence[Segment]
    ) -> tuple[list[Answer], InfrastructureError | None]:
        """The answers; and why there is no verdict, if that holds of all and is not their fault."""
        texts = [self.codec.response_text(one.token_ids) for one in segments]
        settings = self.config.reward
        pairs = [(prompt, text) for text in texts]
        verdicts = verdicts_on(self._reward, pairs, settings.workers, settings.timeout_s)
        faults = [one for one in verdicts if isinstance(one, InfrastructureError)]
        for fault in faults:
            log.warning("No verdict on an answer to prompt %d: %s", prompt.id, fault)
        answers = [
            Answer(
                text,
                len(segment),
                segment.end_reason or "length",
                None if isinstance(verdict, InfrastructureError) else verdict.value,
            )
            for text, segment, verdict in zip(texts, segments, verdicts, strict=True)
        ]
        away = [one for one in faults if not isinstance(one, LimitReached)]
        return answers, away[-1] if len(away) == len(verdicts) else None


def answers_to(
    prompts: Sequence[Prompt], draw: Draw, responder: Responder, record: Record, console: Console
) -> list[list[Answer]]:
    """Complete a draw under a progress bar, and return the answers to each prompt.

    Raises: as ``Responder.draw``.
    """
    keys = [key_of(prompt) for prompt in prompts]
    done = sum(record.has(draw.name, key) for key in set(keys))
    with Progress(console=console) as progress:
        task = progress.add_task(draw.name, total=len(set(keys)), completed=done)
        responder.draw(draw, prompts, record, advance=lambda: progress.advance(task))
    return [record.answers(draw.name, key) for key in keys]


def asked_by(template: str, prompt: Prompt) -> Prompt:
    """The prompt as the template asks it: ``{prompt}`` is its text, or its last message's."""
    if not prompt.messages:
        return replace(prompt, text=template.replace("{prompt}", prompt.text))
    *before, last = prompt.messages
    content = template.replace("{prompt}", last["content"])
    return replace(prompt, messages=(*before, {**last, "content": content}))


def _outage(reason: InfrastructureError) -> RewardOutage:
    return RewardOutage(
        f"The reward function has no verdicts, the last time because: {reason}. Repair it, or "
        "take out the prompts that it cannot judge, and give the same command again: what was "
        "judged before is kept"
    )


def _first_id(draw: Draw, key: str) -> int:
    """The trajectory id of a prompt's first answer; its others follow. It seeds the sampling."""
    digest = hashlib.sha256(f"{draw.name} {key}".encode()).digest()
    return int.from_bytes(digest[:6], "big") * draw.samples


def _checksum(model: torch.nn.Module) -> str:
    """Names the weights of a model."""
    crc = 0
    for parameter in model.parameters():
        values = parameter.detach().cpu().flatten().view(torch.uint8)
        crc = _C.crc32c(values.numpy().data, crc)
    return f"{crc:08x}"
