"""Verdicts of the code reward, with programs in plain processes and in the sandbox."""

import pytest
from plain_run import plain_run

from kimi_core.reward.code.reward import CodeReward, CodeVerdict
from kimi_core.sandbox import Limits, Pool, SandboxUnavailable
from kimi_core.types import Prompt


@pytest.fixture(scope="module", params=["plain", "sandbox"])
def run(request):
    """The rules hold wherever programs run; without a sandbox they are tested all the same."""
    if request.param == "plain":
        yield plain_run
        return
    try:
        pool = Pool(2)
    except SandboxUnavailable as error:
        pytest.skip(f"no sandbox on this machine: {error}")
    with pool:
        yield pool.run


@pytest.fixture
def judge(run):
    def judge(problem: Prompt, response: str, limits: Limits | None = None) -> CodeVerdict:
        return CodeReward(run, limits).judge(problem, response)

    return judge
