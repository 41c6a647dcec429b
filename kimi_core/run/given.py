"""What a Python program hands to a run directly, where a config would name a file."""

import hashlib
import inspect
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import CodeType
from typing import Any

from kimi_core.config import Config
from kimi_core.reward.base import RewardFunction
from kimi_core.types import Prompt

GIVEN = "given"
"""What ``prompts.source``, ``sft.data`` and ``reward.function`` say in the config of such a run."""


@dataclass(frozen=True)
class Given:
    """Each is None where the config names it."""

    prompts: Sequence[Prompt] | None = None
    examples: Any = None
    """(prompt, response) pairs for SFT, or a function that makes them from the training prompts."""
    reward: RewardFunction | None = None

    def named_in(self, config: Config) -> Config:
        """The config with ``GIVEN`` wherever something is handed over."""
        changes: dict[str, Any] = {}
        if self.prompts is not None:
            changes["prompts"] = config.prompts.model_copy(update={"source": GIVEN})
        if self.examples is not None:
            changes["sft"] = config.sft.model_copy(update={"data": GIVEN})
        if self.reward is not None:
            update = {"function": GIVEN, "functions": []}
            changes["reward"] = config.reward.model_copy(update=update)
        return config.model_copy(update=changes)

    def digests(self) -> dict[str, str]:
        """Name → digest, by which a resumed run knows what it was given.

        A function counts with its source, a lambda with what it compiles to. What it
        refers to is not part of it: values of variables outside of it, and functions that it calls.
        Prompts are compared in another way (``run/state.py``).
        """
        found = {}
        if self.examples is not None:
            is_function = callable(self.examples)
            text = (
                _code_of(self.examples) if is_function else json.dumps(self.examples, default=repr)
            )
            found["the given SFT examples"] = _digest(text)
        if self.reward is not None:
            found["the given reward function"] = _digest(_code_of(self.reward))
        return found


NOTHING = Given()
"""Everything is named in the config."""


def refuse_missing(config: Config, given: Given) -> None:
    """Refuse the config of a run that was given something, if that is not given now.

    Raises:
        ValueError: it is not; the message names the argument.
    """
    for setting, value, argument, handed in (
        ("prompts.source", config.prompts.source, "prompts", given.prompts),
        ("sft.data", config.sft.data, "examples", given.examples),
        ("reward.function", config.reward.function, "reward", given.reward),
    ):
        if value == GIVEN and handed is None:
            raise ValueError(
                f"{setting} = {GIVEN!r}: a Python program gave them to kimi_core.train; call it "
                f"again with {argument}=..., or name a source in {setting}"
            )


def _code_of(function: Any) -> str:
    """The source of a function that ``def`` made; of a lambda and others, what they compile to."""
    if inspect.isfunction(function) and function.__name__ != "<lambda>":
        with suppress(OSError):  # It was typed at a prompt.
            return inspect.getsource(function)
    called = function if inspect.isfunction(function) else type(function).__call__
    code = getattr(called, "__code__", None)
    return _compiled(code) if code else type(function).__qualname__


def _compiled(code: CodeType) -> str:
    """Instructions, names and constants, without where the code stands."""
    constants = [
        _compiled(one)
        if isinstance(one, CodeType)
        else repr(sorted(map(repr, one)) if isinstance(one, frozenset) else one)
        for one in code.co_consts
    ]
    return repr((code.co_code, code.co_names, constants))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]
