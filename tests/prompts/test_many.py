"""More prompts than memory should hold: they are as a list of them would be."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_kinds import CHATML, characters, tokenizer_of

from kimi_core.config import PromptsConfig
from kimi_core.models.codec import Codec
from kimi_core.prompts import file, load
from kimi_core.prompts.file import PromptFile
from kimi_core.prompts.jsonl import plain_records, read_prompts
from kimi_core.prompts.load import load_prompts, split
from kimi_core.prompts.many import ById, ManyPrompts, facts_of, gather
from kimi_core.prompts.messages import chat_prompts
from kimi_core.prompts.overlap import overlaps
from kimi_core.prompts.tokens import PromptTokens
from kimi_core.types import Prompt

strings = st.text(min_size=1, max_size=12)
plain = st.fixed_dictionaries(
    {"prompt": strings, "answer": strings},
    optional={
        "difficulty": st.none() | st.integers(0, 1) | st.floats(0, 1),
        "problem": strings | st.integers(),
        "source": strings,
    },
)
talks = st.fixed_dictionaries(
    {"messages": st.just([{"role": "user", "content": "hi"}]), "answer": strings}
)
bad = st.sampled_from(
    [
        '{"prompt": "p", "answer": ""}',
        '{"prompt": "p", "answer": "a", "difficulty": NaN}',
        '{"prompt": "p", "answer": "a", "difficulty": true}',
        '{"prompt": "p", "answer": "a"}, {"prompt": "q", "answer": [{}',
        '{"prompt": "p"}]}',
        "null",
        "",
    ]
)
lines = st.lists(st.one_of(plain, plain, talks, bad), min_size=1, max_size=9)


@pytest.fixture
def many_from(monkeypatch):
    """Lets sets be many from 5 prompts on, and blocks have 3 lines."""
    monkeypatch.setattr(load, "MANY", 4)
    monkeypatch.setattr(file, "BLOCK", 3)


@pytest.fixture
def made(many_from, tmp_path):
    def write(records) -> PromptsConfig:
        path = tmp_path / "p.jsonl"
        path.write_text("".join(json.dumps(one) + "\n" for one in records))
        return PromptsConfig(source=str(path))

    return write


def records(count: int) -> list[dict]:
    return [{"prompt": f"{i} + {i} =", "answer": f"{2 * i}"} for i in range(count)]


def outcome(function):
    """What a function returns, or the message of the error that it raises."""
    try:
        return function()
    except ValueError as error:
        return str(error)


@given(lines, st.sampled_from(["\n", "\r\n", "\n \n"]), st.booleans())
def test_a_file_holds_the_prompts_and_errors_that_reading_it_whole_gives(
    tmp_path_factory, given_lines, end, chat
):
    path = tmp_path_factory.mktemp("lines") / "p.jsonl"
    texts = [one if isinstance(one, str) else json.dumps(one) for one in given_lines]
    path.write_bytes(end.join(texts).encode())
    config = PromptsConfig(chat=chat)
    whole = outcome(lambda: chat_prompts(read_prompts(path), config))
    lazy = outcome(lambda: PromptFile(path, config))
    if isinstance(whole, str):
        assert lazy == whole
        return
    rows = np.arange(len(whole))
    assert list(lazy.prompts(rows)) == whole
    assert list(lazy.texts(rows[::2])) == [prompt.text for prompt in whole[::2]]
    for name, value in vars(gather(whole)).items():
        np.testing.assert_array_equal(getattr(lazy.facts, name), value)


def test_no_line_reaches_into_the_next():
    assert plain_records([b'{"a": 1}, {"prompt": [{}', b'{"prompt": "p"}]}']) is None


def test_a_split_is_the_one_of_a_list(made):
    config = made(records(40))
    prompts = load_prompts(config)
    assert isinstance(prompts, ManyPrompts)
    train, held_out = split(prompts, 7, 3)
    assert (list(train), held_out) == split(read_prompts(config.source), 7, 3)
    assert train[2:5] == list(train)[2:5]
    assert train[-1] == list(train)[-1]
    found = ById(train)
    assert [found[prompt.id] for prompt in train] == list(train)
    with pytest.raises(KeyError):
        found[held_out[0].id]


def test_a_list_of_many_is_kept_and_its_facts_are_gathered_once(many_from):
    prompts = load_prompts(PromptsConfig())
    assert isinstance(prompts, ManyPrompts)
    assert facts_of(prompts) is facts_of(prompts)
    train, _ = split(prompts, 500, 0)
    assert facts_of(train).ids.tolist() == [prompt.id for prompt in train]


def test_a_file_that_changes_during_a_run_is_an_error(made):
    config = made(records(9))
    prompts = load_prompts(config)
    made([one | {"answer": "7"} if one["answer"] == "6" else one for one in records(9)])
    with pytest.raises(ValueError, match=r"p\.jsonl has changed since .* prompt 3 is another"):
        prompts[3]
    assert prompts[4] == Prompt(4, "4 + 4 =", "8")


def test_overlaps_are_those_of_a_list(made):
    config = made([*records(30), *records(10)[::2]])
    prompts = load_prompts(config)
    held_out = [Prompt(0, "3 + 3 =", "6"), Prompt(1, "4 + 4 ", "8")]
    assert overlaps(prompts, held_out, []) == overlaps(list(prompts), held_out, [])
    assert overlaps(prompts, held_out, []) == ["1 of 2 held-out prompts are also training prompts"]


class TestTokens:
    BYTES = Codec(tokenizer_of("byte-level BPE", "bos", CHATML))

    def counted(self, monkeypatch) -> list[int]:
        """The ids of the prompts that were tokenized one by one."""
        seen: list[int] = []
        encode = self.BYTES.encode_prompt
        monkeypatch.setattr(
            self.BYTES, "encode_prompt", lambda p: seen.append(p.id) or encode(p), raising=False
        )
        return seen

    def test_bounded_prompts_are_tokenized_when_they_are_drawn_and_kept_for_a_while(
        self, made, monkeypatch
    ):
        monkeypatch.setattr("kimi_core.prompts.tokens.KEPT", 2)
        prompts = load_prompts(made(records(9)))
        seen = self.counted(monkeypatch)
        tokens = PromptTokens(self.BYTES, prompts, context=96, response=30)
        assert not seen
        assert tokens.longest == len("8 + 8 =") + 1
        tokens.keep([prompts[8]])
        for row in (8, 0, 0, 1, 0, 2, 0):
            ids = Codec.encode_prompt(self.BYTES, prompts[row]).tolist()
            assert tokens(prompts[row]).tolist() == ids
        assert seen == [0, 1, 2, 0]  # Prompt 8 was tokenized in a batch.

    def test_what_may_not_fit_is_tokenized_first_and_named_if_it_does_not(self, made):
        long = [{"prompt": "the answer is " * 6, "answer": "42"}]
        prompts = load_prompts(made([*records(5), *long]))
        count = len(self.BYTES.encode_prompt(prompts[5]))
        assert count < 60 < len(prompts[5].text)
        fits = PromptTokens(self.BYTES, prompts, context=count + 30, response=30)
        fits.check()
        assert fits.longest == count
        too_long = PromptTokens(self.BYTES, prompts, context=count + 29, response=30)
        with pytest.raises(ValueError, match=rf"Prompt 5 has {count} tokens"):
            too_long.check()

    @pytest.mark.parametrize("codec", [BYTES, Codec(characters())], ids=["chat", "characters"])
    def test_without_a_bound_all_are_tokenized_first(self, made, codec):
        config = made(records(9)).model_copy(update={"chat": codec is self.BYTES})
        prompts = load_prompts(config)
        tokens = PromptTokens(codec, prompts, context=None, response=30)
        assert tokens.longest == max(len(codec.encode_prompt(prompt)) for prompt in prompts)

    def test_unknown_characters_are_refused_before_the_run(self, made):
        prompts = load_prompts(made([*records(9), {"prompt": "Ω", "answer": "1"}]))
        with pytest.raises(ValueError, match=r"Prompt 9 .* cannot be tokenized"):
            PromptTokens(Codec(characters()), prompts, context=None, response=30)

    def test_half_a_surrogate_pair_is_refused_before_the_run(self, made):
        prompts = load_prompts(made([*records(9), {"prompt": "\ud800", "answer": "1"}]))
        with pytest.raises(ValueError, match=r"Prompt 9 .* cannot be tokenized"):
            PromptTokens(self.BYTES, prompts, context=None, response=30)
