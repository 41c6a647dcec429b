import math

import numpy as np
import pytest

from kimi_core.config import RewardConfig
from kimi_core.reward.base import InfrastructureError, RewardError, score
from kimi_core.reward.load import load_reward, match
from kimi_core.types import Prompt, Score

PROMPT = Prompt(id=7, text="3*214=", answer="642")


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("642", 1.0),
        (" 642\n", 1.0),
        ("3*14=42;3*200=600#642", 1.0),
        ("#641#642", 1.0),
        ("#642#641", 0.0),
        ("642#", 0.0),
        ("the answer is 642", 0.0),
        ("6 42", 0.0),
        ("0642", 0.0),
        ("", 0.0),
    ],
)
def test_match(response, expected):
    assert match(PROMPT, response) == expected


def test_match_strips_the_reference_too():
    assert match(Prompt(0, "x", " a b\n"), "#a b") == 1.0


def test_built_in_is_found_by_name():
    assert load_reward(RewardConfig(function="match")) is match


def test_users_function_is_loaded_relative_to_the_folder(tmp_path):
    (tmp_path / "mine.py").write_text("def half(prompt, response):\n    return len(response) / 2\n")
    function = load_reward(RewardConfig(function="mine.py:half"), base_folder=tmp_path)
    assert score(function, PROMPT, "abc") == Score(1.5)


def test_unknown_name_says_what_is_allowed():
    with pytest.raises(
        ValueError,
        match=r"'matches'; allowed are match, math, code, judge, value and file\.py:function",
    ):
        load_reward(RewardConfig(function="matches"))


@pytest.mark.parametrize("value", [1, -0.5, True, np.float32(2), np.int64(3)], ids=repr)
def test_finite_numbers_are_scores(value):
    result = score(lambda prompt, response: value, PROMPT, "642").value
    assert type(result) is float
    assert result == value


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, "1", [1], 1j], ids=repr)
def test_anything_else_is_an_error_that_names_it(value):
    def broken(prompt, response):
        return value

    with pytest.raises(RewardError) as caught:
        score(broken, PROMPT, "642")
    message = str(caught.value)
    assert "broken" in message
    assert repr(value) in message
    assert "prompt 7" in message
    assert "finite int or float" in message


def test_an_exception_is_named_and_chained():
    def divides(prompt, response):
        return 1 / 0

    with pytest.raises(
        RewardError, match=r"divides raised ZeroDivisionError on prompt 7"
    ) as caught:
        score(divides, PROMPT, "642")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_ctrl_c_in_a_reward_function_is_not_swallowed():
    def interrupted(prompt, response):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(interrupted, PROMPT, "642")


def test_a_verdict_that_could_not_be_reached_is_no_fault_of_the_function():
    def function(prompt, response):
        raise InfrastructureError("the sandbox did not start")

    with pytest.raises(InfrastructureError, match="did not start"):
        score(function, PROMPT, "5")
