"""Two instances of vLLM on one host: the tokens of one, new weights on both, and one that dies."""

import os
import signal

import psutil
import pytest
from vllm_testing import (
    MARKS,
    SAMPLED,
    SMALL_CACHE,
    PublishedEngine,
    joined,
    next_version,
    requests_of,
    tiny_model,
    tokens_of,
    tokens_of_two_versions,
)

from kimi_core.rollout.vllm.engine import VLLMEngine

pytestmark = [*MARKS, pytest.mark.nightly]


def test_two_give_the_tokens_of_one_also_after_an_update_and_a_kill():
    expected = tokens_of_two_versions()
    two = PublishedEngine(tiny_model(), batch_rows=8, instances=2, options=SMALL_CACHE)
    assert tokens_of(two) == expected[0]
    pids = two.server.pids
    assert len(pids) == 2
    next_version(two)
    assert tokens_of(two) == expected[1]

    stream = two.generate(requests_of(12), SAMPLED)
    parts = {key: [] for key in expected[1]}
    for number, segments in enumerate(stream):
        for segment in segments:
            parts[segment.trajectory_id].append(segment)
        if number == 0:
            os.kill(pids[1], signal.SIGKILL)
    # A response that went on in other processes draws other tokens behind the cut.
    assert all(joined(some)[0] for some in parts.values())
    assert two.restarts == 1 and {pid for pid in pids if psutil.pid_exists(pid)} == set()
    assert tokens_of(two) == expected[1]
    two.close()
    left = [one for one in psutil.Process().children() if "VLLM" in one.name()]
    assert all(one.status() == psutil.STATUS_ZOMBIE for one in left)  # Ended, not yet waited for.


def test_their_number_is_set_in_one_place():
    with pytest.raises(ValueError, match=r"data_parallel_size cannot be set.*rollout\.workers = 2"):
        VLLMEngine(
            tiny_model().config,
            tiny_model().dtype,
            list,
            batch_rows=8,
            options={"data_parallel_size": 2},
        )
