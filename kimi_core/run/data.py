"""What a run learns from, loaded and checked before its model is, and the tokenizer made of it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from kimi_core.config import Config
from kimi_core.evaluation.sets import EvaluationSet, load_sets
from kimi_core.models.scratch import (
    CHAT,
    character_tokenizer,
    tokenizer_of,
    trained_tokenizer,
)
from kimi_core.prompts.examples import sft_examples
from kimi_core.prompts.jsonl import TextExample
from kimi_core.prompts.load import load_prompts, split
from kimi_core.prompts.many import facts_of
from kimi_core.prompts.messages import example_in_chat
from kimi_core.run.given import NOTHING, Given, refuse_missing
from kimi_core.tasks import multiply, programs, retrieve, vision
from kimi_core.types import IMAGE_MARK, Message, Prompt


@dataclass(frozen=True)
class Data:
    """Prompts, and the examples of SFT."""

    prompts: Sequence[Prompt]
    """All of them, in the order of their source."""
    train: Sequence[Prompt]
    held_out: list[Prompt]
    examples: list[TextExample]
    """Empty if there is no SFT."""
    sets: dict[str, EvaluationSet]
    """The other evaluation sets by name."""

    @property
    def asked(self) -> Iterator[Prompt]:
        """Every prompt that the model may be asked."""
        return chain(self.prompts, *(one.prompts for one in self.sets.values()))


def load_data(config: Config, given: Given = NOTHING) -> Data:
    """Load and split the prompts, and load the examples of SFT.

    Raises:
        ValueError: a source is unknown, missing or malformed.
    """
    refuse_missing(config, given)
    prompts = load_prompts(config.prompts, given=given.prompts)
    train, held_out = split(prompts, config.prompts.held_out, config.prompts.split_seed)
    is_on = config.sft.data != "none" and config.sft.steps > 0
    examples = sft_examples(config, train, given.examples) if is_on else []
    return Data(prompts, train, held_out, examples, load_sets(config))


def _read(saved: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(saved))
    except Exception as error:  # noqa: BLE001 - tokenizers raises nothing narrower.
        raise ValueError(
            f"{saved} is damaged ({error}): remove it, and --resume makes it again from the data"
        ) from None


def scratch_tokenizer(
    config: Config, data: Data, saved: Path | None = None
) -> PreTrainedTokenizerFast | None:
    """The tokenizer of a model from scratch, made from prompts, answers and SFT examples.

    It knows every character of these, and those of a built-in task's answers.

    Args:
        saved: that of the run which is continued; its file need not exist.

    Returns None for a model that brings its own.

    Raises:
        ValueError: there is no character, or the saved tokenizer does not know one.
    """
    if config.model.name != "scratch":
        return None
    is_chat = _has_conversations(data)
    if saved is not None and saved.is_file():
        tokenizer = tokenizer_of(_read(saved))
        if config.model.scratch.vocabulary is None:
            _check_known(tokenizer, _texts(config, data), saved)
    elif config.model.scratch.vocabulary is None:
        tokenizer = character_tokenizer("".join(_characters(_texts(config, data))))
    else:
        tokenizer = trained_tokenizer(_texts(config, data), config.model.scratch.vocabulary)
    if is_chat:
        tokenizer.chat_template = CHAT
    return tokenizer


def _has_conversations(data: Data) -> bool:
    asked = any(_asked(one)[0] for one, _ in data.examples)
    sets = (prompt for one in data.sets.values() for prompt in one.prompts)
    asked = asked or any(prompt.messages for prompt in sets)
    return asked or bool((facts_of(data.prompts).sizes < 0).any())


def _characters(texts: Iterator[str]) -> set[str]:
    found: set[str] = set()
    for text in texts:
        found.update(text)
    return found


def _texts(config: Config, data: Data) -> Iterator[str]:
    """Every text that the model reads or should write."""
    yield _notation(config)
    for prompt in data.asked:
        yield from _parts(prompt)
        yield prompt.answer
    for asked, response in data.examples:
        yield from _parts(example_in_chat(asked, config.prompts))
        yield response


def _asked(prompt: str | Sequence[Message] | Prompt) -> tuple[Sequence[Message], str]:
    """The messages of a prompt, or else its text, without the marks of images."""
    if isinstance(prompt, Prompt):
        text = prompt.text.replace(IMAGE_MARK, "") if prompt.images else prompt.text
        return prompt.messages, text
    return ((), prompt) if isinstance(prompt, str) else (prompt, "")


def _parts(prompt: str | Sequence[Message] | Prompt) -> Iterator[str]:
    """The texts of a prompt, with what the chat template puts between them."""
    messages, text = _asked(prompt)
    if not messages:
        yield text
        return
    for message in messages:
        yield f"{message['role']}: {message['content']}\n"
    yield "assistant: "


def _notation(config: Config) -> str:
    """The characters of a built-in task, also of answers that no example has."""
    source = config.prompts.source
    if source == "multiply":
        return multiply.ALPHABET
    if source == "retrieve":
        return retrieve.alphabet(config.prompts.task.numbers)
    if source == "vision":
        return vision.ALPHABET
    return programs.ALPHABET if source == "programs" else ""


def _check_known(tokenizer: PreTrainedTokenizerFast, texts: Iterator[str], saved: Path) -> None:
    if unknown := sorted(_characters(texts) - tokenizer.get_vocab().keys()):
        raise ValueError(
            f"Prompts or SFT examples have {', '.join(map(repr, unknown[:10]))}, which this run's "
            f"model does not know: it knows the characters in {saved}. Take the new ones out, or "
            "start a run with another name=..."
        )
