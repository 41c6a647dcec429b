"""Users' reward functions: whatever one does on a response, the others are judged."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import kimi_core
from kimi_core.config import RewardConfig
from kimi_core.reward import user_function
from kimi_core.reward.base import InfrastructureError, LimitReached, RewardError
from kimi_core.reward.judging import judge_all, verdicts_on
from kimi_core.reward.load import close_reward, load_reward
from kimi_core.types import Prompt, Score

NEVER = "re.fullmatch(r'(a+)+b', 'a' * 60)"
HANGS = {
    "a regular expression that keeps the GIL": NEVER,
    "a number": "9 ** 9 ** 9",
    "a sleep": "time.sleep(600)",
    "a loop": "exec('while True: pass')",
    "a loop that swallows exceptions": "swallow()",
}
DIES = {
    "a segmentation fault": ("os.kill(os.getpid(), signal.SIGSEGV)", "by SIGSEGV"),
    "an exit": ("os._exit(3)", "with status 3"),
    "a kill": ("os.kill(os.getpid(), signal.SIGKILL)", "by SIGKILL"),
}
HEAD = """
import asyncio, os, re, signal, sys, time
from kimi_core.reward.base import InfrastructureError, LimitReached
from kimi_core.types import Score

def swallow():
    while True:
        try:
            time.sleep(1)
        except BaseException:
            pass

"""
ONE = HEAD + "def f(prompt, text):\n    if text == '1': WORK\n    return float(text)\n"
ASYNC = ONE.replace("def f", "async def f")
BATCH = HEAD + (
    "def f(prompts, texts):\n    if '1' in texts: WORK\n    return [*map(float, texts)]\n"
)


@pytest.fixture
def load(tmp_path):
    """The function f of a file with the given text."""
    made = []

    def load(text: str):
        (tmp_path / "mine.py").write_text(text)
        made.append(load_reward(RewardConfig(function="mine.py:f"), base_folder=tmp_path))
        return made[-1]

    yield load
    for one in made:
        close_reward(one)


def responses(n: int) -> list[tuple[Prompt, str]]:
    return [(Prompt(0, "?", "!"), str(i)) for i in range(n)]


def judged(function, n: int = 4, workers: int = 2, timeout_s: float = 1.0):
    return verdicts_on(function, responses(n), workers, timeout_s)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        *((ONE, kind) for kind in HANGS),
        (ASYNC, "a loop that swallows exceptions"),
        (BATCH, "a regular expression that keeps the GIL"),
        *(pytest.param(ASYNC, kind, marks=pytest.mark.nightly) for kind in list(HANGS)[:-1]),
        *(pytest.param(BATCH, kind, marks=pytest.mark.nightly) for kind in list(HANGS)[1:]),
    ],
    ids=lambda one: {ONE: "one", ASYNC: "async", BATCH: "batch"}.get(one, one),
)
def test_a_call_that_hangs_is_given_up_and_its_process_ended(load, monkeypatch, text, kind):
    work = HANGS[kind]
    monkeypatch.setattr(user_function, "GRACE_S", 0.5)
    function = load(text.replace("WORK", work))
    found = judged(function)
    assert [one.value for one in (found[0], *found[2:])] == [0, 2, 3]
    assert isinstance(found[1], InfrastructureError)
    assert "did not return in" in str(found[1]) and "(response '1')" in str(found[1])


@pytest.mark.parametrize(("work", "said"), DIES.values(), ids=DIES)
@pytest.mark.parametrize("text", [ONE, ASYNC, BATCH], ids=["one", "async", "batch"])
def test_a_call_that_ends_its_process_has_no_verdict(load, text, work, said):
    found = judged(load(text.replace("WORK", work)), timeout_s=60)
    assert [one.value for one in (found[0], *found[2:])] == [0, 2, 3]
    assert str(found[1]).startswith(f"the reward function f ended its process {said} on prompt 0")


def test_all_that_a_function_may_return_arrives(load):
    function = load(
        HEAD + "def f(prompt, text):\n    return {'0': 1, '1': True, '2': 0.1 + 0.2,\n"
        "        '3': Score(-1.5, {'x': 2}, note='wegen ü')}[text]\n"
    )
    assert judged(function) == [
        Score(1.0),
        Score(1.0),
        Score(0.1 + 0.2),
        Score(-1.5, {"x": 2.0}, "wegen ü"),
    ]
    assert function(Prompt(1, "?", "!"), "2") == Score(0.1 + 0.2)


def test_the_prompt_arrives_whole(load):
    function = load(
        HEAD + "def f(prompt, text):\n    return Score(prompt.difficulty, note=repr(prompt))\n"
    )
    prompt = Prompt(
        7,
        "a\ud800b",
        "ü",
        0.5,
        {"level": "1"},
        ({"role": "user", "content": "a"},),
    )
    assert function(prompt, "\ud800") == Score(0.5, {}, repr(prompt))


def test_reasons_for_no_verdict_keep_their_kind(load):
    function = load(
        HEAD + "def f(prompt, text):\n"
        "    raise (LimitReached if text == '1' else InfrastructureError)('why ' + text)\n"
    )
    first, second = judged(function, n=2)
    assert type(first) is InfrastructureError and str(first) == "why 0"
    assert type(second) is LimitReached and str(second) == "why 1"
    with pytest.raises(InfrastructureError, match="why 5"):
        function(Prompt(0, "?", "!"), "5")


def test_errors_name_the_line(load):
    function = load("def f(prompt, text):\n    if text == '2':\n        1 / 0\n    return 0\n")
    with pytest.raises(RewardError, match=r"ZeroDivisionError.*division by zero \(mine.py, line 3"):
        judged(function)
    assert judged(function, n=2) == [Score(0.0), Score(0.0)]  # It can be called again.


def test_an_exit_is_an_error(load):
    with pytest.raises(RewardError, match="raised SystemExit"):
        judged(load("def f(prompt, text):\n    raise SystemExit(0)\n"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import nothing_of_this_name\n", "mine.py:f raised ModuleNotFoundError: No module named"),
        ("def f(:\n", "mine.py:f raised SyntaxError"),
        ("def g(): pass\n", "has no 'f'; it has g"),
        ("f = 3\n", "is 3, which is not callable"),
        ("import os\nos._exit(4)\n", "importing the file ended its process with status 4"),
        ("raise SystemExit('no')\n", "mine.py:f raised SystemExit: no"),
    ],
)
def test_files_that_cannot_be_imported(load, text, said):
    with pytest.raises(ValueError, match=r".+") as caught:
        load(text)
    assert said in str(caught.value)


def test_state_of_a_function_lives_as_long_as_its_process(load):
    function = load("n = 0\ndef f(prompt, text):\n    global n\n    n += 1\n    return n\n")
    assert [one.value for one in judged(function, n=3, workers=1)] == [1, 2, 3]
    assert [one.value for one in judged(function, n=2, workers=1)] == [4, 5]


FORKS = {
    "a child that returns": "os.fork()",
    "a child that raises": "os.fork() or 1 / 0",
    "a child that exits": "os.fork() or sys.exit(3)",
}


@pytest.mark.parametrize("work", FORKS.values(), ids=FORKS)
@pytest.mark.parametrize("text", [ONE, ASYNC, BATCH], ids=["one", "async", "batch"])
def test_a_child_of_a_function_gives_no_verdict(load, text, work):
    """It would be taken for the verdict on the next response."""
    function = load(text.replace("WORK", work))
    for _ in range(3):
        assert [one.value for one in judged(function, timeout_s=60)] == [0, 1, 2, 3]


def test_a_child_of_an_import_says_nothing(load):
    function = load("import os\nos.fork()\n" + ONE.replace("WORK", "pass"))
    assert [one.value for one in judged(function, timeout_s=60)] == [0, 1, 2, 3]


@pytest.mark.parametrize("way", ["pass", "os.setsid()"], ids=["its session", "a new session"])
def test_what_a_function_leaves_behind_ends_with_it(load, way):
    work = f"""
        child = os.fork()
        if not child:
            {way}
            time.sleep(600)
        return child
"""
    function = load(ONE.replace(" WORK", work))
    child = int(judged(function, timeout_s=60)[1].value)
    assert is_alive(child)
    close_reward(function)
    assert not is_alive(child)


def test_close_is_called_and_no_process_is_left(load, tmp_path):
    function = load(
        "import os\n"
        "class F:\n"
        "    def __call__(self, prompt, text):\n        return os.getpid()\n"
        f"    def close(self):\n        open({str(tmp_path / 'closed')!r}, 'w').close()\n"
        "f = F()\n"
    )
    pids = {int(one.value) for one in judged(function, n=8, workers=4)}
    assert os.getpid() not in pids
    close_reward(function)
    assert (tmp_path / "closed").exists()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_files_beside_the_function_and_the_path_of_this_process_are_found(
    load, tmp_path, monkeypatch
):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "helper_of_mine.py").write_text("VALUE = 3\n")
    monkeypatch.syspath_prepend(tmp_path / "lib")
    function = load("from helper_of_mine import VALUE\ndef f(prompt, text):\n    return VALUE\n")
    assert function(Prompt(0, "?", "!"), "x") == Score(3.0)


def test_workers_run_at_the_same_time(load):
    function = load("import time\ndef f(prompt, text):\n    time.sleep(0.5)\n    return 1\n")
    judged(function, n=8, workers=8, timeout_s=60)  # All processes have started.
    start = time.monotonic()
    judge_all(function, responses(8), workers=8, outage_from=2)
    assert time.monotonic() - start < 8 * 0.5


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.nightly
def test_a_killed_run_leaves_no_process_that_hangs(tmp_path):
    (tmp_path / "mine.py").write_text(HEAD + "def f(prompt, text):\n    " + NEVER + "\n")
    code = """if True:
        from kimi_core.config import RewardConfig
        from kimi_core.reward.load import load_reward
        from kimi_core.types import Prompt
        function = load_reward(RewardConfig(function="mine.py:f"))
        print(function._workers._idle[0]._process.pid, flush=True)
        function(Prompt(0, "?", "!"), "x")
    """
    root = str(Path(kimi_core.__file__).parents[1])
    run = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": root},
    )
    supervisor = int(run.stdout.readline())
    children = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
    assert len(children) == 1
    time.sleep(1)  # Into the call.
    run.kill()
    run.communicate()
    end = time.monotonic() + 60
    while any(is_alive(int(pid)) for pid in (supervisor, *children)):
        assert time.monotonic() < end, "a process lives on"
        time.sleep(0.05)


def test_an_import_has_the_deadline_of_a_call(tmp_path):
    (tmp_path / "mine.py").write_text("import time\ntime.sleep(600)\n")
    with pytest.raises(ValueError, match=r"mine.py:f: importing the file did not return in 0.5 s"):
        load_reward(RewardConfig(function="mine.py:f", timeout_s=0.5), base_folder=tmp_path)
