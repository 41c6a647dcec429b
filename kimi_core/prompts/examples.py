"""The examples of SFT: from a built-in task, a file, a function of the user, or given in Python."""

import random
from collections.abc import Callable, Sequence
from typing import Any

from kimi_core.config import Config
from kimi_core.plugins import load_function
from kimi_core.prompts.columns import Columns
from kimi_core.prompts.jsonl import Place, TextExample, example_of, load_examples
from kimi_core.prompts.messages import check_messages
from kimi_core.prompts.tables import is_table, records_of
from kimi_core.tasks import multiply, programs, retrieve, vision
from kimi_core.types import Prompt


def sft_examples(
    config: Config, train_prompts: Sequence[Prompt], given: Any = None
) -> list[TextExample]:
    """The examples that ``sft.data`` names, or those that are ``given``, as text.

    Args:
        given: pairs, or a function that makes them from the training prompts; None: nothing is.

    Raises:
        ValueError: the data is unknown, missing or malformed.
    """
    pairs = _examples_of(config, train_prompts, given)
    if config.sft.examples is not None:
        count = min(config.sft.examples, len(pairs))
        chosen = random.Random(config.seed).sample(range(len(pairs)), count)
        pairs = [pairs[index] for index in (chosen if config.sft.shuffle else sorted(chosen))]
    return pairs


def _examples_of(config: Config, train_prompts: Sequence[Prompt], given: Any) -> list[TextExample]:
    source = config.sft.data
    if callable(given):
        return _made_by(given, train_prompts, "examples")
    if given is not None:
        return _checked(given, "examples")
    if source in ("multiply", "multiply_lengths"):
        shares = multiply.MIXED if source == "multiply" else multiply.LENGTHS
        return list(multiply.examples(train_prompts, shares, seed=config.seed))
    if source == "retrieve":
        return list(_retrieve_examples(config))
    if source == "vision":
        return list(_vision_examples(config, train_prompts))
    if source == "programs":
        return list(programs.examples(train_prompts, programs.MIXED, seed=config.seed))
    if source.endswith(".jsonl"):
        return load_examples(source, _columns(config))
    if is_table(source):
        rows = enumerate(records_of(source, split=config.prompts.split), 1)
        return [example_of(one, Place(source, row, "row"), _columns(config)) for row, one in rows]
    if ".py:" in source:
        return _made_by(load_function(source), train_prompts, source)
    raise ValueError(
        f"sft.data = {source!r}; allowed are none, multiply, multiply_lengths, retrieve, programs, "
        "vision, a file that ends in .jsonl, .csv, .parquet or .arrow, a folder of datasets, "
        "hub:OWNER/NAME, or file.py:function, which takes the training prompts"
    )


def _columns(config: Config) -> Columns:
    return Columns(config.sft.fields, config.prompts.template)


def _made_by(
    function: Callable[..., Any], train_prompts: Sequence[Prompt], source: str
) -> list[TextExample]:
    try:
        found = function(list(train_prompts))
    except Exception as error:  # The user's code may raise anything.
        raise ValueError(f"{source} raised {type(error).__name__}: {error}") from error
    return _checked(found, source)


def _retrieve_examples(config: Config) -> list[tuple[str, str]]:
    """One example for each step and place in the batch: no text comes twice."""
    task, sft = config.prompts.task, config.sft
    count = sft.examples or sft.steps * sft.batch_size
    return retrieve.examples(count, task.numbers, task.length, retrieve.MIXED, seed=config.seed)


def _vision_examples(config: Config, train_prompts: Sequence[Prompt]) -> list[tuple[Prompt, str]]:
    if config.prompts.source != "vision":
        raise ValueError(
            f"sft.data = 'vision' needs prompts.source = 'vision', not {config.prompts.source!r}"
        )
    count = config.sft.examples or config.sft.steps * config.sft.batch_size
    split_seed = config.prompts.split_seed
    return vision.examples(train_prompts, count, split_seed=split_seed, seed=config.seed)


def _checked(found: object, source: str) -> list[TextExample]:
    """Examples from the user's program. Raises ValueError unless they are (prompt, response)."""
    if not isinstance(found, list | tuple) or not found:
        raise ValueError(
            f"{source}: found {found!r:.80}; expected a non-empty list of (prompt, response)"
        )
    return [_pair(one, f"{source}, at index {index}") for index, one in enumerate(found)]


def _pair(one: object, where: str) -> TextExample:
    if isinstance(one, list | tuple) and len(one) == 2:
        prompt, response = one
        is_prompt = isinstance(prompt, Prompt)
        if is_prompt and not prompt.images:
            prompt, is_prompt = prompt.messages or prompt.text, False
        if isinstance(response, str) and response:
            if is_prompt:
                return prompt, response
            if isinstance(prompt, str) and prompt:
                return prompt, response
            if isinstance(prompt, list | tuple):
                return check_messages(prompt, where), response
    raise ValueError(
        f"{where}: found {one!r:.80}; expected (prompt, response), both text that is not empty"
    )
