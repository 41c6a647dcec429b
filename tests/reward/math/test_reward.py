"""Equivalence of answers: a table with the truth, and answers that are bombs."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import StringIO
from multiprocessing import Pipe
from pathlib import Path

import pytest
from rich.console import Console

import kimi_core
from kimi_core.config import MathConfig, RewardConfig
from kimi_core.reward.base import InfrastructureError
from kimi_core.reward.load import load_reward
from kimi_core.reward.math import reward as math_module
from kimi_core.reward.math import worker as math_worker
from kimi_core.reward.math.reward import MathReward
from kimi_core.run.config_file import load_config
from kimi_core.run.run import train
from kimi_core.types import Prompt

pytest.importorskip("math_verify", reason="math-verify is not installed: kimi-core[math]")

LINES = (Path(__file__).parents[1] / "data" / "math_pairs.tsv").read_text().splitlines()
PAIRS = [line.split("\t") for line in LINES if not line.startswith("#")]
DEADLINE_S = 60.0


def prompt(answer: str) -> Prompt:
    return Prompt(0, "?", answer)


@pytest.fixture(scope="module")
def reward():
    made = load_reward(RewardConfig(function="math"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def hasty():
    """One that gives a comparison a single CPU-second."""
    made = MathReward(MathConfig(cpu_s=1))
    yield made
    made.close()


def test_the_table_is_what_it_should_be():
    assert len(PAIRS) >= 150
    assert len({(pair[1], pair[2]) for pair in PAIRS}) == len(PAIRS)
    assert {pair[0] for pair in PAIRS} == {"=", "≠"}
    assert sum(pair[0] == "≠" for pair in PAIRS) >= 60
    assert all(len(pair) in (4, 5) for pair in PAIRS)


@pytest.mark.parametrize(
    "pair",
    [
        pytest.param(pair, marks=pytest.mark.xfail(reason=pair[4], strict=True))
        if len(pair) > 4
        else pair
        for pair in PAIRS
    ],
    ids=lambda pair: " ".join([pair[3], *pair[:3]]),
)
def test_pairs(reward, pair):
    truth, reference, answer = pair[0] == "=", pair[1], pair[2]
    assert reward(prompt(reference), f"I get \\boxed{{{answer}}}.") == float(truth)


def test_a_reference_may_be_a_whole_solution(reward):
    assert reward(prompt("1 + 1 = 2\n#### 2"), "2") == 1
    assert reward(prompt(r"so \boxed{\frac12}"), "Answer: 0.5") == 1


@pytest.mark.parametrize("response", ["", "\n", r"\boxed{}", r"\boxed{\frac{}{", "no idea", "\x00"])
def test_no_answer_is_a_wrong_one(reward, response):
    assert reward(prompt("a+b"), response) == 0


@pytest.mark.parametrize(
    "answer",
    [
        "9^{9^{9}}",
        "9^{9^{9^{9^{9}}}}",
        "10^{10^{12}}",
        "(10^9)!",
        "x^{200000}-(x+1)^{200000}",
        "(" * 900 + "x" + ")" * 900,
        "{" * 900 + "x" + "}" * 900,
    ],
    ids=lambda answer: answer[:24],
)
def test_a_bomb_is_never_right_and_hurts_nobody(hasty, answer):
    """Not even its worker: the fork that took it is gone, and the next answer is judged."""
    hasty(prompt("a+b"), r"\boxed{b+a}")
    before = [worker._process.pid for worker in hasty._workers._idle]
    # Some of them cannot be read, and are wrong. The others reach a limit.
    with suppress(InfrastructureError):
        assert hasty(prompt("a+b"), f"\\boxed{{{answer}}}") == 0
    assert hasty(prompt("a+b"), r"\boxed{b+a}") == 1
    assert [worker._process.pid for worker in hasty._workers._idle] == before


def test_nothing_is_evaluated(reward, tmp_path):
    bait = tmp_path / "pwned"
    for answer in (f'__import__("os").system("touch {bait}")', f"open('{bait}', 'w')"):
        assert reward(prompt("a+b"), f"\\boxed{{{answer}}}") == 0
        assert reward(prompt("a+b"), answer) == 0
    assert not bait.exists()


def spin(*_):
    while True:
        pass


def hog(*_):
    """Swallows the error, as math-verify does."""
    hoard = []
    try:
        while True:
            hoard.append(bytearray(16 << 20))
    except MemoryError:
        return False


@pytest.mark.parametrize(
    ("work", "cpu_s", "wall_s", "verdict"),
    [
        (lambda *_: True, 60, 600, True),
        (lambda *_: False, 60, 600, False),
        (spin, 1, 600, "time"),
        (lambda *_: signal.pause(), 60, 0.2, "time"),
        (hog, 60, 600, "memory"),
        (lambda *_: os.kill(os.getpid(), signal.SIGKILL), 60, 600, "crash"),
        (lambda *_: os._exit(3), 60, 600, "crash"),
        (lambda *_: os.kill(os.getpid(), signal.SIGSEGV), 60, 600, False),
        (lambda *_: 1 / 0, 60, 600, False),
    ],
    ids=["yes", "no", "spin", "sleep", "hog", "killed", "exit", "overflow", "raise"],
)
def test_what_a_fork_may_do(monkeypatch, work, cpu_s, wall_s, verdict):
    monkeypatch.setattr(math_worker, "equal", work)
    ours, theirs = Pipe()
    request = {"reference": "", "answer": "", "cpu_s": cpu_s, "wall_s": wall_s}
    peak_mb = int(math_worker._peak_mb())  # This process is larger than a worker.
    fork = math_worker.Fork(2 * peak_mb + 512)
    assert fork.ask(request, theirs) == verdict
    if fork.is_alive:
        fork.end()
    ours.close()


def test_a_fork_answers_until_it_has_grown(monkeypatch):
    kept = []
    monkeypatch.setattr(math_worker, "equal", lambda *_: kept.append(bytearray(48 << 20)) or True)
    _, theirs = Pipe()
    fork = math_worker.Fork(4 * int(math_worker._peak_mb()) + 4096)
    request = {"reference": "", "answer": "", "cpu_s": 60, "wall_s": 600}
    answered = 0
    while fork.is_alive:
        assert fork.ask(request, theirs) is True
        answered += 1
    assert answered == 3  # 128 MB


def test_a_worker_that_died_is_replaced(hasty):
    hasty(prompt("a+b"), "b+a")
    worker = hasty._workers._idle[0]._process
    worker.kill()
    worker.wait()
    assert hasty(prompt("a+b"), "b+a") == 1
    assert hasty._workers._idle[0]._process.pid != worker.pid


def test_workers_that_never_answer_are_no_verdict(monkeypatch):
    monkeypatch.setattr(math_module, "WORKER", "kimi_core.reward.length")  # Does nothing and ends.
    made = MathReward(MathConfig())
    with pytest.raises(InfrastructureError, match="not answered by its worker, in 2 attempts"):
        made(prompt("a+b"), "b+a")
    assert made._workers._idle == []


def test_threads_share_the_workers():
    made = MathReward(MathConfig())
    answers = [("a+b", "b+a"), ("a+b", "b-a"), ("2x", r"x \cdot 2"), ("x^2", "2x")] * 3
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda pair: made(prompt(pair[0]), pair[1]), answers))
    assert found == [1, 0, 1, 0] * 3
    assert 1 <= len(made._workers._idle) <= 2
    made.close()


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, what: str):
    end = time.monotonic() + DEADLINE_S
    while not (found := condition()):
        assert time.monotonic() < end, what
        time.sleep(0.01)
    return found


def test_nothing_is_left_after_close():
    made = MathReward(MathConfig())
    made(prompt("a+b"), "b+a")
    pid = made._workers._idle[0]._process.pid
    made.close()
    assert not is_alive(pid)
    assert made(prompt("a+b"), "b+a") == 1  # It can be used again.
    made.close()


def test_closing_a_worker_ends_the_fork_it_has():
    made = MathReward(MathConfig(cpu_s=300))
    made(prompt("a+b"), "b+a")
    pid = made._workers._idle[0]._process.pid

    def ask() -> None:
        with pytest.raises(InfrastructureError, match="not answered by its worker"):
            made(prompt("a+b"), "9^{9^{9}}")

    asking = threading.Thread(target=ask)
    asking.start()
    wait_until(lambda: made._workers._busy, "the question was not asked")
    [fork] = wait_until(lambda: children(pid), "no fork")
    made.close()
    assert not is_alive(pid)
    wait_until(lambda: not is_alive(fork), "the fork lives on")
    while asking.is_alive():  # It makes a second attempt, with another worker.
        made.close()
        asking.join(0.1)


def test_a_killed_run_leaves_no_process():
    code = """if True:
        import threading
        from kimi_core.config import MathConfig
        from kimi_core.reward.math.reward import MathReward
        from kimi_core.types import Prompt
        made = MathReward(MathConfig(cpu_s=300))
        made(Prompt(0, "", "a+b"), "b+a")
        print(made._workers._idle[0]._process.pid, flush=True)
        made(Prompt(0, "", "a+b"), "9^{9^{9}}")
    """
    root = str(Path(kimi_core.__file__).parents[1])
    run = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": root},
    )
    worker = int(run.stdout.readline())
    wait_until(lambda: children(worker), "no fork")
    [fork] = children(worker)
    run.kill()
    run.communicate()
    wait_until(lambda: not is_alive(worker), "the worker lives on")
    wait_until(lambda: not is_alive(fork), "the fork lives on")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(math_module, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'kimi-core\[math\]'"):
        load_reward(RewardConfig(function="math"))


def test_a_run_is_rewarded_by_it(tmp_path):
    overrides = [
        "model.scratch.layers=1", "model.scratch.width=16", "model.scratch.heads=2",
        "model.scratch.context=64",
        "model.device=cpu", "prompts.held_out=4", "sft.data=none", "iterations=1",
        "rollout.prompts_per_iteration=2", "rollout.samples_per_prompt=2",
        "rollout.max_response_tokens=8", "reward.function=math", "reward.workers=2",
        'reward.math.extraction=["boxed", "last_line"]', f"runs={tmp_path}",
    ]  # fmt: skip
    before = set(children(os.getpid()))
    folder = train(load_config(None, overrides), console=Console(file=StringIO()))
    assert (folder / "summary.json").is_file()
    assert set(children(os.getpid())) <= before
