"""Loads prompts, and splits off those that are held out for evaluation."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from kimi_core.config import PromptsConfig
from kimi_core.plugins import load_function
from kimi_core.prompts.columns import Columns
from kimi_core.prompts.file import PromptFile
from kimi_core.prompts.jsonl import Place, prompt_of
from kimi_core.prompts.many import MANY, InMemory, ManyPrompts, facts_of
from kimi_core.prompts.messages import chat_prompts, check_messages, question
from kimi_core.prompts.tables import is_table, records_of
from kimi_core.tasks import addition, humaneval, maximum, multiply, programs, retrieve, vision
from kimi_core.types import Prompt


def load_prompts(
    config: PromptsConfig,
    *,
    base_folder: str | Path = ".",
    given: Sequence[Prompt] | None = None,
) -> Sequence[Prompt]:
    """All prompts of ``config.source``, in a fixed order and with distinct ids.

    ``config.chat`` and ``config.system`` are applied. More than ``MANY`` prompts are `ManyPrompts`.

    Args:
        base_folder: the folder that a relative file name in ``config.source`` starts from.
        given: these are taken in place of ``config.source``.

    Raises:
        ValueError: the source is unknown, a file is missing or malformed, or a function does not
            return a list of prompts with distinct ids.
    """
    if given is None and config.source.endswith(".jsonl"):
        file = PromptFile(Path(base_folder) / config.source, config)
        many = ManyPrompts(file, file.facts, np.arange(len(file)))
        return many if len(many) > MANY else list(many)
    found = _prompts_of(config, base_folder) if given is None else _check_prompts(given, "prompts")
    prompts = chat_prompts(found, config)
    if len(prompts) <= MANY:
        return prompts
    return ManyPrompts(InMemory(prompts), facts_of(prompts), np.arange(len(prompts)))


def _prompts_of(config: PromptsConfig, base_folder: str | Path) -> list[Prompt]:
    source = config.source
    if is_table(source, base_folder):
        columns = Columns(config.fields, config.template)
        rows = enumerate(records_of(source, split=config.split, base_folder=base_folder))
        return [prompt_of(one, row, Place(source, row + 1, "row"), columns) for row, one in rows]
    if config.fields or config.template:
        raise ValueError(
            f"prompts.fields and prompts.template are for files and data sets; prompts.source = "
            f"{source!r} has no columns"
        )
    if source == "multiply":
        return multiply.prompts()
    if source == "addition":
        # The split's seed, so that runs with different seeds are tested on the same prompts.
        return addition.prompts(config.task.shots, config.task.largest, config.split_seed)
    if source == "maximum":
        return maximum.prompts(config.task.shots, config.task.largest, config.split_seed)
    if source == "retrieve":
        task = config.task
        return retrieve.prompts(task.count, task.numbers, task.length, config.split_seed)
    if source == "programs":
        return programs.prompts()
    if source == "vision":
        return vision.prompts(config.split_seed)
    if source == "humaneval":
        return humaneval.prompts()
    if ".py:" in source:
        function = load_function(source, base_folder)
        try:
            found = function()
        except Exception as error:  # The user's code may raise anything.
            raise ValueError(f"{source} raised {type(error).__name__}: {error}") from error
        return _check_prompts(found, source)
    raise ValueError(
        f"prompts.source = {source!r}; allowed are multiply, addition, maximum, retrieve, "
        "programs, vision, humaneval, a file that ends in .jsonl, .csv, .parquet or .arrow, a "
        "folder of datasets, hub:OWNER/NAME, or file.py:function"
    )


def split(
    prompts: Sequence[Prompt], held_out: int, seed: int
) -> tuple[Sequence[Prompt], list[Prompt]]:
    """Split into (training prompts in the given order, held-out prompts in random order).

    So the first held-out prompts, which evaluations during a run use, are a fair sample. Prompts
    with the same ``problem`` tag (or, without the tag, the same text and images) stay on one side,
    so that no held-out question appears in training in another form. Whole problems are drawn at
    random as long as they fit into ``held_out`` prompts.

    Raises:
        ValueError: no prompt would be left to train on, or no problem is small enough to hold out.
    """
    if held_out >= len(prompts):
        raise ValueError(
            f"Cannot hold out {held_out} of {len(prompts)} prompts: at least one must be left to "
            "train on; lower prompts.held_out"
        )
    members, starts = _by_problem(facts_of(prompts).problems)
    sizes = np.diff(starts).tolist()
    order = list(range(len(sizes)))
    random.Random(seed).shuffle(order)
    test: list[int] = []
    for problem in order:
        if len(test) + sizes[problem] <= held_out:
            test.extend(members[starts[problem] : starts[problem + 1]].tolist())
    if not test:
        raise ValueError(
            f"Cannot hold out {held_out} prompts: each problem has at least {min(sizes)}, which "
            "stay together; raise prompts.held_out"
        )
    is_train = np.ones(len(prompts), bool)
    is_train[test] = False
    train = np.flatnonzero(is_train)
    held = [prompts[row] for row in test]
    if isinstance(prompts, ManyPrompts):
        return prompts.take(train), held
    return [prompts[row] for row in train.tolist()], held


def _by_problem(problems: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows sorted by problem, int64 ``[n]``, and where each problem starts, int64 ``[m + 1]``.

    Problems are in the order of their first rows, and the rows of each one ascend.
    """
    _, first, which = np.unique(problems, return_index=True, return_inverse=True)
    place = np.empty(len(first), np.int64)
    place[np.argsort(first)] = np.arange(len(first))
    counts = np.bincount(place[which])
    return np.argsort(place[which], kind="stable"), np.append(0, np.cumsum(counts))


def _check_prompts(found: object, source: str) -> list[Prompt]:
    if not isinstance(found, list | tuple) or not found:
        raise ValueError(f"{source}: found {found!r:.80}; expected a non-empty list of Prompt")
    ids: set[int] = set()
    prompts = []
    for index, prompt in enumerate(found):
        if not isinstance(prompt, Prompt):
            raise ValueError(f"{source}: found {prompt!r:.80} at index {index}; expected a Prompt")
        if prompt.id in ids:
            raise ValueError(
                f"{source}: two prompts have the id {prompt.id}; give each its own, as "
                "success rates are kept by id"
            )
        ids.add(prompt.id)
        if prompt.messages:
            messages = check_messages(prompt.messages, f"{source}, prompt {prompt.id}")
            text = prompt.text or question(messages)
            prompt = replace(prompt, text=text, messages=messages)
        prompts.append(prompt)
    return prompts
