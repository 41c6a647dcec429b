"""The token ids of prompts: of a few at the start, of many when they are drawn."""

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np

from kimi_core.models.codec import Codec
from kimi_core.prompts.many import ManyPrompts
from kimi_core.types import Prompt

BATCH = 1000
"""Prompts that are tokenized in one call."""

KEPT = 10_000
"""Prompts whose tokens are kept, out of many."""


class PromptTokens:
    """Gives the token ids of a prompt, int32 ``[n]``, when it is called with it.

    Prompts in a list are tokenized here, and kept. Of ``ManyPrompts``, those are tokenized here
    that might have too many tokens, as far as their bytes tell, or might not be tokenized at all
    (``Codec.most_tokens``). The others certainly fit.

    Args:
        prompts: all prompts of the run; at least one.
        context: tokens that the model can read; None: any number.
        response: tokens that a response may have.

    Raises:
        ValueError: a prompt cannot be tokenized.
    """

    def __init__(
        self, codec: Codec, prompts: Sequence[Prompt], *, context: int | None, response: int
    ) -> None:
        self._codec, self._context, self._response = codec, context, response
        self._at_start: dict[int, np.ndarray] = {}
        self._drawn: dict[int, np.ndarray] = {}
        self.longest: int
        """Tokens of the longest prompt, or of many prompts a number that none exceeds."""
        if isinstance(prompts, ManyPrompts):
            self._longest_id, self.longest = self._longest_of_many(prompts)
        else:
            self.keep(prompts)
            self._longest_id = max(self._at_start, key=lambda key: len(self._at_start[key]))
            self.longest = len(self._at_start[self._longest_id])

    def __call__(self, prompt: Prompt) -> np.ndarray:
        found = self._at_start.get(prompt.id)
        if found is None:
            found = self._drawn.get(prompt.id)
        if found is None:
            found = self._codec.encode_prompt(prompt)
            self._check(prompt.id, len(found))
            if len(self._drawn) == KEPT:
                del self._drawn[next(iter(self._drawn))]
            self._drawn[prompt.id] = found
        return found

    def keep(self, prompts: Sequence[Prompt]) -> None:
        """Tokenize prompts now that were not yet, and keep their tokens.

        Raises:
            ValueError: a prompt cannot be tokenized.
        """
        new = (prompt for prompt in prompts if prompt.id not in self._at_start)
        for some in _batches(new):
            ids = (prompt.id for prompt in some)
            self._at_start |= zip(ids, self._codec.encode_prompts(some), strict=True)

    def check(self) -> None:
        """Check that every prompt fits into the context together with the longest response.

        Raises:
            ValueError: one does not.
        """
        self._check(self._longest_id, self.longest)

    def _check(self, prompt_id: int, tokens: int) -> None:
        needed = tokens + self._response
        if self._context is not None and needed > self._context:
            raise ValueError(
                f"Prompt {prompt_id} has {tokens} tokens; with rollout.max_response_tokens = "
                f"{self._response} that is {needed}, and the model's context is {self._context}: "
                "shorten the prompt or lower the limit"
            )

    def _longest_of_many(self, prompts: ManyPrompts) -> tuple[int, int]:
        """Id and tokens of the longest prompt; a bound where it is bounded."""
        most = self._codec.most_tokens(prompts.facts.sizes)
        if self._context is not None:
            most[most > self._context - self._response] = -1
        longest_id, longest = int(prompts.facts.ids[most.argmax()]), int(most.max())
        for some in _batches(iter(prompts.take(np.flatnonzero(most < 0)))):
            for prompt, ids in zip(some, self._codec.encode_prompts(some), strict=True):
                if len(ids) > longest:
                    longest_id, longest = prompt.id, len(ids)
        return longest_id, longest


def _batches(prompts: Iterator[Prompt]) -> Iterator[list[Prompt]]:
    while some := list(islice(prompts, BATCH)):
        yield some
