"""What a saved state keeps of the curriculum, now and in earlier versions."""

import json

import numpy as np
import pytest

from kimi_core.config import CurriculumConfig
from kimi_core.prompts.curriculum import Curriculum
from kimi_core.run.state import CURRICULUM, curriculum_in
from kimi_core.types import Prompt

PROMPTS = [Prompt(id, f"{id}+1=", str(id + 1)) for id in range(6)]


@pytest.mark.parametrize("as_json", [False, True])
def test_success_rates_come_back_from_both_forms(tmp_path, as_json):
    before = Curriculum(PROMPTS, CurriculumConfig())
    for prompt_id, correctness in [(2, 1.0), (2, 1.0), (4, 0.0), (5, 0.5)]:
        before.record(prompt_id, correctness)
    state = {}
    if as_json:  # Up to November 2026 the rates were in the state's JSON.
        rates = {key: value.tolist() for key, value in before.state().items()}
        state = json.loads(json.dumps({"curriculum": rates}))
    else:
        np.savez(tmp_path / CURRICULUM, **before.state())
    after = Curriculum(PROMPTS, CurriculumConfig())
    assert not np.array_equal(after.weights(0), before.weights(0))
    after.load_state(curriculum_in(tmp_path, state))
    np.testing.assert_array_equal(after.weights(0), before.weights(0))
