"""Prompts as conversations: lists of messages with ``role`` and ``content``."""

import json
from collections.abc import Sequence
from dataclasses import replace

from kimi_core.config import PromptsConfig
from kimi_core.models.images import reference_of
from kimi_core.types import Message, Prompt

EXAMPLE = '[{"role": "user", "content": "..."}]'


def check_messages(found: object, where: object) -> tuple[Message, ...]:
    """The messages of a prompt, to which the model's answer is the next one.

    Raises:
        ValueError: it is not a list of messages, or the last one is an answer; ``where`` is named.
    """
    if not isinstance(found, list | tuple) or not found:
        raise ValueError(f"{where}: found {found!r:.80}; messages are a list like {EXAMPLE}")
    for message in found:
        if not _is_message(message):
            raise ValueError(
                f"{where}: a message is {json.dumps(message, default=repr):.80}; allowed are "
                f"objects whose role and content are strings, {EXAMPLE}"
            )
    if found[-1]["role"] == "assistant":
        raise ValueError(
            f"{where}: the last message is the assistant's; the model answers the messages, so end "
            "with the user's"
        )
    return tuple(found)


def fields_of(prompt: Prompt) -> dict[str, object]:
    """What is asked, as the fields of a JSONL line: ``messages``, or ``prompt``; and ``images``."""
    messages = [*map(dict, prompt.messages)]
    asked: dict[str, object] = {"messages": messages} if messages else {"prompt": prompt.text}
    images = [reference_of(image) for image in prompt.images]
    return asked | {"images": images} if images else asked


def question(messages: Sequence[Message]) -> str:
    """The messages as text for people and reward functions, without the system message.

    >>> question([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}])
    '1+1?'
    """
    turns = [one for one in messages if one["role"] not in ("system", "developer")]
    if [one["role"] for one in turns] == ["user"]:
        return str(turns[0]["content"])
    return "\n\n".join(f"{one['role']}: {one['content']}" for one in turns or messages)


def example_in_chat(
    prompt: str | Sequence[Message] | Prompt, config: PromptsConfig
) -> str | Sequence[Message] | Prompt:
    """The prompt of an SFT example as ``config.chat`` and ``config.system`` want it.

    Raises: as `in_chat`.
    """
    if isinstance(prompt, Prompt):
        (prompt,) = chat_prompts([prompt], config)
        return prompt
    return in_chat(prompt, config)


def in_chat(prompt: str | Sequence[Message], config: PromptsConfig) -> str | Sequence[Message]:
    """The prompt as ``config.chat`` and ``config.system`` want it.

    Raises:
        ValueError: there is a system message to put before a prompt that stays text.
    """
    if isinstance(prompt, str):
        if not config.chat:
            if config.system:
                raise ValueError(
                    f"prompts.system = {config.system!r:.80} has no place in a prompt that is text "
                    f"({prompt!r:.80}); set prompts.chat = true, or give `messages`"
                )
            return prompt
        prompt = ({"role": "user", "content": prompt},)
    if config.system and prompt[0]["role"] not in ("system", "developer"):
        prompt = ({"role": "system", "content": config.system}, *prompt)
    return prompt


def chat_prompts(prompts: Sequence[Prompt], config: PromptsConfig) -> list[Prompt]:
    """The prompts as ``config.chat`` and ``config.system`` want them.

    Raises: as `in_chat`.
    """
    found = []
    for prompt in prompts:
        messages = in_chat(prompt.messages or prompt.text, config)
        found.append(prompt if isinstance(messages, str) else replace(prompt, messages=messages))
    return found


def _is_message(found: object) -> bool:
    if not isinstance(found, dict) or not found.get("role"):
        return False
    return isinstance(found["role"], str) and isinstance(found.get("content"), str)
