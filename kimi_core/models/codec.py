"""From text to tokens and back, and the tokens that end a response."""

from collections.abc import Iterable

import numpy as np
from transformers import PreTrainedTokenizerBase

from kimi_core.types import Prompt


class Codec:
    """A tokenizer, with the tokens that end a response.

    Args:
        tokenizer: the model's tokenizer.
        stop: strings that end a response, in addition to the end-of-text token.

    Raises:
        ValueError: a stop string is not one token, or no token ends a response.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Iterable[str]) -> None:
        self._tokenizer = tokenizer
        ends = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
        for text in stop:
            ids = tokenizer.encode(text, add_special_tokens=False)
            if len(ids) != 1:
                raise ValueError(
                    f"rollout.stop: {text!r} is {len(ids)} tokens in this vocabulary; a stop "
                    "string must be exactly one"
                )
            ends.add(ids[0])
        if not ends:
            raise ValueError("The tokenizer has no end-of-text token: name one in rollout.stop")
        self.stop_token_ids = frozenset(ends)

    def encode_prompt(self, prompt: Prompt) -> np.ndarray:
        """Token ids of a prompt, int32 ``[n]``, with the special tokens that the model expects.

        Raises:
            ValueError: the prompt has no tokens, or has characters that the model does not know.
        """
        return self._encode(prompt.text, f"Prompt {prompt.id}", add_special_tokens=True)

    def encode_example(self, prompt: str, response: str) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of an SFT pair, int32 ``[n]`` and ``[m]``; the response ends with end-of-text.

        Raises:
            ValueError: as ``encode_prompt``, or there is no end-of-text token.
        """
        end = self._tokenizer.eos_token_id
        if end is None:
            raise ValueError("SFT needs a tokenizer with an end-of-text token")
        response_ids = self._encode(response, "An SFT response", add_special_tokens=False)
        return (
            self._encode(prompt, "An SFT prompt", add_special_tokens=True),
            np.append(response_ids, np.int32(end)),
        )

    def response_text(self, token_ids: np.ndarray) -> str:
        """The text of a response from its token ids, int32 ``[n]``, without its stop token."""
        if len(token_ids) and int(token_ids[-1]) in self.stop_token_ids:
            token_ids = token_ids[:-1]
        return str(self._tokenizer.decode(token_ids.tolist(), skip_special_tokens=False))

    def _encode(self, text: str, what: str, *, add_special_tokens: bool) -> np.ndarray:
        try:
            ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except Exception as error:  # tokenizers raises a bare Exception for an unknown character.
            raise ValueError(f"{what} ({text!r:.80}) cannot be tokenized: {error}") from error
        if not ids:
            raise ValueError(f"{what} ({text!r:.80}) has no tokens; it needs at least one")
        return np.array(ids, np.int32)
