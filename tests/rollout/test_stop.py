"""Stop strings over every kind of tokenizer, in the embedded engine's rows and vLLM's responses."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import KINDS, LETTERS, characters, tokenizer_of

from kimi_core.models.codec import Codec
from kimi_core.rollout.torch.rows import Rows
from kimi_core.rollout.vllm.response import Response
from kimi_core.types import Request, Sampling, Segment

NAMES = [*KINDS, "characters"]
TEXT = "".join(LETTERS)
PROMPT = [0, 0, 0]


def codec_of(kind: str, stop: list[str]) -> Codec:
    return Codec(characters() if kind == "characters" else tokenizer_of(kind), stop)


def sampling_of(codec: Codec, **settings) -> Sampling:
    return Sampling(1.0, 0, codec.stop_token_ids, stop_strings=codec.stop_strings, **settings)


def by_rows(request: Request, sampling: Sampling, tokens: list[int]) -> list[Segment]:
    rows, segments = Rows(1, request.steps, sampling), []
    rows.add([request])
    for at, token in enumerate(tokens):
        ended = rows.append(0, np.array([token]), np.array([-at / 8], np.float32))
        if ended[0] or rows.due()[0]:
            segments.append(rows.segment(0, 7, ended=bool(ended[0])))
        if ended[0]:
            break
    return segments


def by_response(request: Request, sampling: Sampling, tokens: list[int], chunk: int):
    response, segments = Response(request, sampling), []
    for start in range(0, len(tokens), chunk):
        new = tokens[start : start + chunk]
        response.add(new, [-(start + at) / 8 for at in range(len(new))])
        segments += response.ready(7)
        if response.ended:
            break
    return segments


def request_of(earlier: list[int], tokens: list[int]) -> Request:
    ids = np.array([*PROMPT, *earlier], np.int32)
    return Request(0, ids, len(PROMPT), len(tokens), 10_000)


def contents(segments: list[Segment]):
    return [(s.token_ids.tolist(), s.logprobs.tolist(), s.end_reason) for s in segments]


@pytest.mark.parametrize("kind", NAMES)
@settings(max_examples=60)
@given(data=st.data())
def test_a_stop_string_ends_the_response_whatever_its_tokens(kind, data):
    """The first prefix of the tokens whose text has a stop string is the response, in both engines,
    in any chunks, and wherever an iteration before it was cut."""
    text = data.draw(st.text(TEXT, min_size=1, max_size=24))
    start = data.draw(st.integers(0, len(text) - 1))
    stops = [text[start : start + data.draw(st.integers(1, 4))]]
    stops += data.draw(st.lists(st.text(TEXT, min_size=1, max_size=3), max_size=2))
    codec = codec_of(kind, stops)
    try:
        tokens = codec.encode_behind("", text).tolist()
    except ValueError:  # WordPiece has no token for spaces.
        return
    assert codec.stop_strings is not None
    seen = [codec.stop_strings.text(tokens[:n]) for n in range(1, len(tokens) + 1)]
    ends = [n for n, one in enumerate(seen, 1) if any(stop in one for stop in stops)]
    length = ends[0] if ends else len(tokens)
    earlier = data.draw(st.integers(0, length - 1))
    request = request_of(tokens[:earlier], tokens[earlier:])
    sampling = sampling_of(codec, stream_tokens=data.draw(st.integers(0, 5)))
    rows = by_rows(request, sampling, tokens[earlier:])
    chunks = by_response(request, sampling, tokens[earlier:], data.draw(st.integers(1, 9)))
    assert contents(chunks) == contents(rows)
    new = [token for segment in rows for token in segment.token_ids.tolist()]
    logprobs = [value for segment in rows for value in segment.logprobs.tolist()]
    assert tokens[:earlier] + new == tokens[:length]
    assert logprobs == [-at / 8 for at in range(len(new))]
    assert rows[-1].end_reason == ("stop" if ends else None)
    written = codec.response_text(tokens[:length])
    assert not any(stop in written for stop in stops)
    whole = codec.response_text(tokens[:length], whole=True)
    assert whole.startswith(written)
    if ends:
        assert any(whole[len(written) :].startswith(stop) for stop in stops) or kind == "WordPiece"


@pytest.mark.parametrize("kind", NAMES)
def test_a_stop_string_may_be_part_of_a_token(kind):
    """``$`` ends `` $`` and ``$$``; ``\\n`` ends ``\\n\\n``; and the text before it stays."""
    for stop, text, kept in [("$", "5 $", "5 "), ("\n", "5\n\n", "5"), ("is 4", "a is 42", "a ")]:
        if kind == "WordPiece" and stop == "\n":
            continue
        codec = codec_of(kind, [stop])
        tokens = codec.encode_behind("", text).tolist()
        segments = by_rows(request_of([], tokens), sampling_of(codec), tokens)
        assert segments[-1].end_reason == "stop"
        written = codec.response_text(segments[-1].token_ids)
        assert written == kept if kind != "WordPiece" else written.strip() == kept.strip()


@pytest.mark.parametrize("kind", NAMES)
def test_a_stop_string_that_the_model_cannot_write_never_occurs(kind):
    codec = codec_of(kind, ["ж€"])
    tokens = codec.encode_behind("", "a is 42").tolist()
    assert by_rows(request_of([], tokens), sampling_of(codec), tokens)[-1].end_reason is None
    assert codec.response_text(tokens) == "a is 42"


def test_a_character_cut_over_tokens_is_found_between_others_of_its_kind():
    """Llama 2 writes these as bytes; the part that is looked at may begin inside a character."""
    codec = codec_of("SentencePiece, Llama 2", ["🙂"])
    for before in range(12):
        tokens = codec.encode_behind("", "漢" * before + "字🙂字").tolist()
        segments = by_rows(request_of([], tokens), sampling_of(codec), tokens)
        assert len(segments[-1]) == len(tokens) - 3 and segments[-1].end_reason == "stop"
        assert codec.response_text(segments[-1].token_ids) == "漢" * before + "字"


def test_the_prompt_is_not_searched():
    codec = codec_of("characters", ["#"])
    (hash_sign,) = codec.encode_behind("", "#").tolist()
    tokens = codec.encode_behind("", "42").tolist()
    request = Request(0, np.array([hash_sign] * 3, np.int32), 3, 2, 10)
    for segments in (
        by_rows(request, sampling_of(codec), tokens),
        by_response(request, sampling_of(codec), tokens, 5),
    ):
        assert segments[-1].end_reason is None and len(segments[-1]) == 2
