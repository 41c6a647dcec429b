"""How long a run will take: its work, counted, times the speed of this machine, measured."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from kimi_core.config import Config
from kimi_core.models.codec import Codec
from kimi_core.prompts.jsonl import TextExample
from kimi_core.prompts.messages import example_in_chat
from kimi_core.rollout.load import reads_trainer
from kimi_core.run.report import clock
from kimi_core.run.speed import measure
from kimi_core.run.work import Lengths, Work, whole
from kimi_core.types import Prompt

T = TypeVar("T")

LOOKED_AT = 50
"""Prompts and examples whose lengths are taken for those of all."""

FEW_STEPS, LITTLE_FLOP = 1_000, 2e10
"""Work that any machine does in less than a minute. It is not measured for."""

FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a model may raise that cannot be measured. An estimate must not end a run."""


class HasPrompts(Protocol):
    """An evaluation set."""

    @property
    def prompts(self) -> Sequence[Prompt]: ...


@dataclass(frozen=True)
class Sizes:
    """What the work is counted from: lengths in tokens, and numbers of prompts."""

    short: Lengths
    """With responses as SFT examples have them, or answers if there are none."""
    longest: Lengths
    """With responses as long as allowed."""
    example: float
    """Of an SFT example, prompt included; 0: there is no SFT."""
    held_out: int
    sets: tuple[tuple[int, int], ...]
    """Prompts and samples of each other evaluation set."""
    images: bool
    """Prompts have images. What turns them into features is not measured."""

    @classmethod
    def of(
        cls,
        config: Config,
        prompts: Sequence[Prompt],
        encode: Callable[[Prompt], np.ndarray],
        codec: Codec,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[TextExample],
        held_out: Sequence[Prompt],
        sets: Mapping[str, HasPrompts],
    ) -> "Sizes":
        """Looks at some prompts and examples, spread over all.

        Raises:
            ValueError: one of them cannot be tokenized.
        """
        most = config.rollout.max_response_tokens
        asked = _some(prompts)
        prompt = float(np.mean([len(encode(one)) for one in asked]))
        # Images have their numbers in the order in which they are met, so these are not met here.
        texts = [one for one in examples if not (isinstance(one[0], Prompt) and one[0].images)]
        pairs = [
            codec.encode_example(example_in_chat(before, config.prompts), response)
            for before, response in _some(texts)
        ]
        lengths = [len(response) for _, response in pairs]
        lengths = lengths or [len(tokenizer(one.answer).input_ids) + 1 for one in asked]
        capped = np.minimum(lengths, most)
        return cls(
            short=Lengths(prompt, float(capped.mean()), float(capped.max())),
            longest=Lengths(prompt, most, most),
            example=float(np.mean([len(a) + len(b) for a, b in pairs])) if pairs else 0.0,
            held_out=len(held_out),
            sets=tuple(
                (len(one.prompts), config.evaluation.sets[name].samples)
                for name, one in sets.items()
            ),
            images=any(one.images for one in asked),
        )

    def work(self, config: Config, lengths: Lengths) -> Work:
        return whole(config, lengths, self.example, self.held_out, self.sets)


def expected(
    config: Config, architecture: PretrainedConfig, parameters: int, sizes: Callable[[], Sizes]
) -> str:
    """The time of a run in words, or why there is none.

    Args:
        architecture: of its model, which ``run/speed.py`` makes thin and measures.
        parameters: of its model.
    """
    if config.trainer.ranks > 1 or not reads_trainer(config.rollout, config.cluster):
        return "not known: only one process with the engine torch is measured"
    try:
        found = sizes()
        works = [found.work(config, lengths) for lengths in (found.short, found.longest)]
        if _is_little(works[1], parameters):
            return "less than a minute, without rewards"
        speed = measure(architecture, config, found.short)
    except FAULTS as error:
        return f"not known: the model cannot be measured ({type(error).__name__}: {error})"
    short_s, long_s = (float(np.dot(work, speed)) for work in works)
    kind = "SFT examples" if found.example else "answers"
    without = "rewards and the reading of images" if found.images else "rewards"
    return (
        f"roughly {clock(short_s)} if responses are as long as the {kind} "
        f"({found.short.response:.0f} tokens), {clock(long_s)} if all are as long as allowed "
        f"({found.longest.response:.0f}); on an idle machine, without {without}"
    )


def _is_little(work: Work, parameters: int) -> bool:
    return work.steps + work.updates <= FEW_STEPS and work.flop(parameters) <= LITTLE_FLOP


def _some(of: Sequence[T]) -> list[T]:
    step = max(1, len(of) // LOOKED_AT)
    return [of[at] for at in range(0, len(of), step)]
