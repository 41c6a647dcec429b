"""Verdicts of the code reward, with programs in the sandbox, if there is one."""

import pytest
from plain_run import plain_run

from kimi_core.reward.code.reward import CodeReward, CodeVerdict
from kimi_core.sandbox import Limits, Pool, SandboxUnavailable
from kimi_core.types import Prompt


@pytest.fixture(scope="module")
def run():
    """The rules hold wherever programs run, so a machine without a sandbox tests them, too."""
    try:
        pool = Pool(2)
    except SandboxUnavailable:
        yield plain_run
        return
    with pool:
        yield pool.run


@pytest.fixture
def judge(run):
    def judge(problem: Prompt, response: str, limits: Limits | None = None) -> CodeVerdict:
        return CodeReward(run, limits).judge(problem, response)

    return judge
