"""The retrieval task: every step of a worked answer stands in the text, and lengths are as told."""

import random
import re

import pytest

from kimi_core.prompts.load import load_prompts, split
from kimi_core.reward.load import match
from kimi_core.run.config_file import load_config
from kimi_core.run.data import load_data, scratch_tokenizer
from kimi_core.tasks import retrieve

RECORD = re.compile(r"([^\d.,=])(\d)")


@pytest.mark.parametrize(("numbers", "length"), [(1, 5), (16, 4000), (70, 143), (3000, 20_000)])
def test_prompts_hold_their_records_and_the_sum(numbers, length):
    prompts = retrieve.prompts(4, numbers, length, seed=0)
    assert [prompt.id for prompt in prompts] == [0, 1, 2, 3]
    known = set(retrieve.alphabet(numbers))
    for prompt in prompts:
        assert len(prompt.text) == length
        found = dict(RECORD.findall(prompt.text))
        assert sorted(found) == sorted(retrieve.names(numbers))
        assert set(found.values()) <= set("0123")
        assert prompt.answer == str(sum(map(int, found.values())))
        assert prompt.text[-3:] == "a" + retrieve.names(numbers)[-1] + "="
        worked = retrieve.response(prompt.text, "worked")
        assert set(prompt.text + worked) <= known
        total = 0
        steps = worked.rpartition("#")[0].rstrip(";").split(";")
        for name, step in zip(retrieve.names(numbers), steps, strict=True):
            total += int(found[name])
            assert step == f"{name}{found[name]}>{total}"
        for style in retrieve.MIXED:
            assert match(prompt, retrieve.response(prompt.text, style)) == 1.0


def test_records_lie_all_over_the_text():
    """The mean place of a record, over 200 texts: within 4 standard errors of the middle."""
    prompts = retrieve.prompts(200, 16, 4000, seed=1)
    places = [m.start() for prompt in prompts for m in RECORD.finditer(prompt.text[:-3])]
    assert len(places) == 3200
    assert abs(sum(places) / 3200 - 2000) < 4 * 4000 / (12 * 3200) ** 0.5
    assert min(places) < 50 and max(places) > 3950


def test_names_are_distinct_and_as_many_as_wanted():
    assert len(set(retrieve.names(20_000))) == 20_000
    for count in (0, 20_001):
        with pytest.raises(ValueError, match="allowed are 1 to 20000"):
            retrieve.names(count)


def test_a_text_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match=r"length = 34; 16 records .* need 35: raise it"):
        retrieve.prompts(1, 16, 34, seed=0)
    with pytest.raises(ValueError, match="length = 34"):
        retrieve.examples(1, 16, 34, retrieve.MIXED, seed=0)


def test_examples_grow_from_short_to_long():
    pairs = retrieve.examples(3000, 16, 4000, retrieve.MIXED, seed=0)
    assert pairs == retrieve.examples(3000, 16, 4000, retrieve.MIXED, seed=0)
    assert pairs != retrieve.examples(3000, 16, 4000, retrieve.MIXED, seed=1)
    parts = pairs[:100], pairs[1500:1900], pairs[2700:]
    records = [[len(RECORD.findall(text[:-3])) for text, _ in part] for part in parts]
    assert [max(counts) for counts in records] == [6, 16, 16]
    assert all(min(counts) == 1 for counts in records)
    filler = [
        max(len(text) - 2 * count - 3 for (text, _), count in zip(part, counts, strict=True))
        for part, counts in zip(parts, records, strict=True)
    ]
    assert filler[0] == filler[1] == 11 and 3000 < filler[2] <= 4000 - 2 * 16 - 3
    worked = [sum(";" in response for _, response in part) for part in (pairs[:2700], parts[2])]
    assert worked[0] == 2700 and abs(worked[1] - 150) < 4 * (300 / 4) ** 0.5
    for text, response in random.Random(0).sample(pairs, 200):
        assert response in {retrieve.response(text, style) for style in retrieve.MIXED}


@pytest.mark.parametrize("numbers", [1, 4, 5])
def test_examples_of_few_records(numbers):
    pairs = retrieve.examples(300, numbers, 2 * numbers + 3, retrieve.MIXED, seed=0)
    assert max(len(RECORD.findall(text[:-3])) for text, _ in pairs) == numbers
    assert max(len(text) for text, _ in pairs) <= 2 * numbers + 3


def test_an_unknown_style_names_those_there_are():
    with pytest.raises(ValueError, match="No style 'loud': terse, worked"):
        retrieve.response("a1a=", "loud")


def test_a_config_names_it():
    config = load_config(
        None,
        [
            *("prompts.source=retrieve", "prompts.task.length=90", "prompts.task.count=40"),
            *("prompts.held_out=10", "sft.data=retrieve", "sft.steps=3", "sft.batch_size=5"),
        ],
    )
    prompts = load_prompts(config.prompts)
    assert len(prompts) == 40 and {len(prompt.text) for prompt in prompts} == {90}
    train, held_out = split(prompts, 10, 0)
    assert len(held_out) == 10
    data = load_data(config)
    assert (list(data.train), data.held_out) == (list(train), held_out)
    examples = data.examples
    assert len(examples) == 15
    known = set(scratch_tokenizer(config, data).get_vocab())
    assert all(set(text + response) <= known for text, response in examples)
