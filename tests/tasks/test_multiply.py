"""The multiplication task: every answer in every style is right, and nothing held out is shown."""

import re
from collections import Counter

import pytest

from kimi_core.config import PromptsConfig
from kimi_core.prompts.load import load_prompts, split
from kimi_core.reward.load import match
from kimi_core.tasks import multiply

STYLES = sorted({*multiply.MIXED, *multiply.LENGTHS})
EQUATION = re.compile(r"(\d+)([*+])(\d+)=(\d+)")
SPLIT = re.compile(r"=(\d+)>(\d),(\d)")


def test_all_products_once():
    prompts = multiply.prompts()
    assert len(prompts) == 7200
    assert [prompt.id for prompt in prompts] == list(range(7200))
    assert len({prompt.text for prompt in prompts}) == 7200
    for prompt in prompts:
        a, b = map(int, prompt.text.rstrip("=").split("*"))
        assert 2 <= a <= 9
        assert 100 <= b <= 999
        assert prompt.answer == str(a * b)


@pytest.mark.parametrize("style", STYLES)
def test_every_step_of_every_answer_is_right(style):
    longest = 0
    for prompt in multiply.prompts():
        response = multiply.response(prompt.text, style)
        assert match(prompt, response) == 1.0
        assert set(response) <= set(multiply.ALPHABET)
        for left, operator, right, result in EQUATION.findall(response):
            a, b = int(left), int(right)
            assert (a * b if operator == "*" else a + b) == int(result), response
        for total, digit, carry in SPLIT.findall(response):
            assert int(total) == 10 * int(carry) + int(digit), response
        longest = max(longest, len(response))
    steps = len(EQUATION.findall(multiply.response("9*999=", style)))
    passes = {"terse": 0, "worked": 1, "checked": 2, "checked twice": 3, "restated": 1}
    assert steps == 3 * passes[style]
    if style in multiply.MIXED:
        assert longest < 96  # with the end of text within think.toml's max_response_tokens


def test_an_unknown_style_names_those_there_are():
    with pytest.raises(ValueError, match=r"No style 'loud': checked, .*worked"):
        multiply.response("2*100=", "loud")


@pytest.mark.parametrize("shares", [multiply.MIXED, multiply.LENGTHS])
def test_styles_have_their_shares(shares):
    """Within 4 standard errors at this seed."""
    prompts = multiply.prompts()
    pairs = multiply.examples(prompts, shares, seed=0)
    assert [text for text, _ in pairs] == [prompt.text for prompt in prompts]
    style_of = {
        (p.text, multiply.response(p.text, style)): style for p in prompts for style in shares
    }
    counts = Counter(style_of[pair] for pair in pairs)
    assert sum(shares.values()) == pytest.approx(1)
    for style, share in shares.items():
        error = (share * (1 - share) / len(pairs)) ** 0.5
        assert abs(counts[style] / len(pairs) - share) < 4 * error


def test_examples_follow_from_the_seed():
    prompts = multiply.prompts()[:200]
    one, same, other = (multiply.examples(prompts, multiply.MIXED, seed=s) for s in (1, 1, 2))
    assert one == same
    assert one != other


@pytest.mark.parametrize("seed", [0, 7])
def test_no_example_shows_a_held_out_prompt(seed):
    train, held_out = split(load_prompts(PromptsConfig()), 500, seed)
    shown = {text for text, _ in multiply.examples(train, multiply.MIXED, seed=seed)}
    assert len(held_out) == 500
    assert not shown & {prompt.text for prompt in held_out}
