"""The nouns keep what their docstrings promise; ``test_layout.py`` runs the examples in them."""

from dataclasses import FrozenInstanceError, fields

import numpy as np
import pytest

from kimi_core import types
from kimi_core.types import Batch, Prompt, Trajectory


def test_every_noun_is_frozen_and_has_an_example():
    nouns = [thing for thing in vars(types).values() if isinstance(thing, type)]
    nouns = [noun for noun in nouns if noun.__module__ == types.__name__]
    assert Trajectory in nouns
    for noun in nouns:
        assert ">>>" in (noun.__doc__ or ""), noun
        assert noun.__dataclass_params__.frozen, noun
    with pytest.raises(FrozenInstanceError):
        Prompt(0, "", "").answer = "cheat"


def trajectory(mask: list[int]) -> Trajectory:
    n = len(mask)
    return Trajectory(
        trajectory_id=0,
        prompt_id=0,
        group_id=0,
        token_ids=np.arange(n, dtype=np.int32),
        logprobs=np.zeros(n, np.float32),
        mask=np.array(mask, np.uint8),
        policy_versions=np.zeros(n, np.int32),
        end_reason=None,
    )


@pytest.mark.parametrize(
    ("mask", "prompt_length"), [([], 0), ([0, 0], 2), ([0, 1], 1), ([1, 1], 0), ([0, 1, 0, 1], 1)]
)
def test_the_response_begins_with_the_first_sampled_token(mask, prompt_length):
    whole = trajectory(mask)
    assert whole.prompt_length == prompt_length
    assert whole.response_length == len(mask) - prompt_length
    assert whole.response_ids.tolist() == list(range(prompt_length, len(mask)))


def test_an_empty_batch():
    empty = {field.name: np.zeros(0) for field in fields(Batch)} | {"cu_seqlens": np.zeros(1)}
    assert len(Batch(**empty)) == 0
    assert Batch(**empty).lengths.tolist() == []
