import re

import pytest

from kimi_core.prompts.load import load_prompts
from kimi_core.reward.code.literals import literal_cases
from kimi_core.reward.code.problem import problem_of
from kimi_core.reward.code.program import extract_program
from kimi_core.run.config_file import load_config
from kimi_core.run.data import load_data, scratch_tokenizer
from kimi_core.tasks import programs

PROMPTS = programs.prompts()


def function(prompt, style):
    space = {}
    exec(extract_program(problem_of(prompt), programs.response(prompt, style)), space)
    return space["f"]


def test_every_line_once_in_the_alphabet():
    assert len({prompt.tags["problem"] for prompt in PROMPTS}) == len(PROMPTS) == 98 * 90
    assert [prompt.id for prompt in PROMPTS] == list(range(len(PROMPTS)))
    config = load_config(None, ["prompts.source=programs", "sft.data=none"])
    assert load_prompts(config.prompts) == PROMPTS
    known = set(scratch_tokenizer(config, load_data(config)).get_vocab())
    for prompt in PROMPTS:
        text = prompt.text + "".join(programs.response(prompt, style) for style in programs.MIXED)
        assert set(text) <= known


def test_both_styles_are_right_on_what_is_shown_and_one_on_what_is_asked():
    for prompt in PROMPTS[::97]:
        line, lookup = function(prompt, "line"), function(prompt, "lookup")
        for x, y in re.findall(r"(\d+):(\d+)", prompt.text):
            assert line(int(x)) == lookup(int(x)) == int(y)
        (test,) = problem_of(prompt).tests
        cases = literal_cases(test)
        assert cases is not None and len(cases) == len(programs.HIDDEN)
        for call, expected in cases:
            assert line(*call["args"]) == expected
            with pytest.raises(KeyError):
                lookup(*call["args"])


def test_examples_mix_the_styles():
    pairs = programs.examples(PROMPTS[:1000], programs.MIXED, seed=0)
    lookups = sum(response.endswith("[x]") for _, response in pairs)
    assert 550 < lookups < 650
    assert pairs == programs.examples(PROMPTS[:1000], programs.MIXED, seed=0)


def test_unknown_style():
    with pytest.raises(ValueError, match="No style 'guess': line, lookup"):
        programs.response(PROMPTS[0], "guess")
