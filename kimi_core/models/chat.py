"""Chat templates: conversations as the text that a model was trained to read."""

from collections.abc import Sequence

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from kimi_core.types import Message

PROBE = "~answer~"
"""An answer whose place in a rendered conversation shows what the template writes behind it."""


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, generate: bool = True
) -> str:
    """The conversation as the tokenizer's own chat template writes it, special tokens included.

    Args:
        messages: at least one; each has at least ``role`` and ``content``.
        generate: whether to end with what the template puts before the model's turn.

    Raises:
        ValueError: the tokenizer has no chat template, or the template refuses the messages.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template; use a chat model, add chat_template.jinja to the "
            "model's folder, or give prompts as text"
        )
    conversation = [dict(message) for message in messages]
    try:
        text = tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=generate
        )
    except (TemplateError, AttributeError, LookupError, TypeError, ValueError) as error:
        roles = ", ".join(message["role"] for message in conversation)
        raise ValueError(
            f"the chat template refuses messages with the roles {roles}: {error}; give the roles "
            "that it allows (without prompts.system, if it has no system role)"
        ) from error
    return str(text)


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token with which the chat template ends the model's turn; None if none does."""
    question = {"role": "user", "content": "?"}
    try:
        text = render(
            tokenizer, [question, {"role": "assistant", "content": PROBE}], generate=False
        )
    except ValueError:
        return None
    if PROBE not in text:
        return None
    behind = text.rpartition(PROBE)[2].lstrip()
    known = tokenizer.added_tokens_decoder.items()
    special = {token.content: id_ for id_, token in known if token.special}
    found = [content for content in special if behind.startswith(content)]
    return special[max(found, key=len)] if found else None


def model_turn(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], response: str, end: int | None
) -> str:
    """The response as the template writes it between the generation prompt and the turn's end.

    Some templates put a space around it. A template that rewrites earlier text when an answer
    follows, as those that drop thoughts do, leaves no such place: then it is the plain response.
    """
    before = render(tokenizer, messages)
    answer = {"role": "assistant", "content": response}
    whole = render(tokenizer, [*messages, answer], generate=False)
    if end is None or not whole.startswith(before):
        return response
    turn = whole[len(before) :].rpartition(str(tokenizer.convert_ids_to_tokens(end)))[0]
    return turn if response.strip() and response.strip() in turn else response
