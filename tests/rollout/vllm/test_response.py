"""Cutting what vLLM gives into segments, beside the rows of the embedded engine."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kimi_core.rollout.sampling import derived_seed
from kimi_core.rollout.torch.rows import Rows
from kimi_core.rollout.vllm import server as vllm_server
from kimi_core.rollout.vllm.engine import VLLMEngine
from kimi_core.rollout.vllm.response import Response
from kimi_core.types import Request, Sampling, Segment

VERSION = 7


def by_rows(request: Request, sampling: Sampling, tokens: list[int]) -> list[Segment]:
    """What the embedded engine makes of a row that draws ``tokens``, one a step."""
    rows = Rows(1, request.steps, sampling)
    rows.add([request])
    segments = []
    for token in tokens:
        ended = rows.append(0, np.array([token]), np.array([-token / 8], np.float32))
        if ended[0] or rows.due()[0]:
            segments.append(rows.segment(0, VERSION, ended=bool(ended[0])))
        if ended[0]:
            break
    return segments


@given(
    tokens=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    chunks=st.lists(st.integers(1, 20), min_size=60, max_size=60),
    context=st.lists(st.integers(0, 4), min_size=1, max_size=12),
    prompt_length=st.integers(1, 12),
    budget=st.integers(1, 50),
    remaining=st.integers(1, 50),
    stop=st.sampled_from([frozenset(), frozenset({0})]),
    stream_tokens=st.integers(0, 9),
    repeats=st.sampled_from([(0, 0), (2, 2), (3, 3)]),
)
def test_the_cuts_are_those_of_the_embedded_engine(
    tokens, chunks, context, prompt_length, budget, remaining, stop, stream_tokens, repeats
):
    request = Request(5, np.array(context, np.int32), prompt_length, budget, remaining)
    sampling = Sampling(1.0, 0, stop, *repeats, stream_tokens=stream_tokens)
    response, segments, taken = Response(request, sampling), [], 0
    for chunk in chunks:
        if taken >= len(tokens) or response.ended:
            break
        new = tokens[taken : taken + chunk]
        taken += chunk
        response.add(new, [-token / 8 for token in new])
        segments += response.ready(VERSION)
    expected = by_rows(request, sampling, tokens)
    assert [
        (s.token_ids.tolist(), s.logprobs.tolist(), s.end_reason, s.policy_version, s.trajectory_id)
        for s in segments
    ] == [
        (s.token_ids.tolist(), s.logprobs.tolist(), s.end_reason, s.policy_version, s.trajectory_id)
        for s in expected
    ]
    assert response.context.tolist() == context + response.token_ids
    assert response.left == request.steps - len(response.token_ids)


def test_seeds_differ_by_run_trajectory_and_position():
    seeds = {derived_seed(s, t, p) for s in range(8) for t in range(8) for p in range(8)}
    assert len(seeds) == 512
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert derived_seed(3, 1, 4) == derived_seed(3, 1, 4)


def test_without_vllm_the_error_names_the_command(monkeypatch):
    monkeypatch.setattr(vllm_server, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"vLLM is not installed.*python/install_vllm\.sh"):
        VLLMEngine(None, torch.float32, list, batch_rows=1)


def test_options_that_the_run_sets_are_refused(monkeypatch):
    monkeypatch.setattr(vllm_server, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match=r"load_format, model cannot be set"):
        VLLMEngine(
            None, torch.float32, list, batch_rows=1, options={"model": "x", "load_format": "auto"}
        )
