"""From text to tokens and back, and what ends a response.

A tokenizer treats the start of a text in its own way: it may add a space there, or drop one. A
response never stands at the start, because a prompt comes before it. Therefore the codec reads and
writes responses behind other tokens, and takes these away afterwards.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kimi_core.models import chat, token_text
from kimi_core.models.token_bound import token_bound
from kimi_core.models.vision import Images
from kimi_core.rollout.stop import BROKEN, cut
from kimi_core.types import IMAGE_MARK, Image, Message, Prompt, StopStrings

LEADS = ("a", "0", "=", ".", "\n", " ", "A", "(", '"')
"""Texts to put before a response. One must not merge with the response's first character, so they
differ in kind."""

BATCH = 1024
"""Examples that are tokenized at once."""

IMAGE_TOKENS = ("image_token_id", "video_token_id")
"""Tokens of a config that stand for images; sampled, they end a response."""


class Codec:
    """A tokenizer, with what ends a response.

    Args:
        tokenizer: the model's tokenizer.
        stop: strings that end a response, in addition to the end tokens.
        model: the end tokens of its config and its generation config count as well.
        images: the run's images; None: the model reads text only.

    Raises:
        ValueError: a stop string is empty, or nothing ends a response.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Iterable[str] = (),
        model: PreTrainedModel | None = None,
        images: Images | None = None,
    ) -> None:
        strings = list(stop)
        if "" in strings:
            raise ValueError(f"rollout.stop = {strings}: each string needs at least one character")
        self._tokenizer = tokenizer
        self._images = images
        self._encoded: dict[str, list[int]] = {}
        """Token ids of texts that were tokenized together, while they are needed."""
        self._decode = token_text.decoder(tokenizer)
        self._lead = self._find_lead()
        self._text = token_text.TokenText(self._decode, self._lead)
        self._prefix = self._find_prefix()
        self._gap = self._find_gap()
        self._turn_end = chat.turn_end(tokenizer)
        ends = _ids(tokenizer.eos_token_id)
        if model is not None:
            configs = (model.generation_config, model.config, model.config.get_text_config())
            ends += [
                end for config in configs for end in _ids(getattr(config, "eos_token_id", None))
            ]
            # A response goes on in tokens alone, so a sampled image token cannot become an image.
            ends += [t for name in IMAGE_TOKENS if (t := getattr(model.config, name, None))]
        if self._turn_end is not None:
            ends.append(self._turn_end)
        if not ends and not strings:
            raise ValueError("The tokenizer has no end-of-text token: name one in rollout.stop")
        self._ends = ends
        self.stop_strings = StopStrings(tuple(strings), self._text) if strings else None
        """None: there are none."""
        self.stop_token_ids = frozenset([*ends, *self._single_tokens(strings)])
        """Tokens that end a response whatever comes before them."""

    def encode_prompt(self, prompt: Prompt) -> np.ndarray:
        """Token ids of a prompt, int32 ``[n]``, with the special tokens that the model expects.

        ``messages`` are rendered by the tokenizer's chat template, which writes the special tokens
        itself. Text gets them here, unless it begins with them already; there are never two BOS,
        and no EOS behind a prompt. An image is a run of negative ids (``types.Image``).

        Raises:
            ValueError: the prompt has no tokens, or has characters that the model does not know, or
                there is no chat template for its messages, or its images have no places.
        """
        return self._encode_prompt(
            prompt.messages or prompt.text, f"Prompt {prompt.id}", prompt.images
        )

    def encode_prompts(self, prompts: Sequence[Prompt]) -> list[np.ndarray]:
        """As `encode_prompt` for each, in a quarter of the time."""
        if any(prompt.images for prompt in prompts):
            return [self.encode_prompt(prompt) for prompt in prompts]
        texts = [self._text_of(p.messages or p.text, f"Prompt {p.id}") for p in prompts]
        try:
            found = self._encode_batch(texts)
        except Exception as error:  # As in _encode.
            for prompt in prompts:
                self.encode_prompt(prompt)  # Names the prompt at fault.
            raise ValueError(f"{len(prompts)} prompts cannot be tokenized: {error}") from error
        return [
            self._completed(list(ids), is_text=not p.messages) if ids else self.encode_prompt(p)
            for p, ids in zip(prompts, found, strict=True)
        ]

    def most_tokens(self, sizes: np.ndarray) -> np.ndarray:
        """The most tokens that `encode_prompt` gives for text of ``sizes`` bytes in UTF-8, int64
        ``[n]``; -1 where the tokenizer must say. It must for sizes below 1.

        The text holds another character than ASCII control characters.
        """
        bound = token_bound(self._tokenizer)
        if bound is None:
            return np.full(len(sizes), -1)
        most = bound.factor * sizes + bound.extra + len(self._prefix)
        return np.where(sizes > 0, most, -1)

    def encode_example(
        self, prompt: str | Sequence[Message] | Prompt, response: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of an SFT pair, int32 ``[n]`` and ``[m]``; the response ends with an end token.

        The prompt's ids are those of `encode_prompt`. The response's are the ones that the model
        would have to sample behind it.

        Raises:
            ValueError: as ``encode_prompt``, or there is no end token.
        """
        if not self._ends:
            raise ValueError("SFT needs a tokenizer with an end-of-text token")
        images: tuple[Image, ...] = ()
        if isinstance(prompt, Prompt):
            images, prompt = prompt.images, prompt.messages or prompt.text
        prompt_ids = self._encode_prompt(prompt, "An SFT prompt", images)
        if isinstance(prompt, str):
            before, end = prompt, self._ends[0]
        else:
            response = chat.model_turn(self._tokenizer, prompt, response, self._turn_end)
            before = chat.render(self._tokenizer, prompt)
            end = self._ends[0] if self._turn_end is None else self._turn_end
        response_ids = self.encode_behind(before, response, "An SFT response")
        return prompt_ids, np.append(response_ids, np.int32(end))

    def encode_examples(
        self, examples: Sequence[tuple[str | Sequence[Message] | Prompt, str]]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """As `encode_example` for each, in a fraction of the time if the prompts are text."""
        found = []
        for at in range(0, len(examples), BATCH):
            some = examples[at : at + BATCH]
            texts = {
                text
                for prompt, response in some
                if isinstance(prompt, str)
                for text in (prompt, response, prompt + response)
            }
            with suppress(Exception):  # As in _encode, which names the text at fault below.
                self._encoded = dict(zip(texts, self._encode_batch([*texts]), strict=True))
            found += [self.encode_example(*example) for example in some]
            self._encoded = {}
        return found

    def encode_behind(self, before: str, text: str, what: str = "The text") -> np.ndarray:
        """Token ids of ``text``, int32 ``[n]``, as it stands behind the text ``before``.

        No token reaches over the border. The ids decode to exactly ``text`` if the tokenizer can
        write it at all; otherwise, if possible, no space comes or goes at its start.

        Raises:
            ValueError: the text has no tokens, or has characters that the model does not know;
                ``what`` names it.
        """
        plain = self._encode(text, what)
        alike = []
        for ids in self._encodings_behind(before, text, plain):
            written = self.response_text(ids, whole=True)
            if written == text:
                return np.array(ids, np.int32)
            if written[:1] == text[:1]:
                alike.append(ids)
        return np.array(alike[0] if alike else plain, np.int32)

    def response_text(self, token_ids: np.ndarray | Sequence[int], *, whole: bool = False) -> str:
        """The text of a response from its token ids, int32 ``[n]``, as it stands behind a prompt.

        The text ends before the end token, and before the first stop string; ``whole`` leaves both
        in.
        """
        ids = [int(token) for token in token_ids]
        if not whole and ids and ids[-1] in self._ends:
            ids = ids[:-1]
        text = self._text(ids)
        if not whole and self.stop_strings is not None:
            text = cut(self.stop_strings, text)
        return text.removeprefix(self._gap)

    def text_as_json(self) -> dict[str, Any]:
        """How tokens become text, for stop strings on other hosts (`token_text.from_json`).

        Raises: as `token_text.to_json`.
        """
        return token_text.to_json(self._tokenizer, self._text)

    def _encode_prompt(
        self, prompt: str | Sequence[Message], what: str, images: Sequence[Image] = ()
    ) -> np.ndarray:
        text = self._text_of(prompt, what)
        ids = self._with_images(text, images, what) if images else self._encode(text, what)
        return self._completed(ids, is_text=isinstance(prompt, str))

    def _with_images(self, text: str, images: Sequence[Image], what: str) -> list[int]:
        """Token ids of a text with its images at their marks, or in front of it."""
        if self._images is None:
            raise ValueError(
                f"{what} has images, and the model reads text only: take a model with a vision "
                "tower, or set model.scratch.vision_layers"
            )
        pieces = text.split(IMAGE_MARK) if IMAGE_MARK in text else [*[""] * len(images), text]
        if len(pieces) != len(images) + 1:
            raise ValueError(
                f"{what} has {len(images)} images and {len(pieces) - 1} marks for them (U+FFFC); "
                "give one mark for each image, or none to put all before the text"
            )
        ids = self._encode(pieces[0], what) if pieces[0] else []
        for image, piece in zip(images, pieces[1:], strict=True):
            ids += self._images.ids(image)
            if piece:
                ids += self.encode_behind(IMAGE_MARK, piece, what).tolist()
        return ids

    def _text_of(self, prompt: str | Sequence[Message], what: str) -> str:
        """A prompt as the tokenizer takes it."""
        if isinstance(prompt, str):
            return prompt
        try:
            return chat.render(self._tokenizer, prompt)
        except ValueError as error:
            raise ValueError(f"{what} is a conversation, and {error}") from error

    def _completed(self, ids: list[int], *, is_text: bool) -> np.ndarray:
        """A prompt's ids with the special tokens that the model expects."""
        if is_text and ids[: len(self._prefix)] != self._prefix:
            ids = self._prefix + ids
        bos = self._tokenizer.bos_token_id
        while len(ids) > 1 and ids[0] == ids[1] == bos:
            ids = ids[1:]
        return np.array(ids, np.int32)

    def _encode(self, text: str, what: str) -> list[int]:
        """Token ids without the special tokens that the tokenizer adds."""
        try:
            ids = self._encoded.get(text) or self._tokenizer.encode(text, add_special_tokens=False)
        except Exception as error:  # tokenizers raises a bare Exception for an unknown character.
            raise ValueError(
                f"{what} ({text!r:.80}) cannot be tokenized: {self._unknown(text) or error}"
            ) from error
        if not ids:
            raise ValueError(f"{what} ({text!r:.80}) has no tokens; it needs at least one")
        return list(ids)

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        """As ``_encode`` for each; no ids for a text that has no tokens."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            return self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        # transformers makes an object of each encoding, which takes longer than tokenizing.
        return [one.ids for one in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _unknown(self, text: str) -> str:
        """What a tokenizer of characters does not know in ``text``; "" for another tokenizer."""
        known = self._tokenizer.get_vocab()
        is_of_characters = sum(len(token) == 1 for token in known) == len(known) - 2
        unknown = sorted(set(text) - known.keys()) if is_of_characters else []
        if not unknown:
            return ""
        return (
            f"the model does not know {', '.join(map(repr, unknown[:10]))}; one from scratch knows "
            "the characters of its run's prompts, answers and SFT examples"
        )

    def _try(self, text: str) -> list[int]:
        """As ``_encode``; empty if the text cannot be tokenized."""
        try:
            return self._encode(text, "")
        except ValueError:
            return []

    def _encodings_behind(self, before: str, text: str, plain: list[int]) -> Iterator[list[int]]:
        """Ways to write ``text`` in tokens behind other text, the most natural one first."""
        for lead in (before, None, *LEADS):
            if lead is None:
                yield plain
            elif (head := self._try(lead)) and (both := self._try(lead + text))[
                : len(head)
            ] == head:
                yield both[len(head) :]

    def _find_lead(self) -> int | None:
        """A token whose own text stays the same whatever follows; None: there is none."""
        for text in LEADS:
            for token in self._try(text)[-1:]:
                alone, twice = self._decode([token]), self._decode([token, token])
                if alone and BROKEN not in alone and twice.startswith(alone) and twice != alone:
                    return token
        return None

    def _find_prefix(self) -> list[int]:
        """The special tokens that the tokenizer puts before a text."""
        for text in (self._text.lead_text, *LEADS):
            plain = self._try(text) if text else []
            if plain:
                full = self._tokenizer.encode(text)
                starts = range(len(full) - len(plain) + 1)
                found = (at for at in starts if full[at : at + len(plain)] == plain)
                return list(full[: next(found, 0)])
        return []

    def _find_gap(self) -> str:
        """The space that the tokenizer writes between any two words, or "".

        Where it writes one, no token says whether a response begins with a space.
        """
        if self._lead is None:
            return ""
        lead = self._text.lead_text
        bare = self._tokenizer.convert_ids_to_tokens(self._lead) == lead
        spaced = self._text([self._lead]) == f" {lead}"
        return " " if bare and spaced else ""

    def _single_tokens(self, strings: Sequence[str]) -> list[int]:
        """Tokens that are a whole stop string, so that an engine can stop there by itself."""
        singles = [(string, ids) for string in strings if len(ids := self._try(string)) == 1]
        return [ids[0] for string, ids in singles if string in self._text(ids)]


def _ids(value: int | Sequence[int] | None) -> list[int]:
    """What a config says of its end tokens, as a list."""
    if value is None:
        return []
    return [value] if isinstance(value, int) else [int(one) for one in value]
