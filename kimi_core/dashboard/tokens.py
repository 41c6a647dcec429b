"""The text of each token, by the ``tokenizer.json`` of a run."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from kimi_core.types import IMAGE_MARK


def token_texts(tokenizer: Path, token_ids: Sequence[int]) -> list[str] | None:
    """The text that each token adds to the text before it; None without a readable tokenizer.

    A character that several tokens write together stands with the last of them; the others have "".
    An image, a run of one negative id, has U+FFFC at the first and "" at the others.
    """
    try:
        core = _load(tokenizer, tokenizer.stat().st_mtime_ns)
    except (OSError, ValueError):
        return None
    stream = DecodeStream(skip_special_tokens=False)
    texts = []
    for before, token in zip([0, *token_ids], token_ids, strict=False):
        if token < 0:
            texts.append("" if token == before else IMAGE_MARK)
        else:
            texts.append(stream.step(core, token) or "")
    return texts


@lru_cache(maxsize=4)
def _load(path: Path, _changed_ns: int) -> Tokenizer:
    text = path.read_text()
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # The library raises a bare Exception for what is no tokenizer.
        raise ValueError(f"{path} holds no tokenizer: {error}") from error
