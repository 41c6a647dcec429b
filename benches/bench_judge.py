"""The HTTP judge with one request at a time and with many, wall-clock seconds.

    pytest benches/bench_judge.py

The server is a process of this host that takes 0.1 s for each answer, as a judge of a few hundred
tokens does at best. The limit is the number of workers.
"""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from kimi_core.config import RewardConfig
from kimi_core.reward.judging import judge_all
from kimi_core.reward.load import close_reward, load_reward
from kimi_core.types import Prompt

SERVER = Path(__file__).parents[1] / "tests" / "reward" / "judges" / "server.py"
RESPONSES, WORKERS = 64, 16


@pytest.mark.benchmark(timer=time.perf_counter)
def test_requests_at_the_same_time(benchmark, ratios):
    command = [sys.executable, str(SERVER), "0.1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        port = int(server.stdout.readline())
        settings = {"url": f"http://127.0.0.1:{port}/v1", "model": "grader"}
        reward = load_reward(RewardConfig(function="judge", judge=settings))
        responses = [(Prompt(n, "6 * 7?", "42"), str(n)) for n in range(RESPONSES)]

        def judge(workers: int) -> float:
            start = time.perf_counter()
            found = judge_all(reward, responses, workers=workers, outage_from=2)
            assert sum(one.value for one in found) == 1
            return time.perf_counter() - start

        one = judge(1)
        many = benchmark.pedantic(judge, (WORKERS,), rounds=1)
        close_reward(reward)
        server.kill()
    detail = f"{many:.2f} against {one:.2f} s for {RESPONSES} verdicts"
    ratios.record(f"HTTP judge, {WORKERS} workers", "one at a time", one / many, 10, detail)
