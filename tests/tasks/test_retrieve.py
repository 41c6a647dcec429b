"""The retrieval task: every step of a worked answer stands in the text, and lengths are as told."""

import random
import re
from collections import Counter

import pytest

from kimi_core.prompts.load import load_prompts, split
from kimi_core.reward.load import match
from kimi_core.run.build import alphabet, sft_examples
from kimi_core.run.config_file import load_config
from kimi_core.tasks import retrieve

RECORD = re.compile(r"([^\d.,=])(\d)")


@pytest.mark.parametrize(("numbers", "length"), [(1, 4), (16, 4000), (70, 142), (3000, 20_000)])
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
        assert prompt.text[-2:] == retrieve.names(numbers)[-1] + "="
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
    places = [m.start() for prompt in prompts for m in RECORD.finditer(prompt.text[:-2])]
    assert len(places) == 3200
    assert abs(sum(places) / 3200 - 2000) < 4 * 4000 / (12 * 3200) ** 0.5
    assert min(places) < 50 and max(places) > 3950


def test_names_are_distinct_and_as_many_as_wanted():
    assert len(set(retrieve.names(20_000))) == 20_000
    for count in (0, 20_001):
        with pytest.raises(ValueError, match="allowed are 1 to 20000"):
            retrieve.names(count)


def test_a_text_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match=r"length = 33; 16 records .* need 34: raise it"):
        retrieve.prompts(1, 16, 33, seed=0)
    with pytest.raises(ValueError, match="length = 33"):
        retrieve.examples(1, 16, 33, retrieve.MIXED, seed=0)


def test_examples_are_mostly_short_and_sometimes_long():
    pairs = retrieve.examples(3000, 16, 4000, retrieve.MIXED, seed=0)
    assert pairs == retrieve.examples(3000, 16, 4000, retrieve.MIXED, seed=0)
    assert pairs != retrieve.examples(3000, 16, 4000, retrieve.MIXED, seed=1)
    lengths = [len(text) for text, _ in pairs]
    assert max(lengths) <= 4000 and max(lengths) > 3500
    assert sorted(lengths)[1500] < 100
    assert 60 < sum(length > 2000 for length in lengths) < 240
    records = Counter(len(RECORD.findall(text[:-2])) for text, _ in pairs)
    assert set(records) == set(range(1, 17)) and records[1] > 5 * records[16]
    for text, response in random.Random(0).sample(pairs, 200):
        assert response in {retrieve.response(text, style) for style in retrieve.MIXED}
    worked = sum(";" in response for _, response in pairs)
    assert abs(worked - 1500) < 4 * (3000 / 4) ** 0.5


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
    examples = sft_examples(config, train)
    assert len(examples) == 15
    known = set(alphabet(config))
    assert all(set(text + response) <= known for text, response in examples)
