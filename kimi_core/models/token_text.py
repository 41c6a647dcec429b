"""The text of tokens that stand in the middle of a response, here or in another process.

A tokenizer treats the start of a text in its own way, so such tokens are read behind a lead, a
token whose text stays the same whatever follows, and its text is taken away again.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


class TokenText:
    """Gives the text of token ids that stand behind others.

    Args:
        decode: gives the text of token ids that stand alone, special tokens included.
        lead: the token to put in front; None: there is none.
    """

    def __init__(self, decode: Callable[[list[int]], str], lead: int | None) -> None:
        self.decode, self.lead = decode, lead
        self.lead_text = decode([lead]) if lead is not None else ""

    def __call__(self, ids: Sequence[int]) -> str:
        if self.lead is None or not ids:
            return self.decode(list(ids))
        return self.decode([self.lead, *ids]).removeprefix(self.lead_text)


def decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[int]], str]:
    """What gives the text of token ids exactly as the tokenizer has it."""
    return partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def to_json(tokenizer: PreTrainedTokenizerBase, text: TokenText) -> dict[str, Any]:
    """What `from_json` makes the same ``TokenText`` of, on a host without the tokenizer.

    Raises:
        ValueError: the tokenizer decodes by code of its class, which no file describes.
    """
    kind = type(tokenizer)
    if not (
        isinstance(tokenizer, PreTrainedTokenizerFast)
        and kind.decode is PreTrainedTokenizerFast.decode
        and kind._decode is PreTrainedTokenizerFast._decode
    ):
        raise ValueError(
            f"{kind.__name__} turns tokens into text by code that workers of other hosts cannot be "
            "sent, so they could not look for rollout.stop: leave it out, or end responses with a "
            "token"
        )
    return {"tokenizer": tokenizer.backend_tokenizer.to_str(), "lead": text.lead}


def from_json(given: dict[str, Any]) -> TokenText:
    """Raises ValueError if it is not what `to_json` gave."""
    try:
        core = Tokenizer.from_str(given["tokenizer"])
        return TokenText(partial(core.decode, skip_special_tokens=False), given["lead"])
    except Exception as error:  # tokenizers raises a bare Exception.
        raise ValueError(f"the run's tokenizer cannot be read: {error}") from error
