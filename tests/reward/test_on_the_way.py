"""Verdicts that are asked for while other responses are still sampled."""

import threading
import time

import numpy as np
import pytest

from kimi_core.config import Config
from kimi_core.reward.base import RewardError
from kimi_core.reward.combined import CombinedReward, Part
from kimi_core.reward.groups import GroupScorer
from kimi_core.types import Prompt, Trajectory

PROMPT = Prompt(3, "", "")
WAIT_S = 60


def ended(key: int) -> tuple[Prompt, Trajectory]:
    """A response whose only token is its trajectory's id."""
    ids, mask = np.array([0, key], np.int32), np.array([0, 1], np.uint8)
    return PROMPT, Trajectory(key, 3, 0, ids, np.zeros(2, np.float32), mask, ids, "stop")


def scorer_of(reward, workers: int = 4) -> GroupScorer:
    config = Config.model_validate({"reward": {"workers": workers}})
    return GroupScorer(config, reward, lambda ids: str(ids[0]))


def correctness(scorer: GroupScorer) -> list[tuple[int, float]]:
    return [(one["trajectory_id"], one["correctness"]) for one in scorer.state()["0"]]


def test_verdicts_come_early_and_count_in_the_order_of_ids():
    called, last = [], threading.Event()

    def reward(prompt, response):
        called.append(response)
        if response == "9":
            last.set()
        elif not last.wait(WAIT_S):  # The first ones have their verdicts last.
            raise TimeoutError
        return float(response)

    scorer = scorer_of(reward)
    for key in (5, 2, 9):
        scorer.begin(*ended(key))
    assert last.wait(WAIT_S)  # Before ``judge`` is called.
    assert scorer.judge([ended(key) for key in (1, 2, 5, 9)]) == []
    assert correctness(scorer) == [(1, 1.0), (2, 2.0), (5, 5.0), (9, 9.0)]
    assert sorted(called) == ["1", "2", "5", "9"]
    assert scorer.judge([ended(key) for key in (1, 2, 5, 9)]) == []
    assert len(called) == 4


def test_a_function_of_all_responses_gets_them_once_in_order():
    calls = []

    def batch(prompts, responses):
        calls.append(list(responses))
        return [float(text) for text in responses]

    def single(prompt, response):
        return 0.5

    both = CombinedReward([Part("all", 1.0, batch), Part("one", 2.0, single)])
    scorer = scorer_of(both)
    for key in (5, 2):
        scorer.begin(*ended(key))
    assert calls == []
    scorer.judge([ended(key) for key in (1, 2, 5)])
    assert calls == [["1", "2", "5"]]
    assert correctness(scorer) == [(1, 2.0), (2, 3.0), (5, 6.0)]


def test_the_first_error_by_id_is_raised_and_nothing_is_kept():
    broken = {"2", "5"}

    def reward(prompt, response):
        if response in broken:
            time.sleep(0.05 * (response == "2"))
            raise ZeroDivisionError(f"response {response}")
        return 1.0

    scorer = scorer_of(reward)
    for key in (5, 2, 7):
        scorer.begin(*ended(key))
    with pytest.raises(RewardError, match="response 2"):
        scorer.judge([ended(key) for key in (2, 5, 7)])
    assert scorer.state() == {}
    broken.clear()
    assert scorer.judge([ended(key) for key in (2, 5, 7)]) == []
    assert [key for key, _ in correctness(scorer)] == [2, 5, 7]


def test_no_more_calls_at_once_than_workers():
    running, most, lock = 0, 0, threading.Lock()

    def reward(prompt, response):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        with lock:
            running -= 1
        return 0.0

    parts = [Part("a", 1.0, reward), Part("b", 1.0, reward)]
    scorer = scorer_of(CombinedReward(parts), workers=2)
    for key in range(8):
        scorer.begin(*ended(key))
    scorer.judge([ended(key) for key in range(8)])
    assert most == 2
