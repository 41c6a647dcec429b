"""Reward of a program: 1 if it passes all tests of its problem, 0 if it fails one (section 2.3.5).

Every test runs in a fresh sandbox, and the verdict is reached outside of it:

* A test with standard input gives the program its input. The output is compared here, or judged by
  the problem's checker in a sandbox without the program. The expected output never enters the
  program's sandbox.
* A call is made in a sandbox, and its result is compared here.
* A check (asserts about a function) is split. The program answers calls in one sandbox, and the
  answers, plain data, are judged elsewhere: here, if the asserts compare them with literals
  (``literals``), otherwise by the asserts in a second sandbox, without the program
  (``check_driver``).

If the sandbox itself fails, the run is repeated once. After that ``InfrastructureError`` is raised,
because nothing is known about the response. ``docs/code_rewards.md`` says what can be forged.
"""

import json
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kimi_core.config import SandboxConfig
from kimi_core.reward.base import InfrastructureError
from kimi_core.reward.code import check_driver
from kimi_core.reward.code.literals import call_of, gives, gives_json, literal_cases
from kimi_core.reward.code.output import same_output
from kimi_core.reward.code.problem import CallTest, CheckTest, IoTest, Problem, problem_of
from kimi_core.reward.code.program import extract_program
from kimi_core.reward.code.runner import (
    Executable,
    Run,
    Runner,
    last_words,
    limits_of,
    open_sandbox,
)
from kimi_core.sandbox import Limits, Result, Status
from kimi_core.types import Prompt

DRIVER = Path(check_driver.__file__).read_text()

ANSWER_BYTES = 1 << 20
"""Limit on all answers to one check together, and on the calls that one check makes."""

ROUNDS = 64
"""Most times that a check runs whose calls depend on the answers."""

PRELUDE = """
from typing import *
import bisect, collections, copy, functools, heapq, itertools, math, operator, random, re, string
import sys
from bisect import bisect_left, bisect_right, insort
from collections import Counter, OrderedDict, defaultdict, deque
from functools import cache, lru_cache, reduce
from heapq import heapify, heappop, heappush
from itertools import accumulate, combinations, permutations, product
from math import ceil, comb, floor, gcd, inf, isqrt, log, sqrt
"""
"""What the sites that ask for ``class Solution`` import before a solution."""

JUDGE_CHECKER = """
import runpy, sys
sys.argv = ["checker.py", "input", "expected", "output"]
runpy.run_path("checker.py", run_name="__main__")
"""


@dataclass(frozen=True)
class CodeVerdict:
    """How a program did; ``test`` is the index of the first test that it failed."""

    status: Status
    test: int | None = None
    detail: str = ""

    @property
    def passed(self) -> bool:
        return self.status is Status.OK


class CodeReward:
    """A reward function over a sandbox; thread-safe.

    Args:
        run: runs one program in a fresh sandbox.
        limits: limits of each run of the response's program.
        close: ends the sandbox.
    """

    def __init__(
        self, run: Run, limits: Limits | None = None, close: Callable[[], None] = lambda: None
    ) -> None:
        self.close = close
        self._runner = Runner(run)
        self._limits = limits or Limits()
        self._first_calls: dict[CheckTest, list[Any]] = {}
        self._lock = threading.Lock()
        self.counts: Counter[Status] = Counter()
        """Number of verdicts by status; INFRA counts those that could not be reached."""

    def __call__(self, prompt: Prompt, response: str) -> float:
        """1.0 if the response passes all tests, otherwise 0.0.

        Raises:
            InfrastructureError: the sandbox failed twice, or the check could not run.
            ValueError: the prompt has no problem, or a broken one.
        """
        return float(self.judge(prompt, response).passed)

    def judge(self, prompt: Prompt, response: str) -> CodeVerdict:
        """The verdict on a response: that of the first test that it fails. Raises as
        ``__call__``."""
        problem = problem_of(prompt)
        try:
            program = extract_program(problem, response)
            # Text with a lone surrogate cannot be handed on.
            verdict = self._judge(problem, program.encode(errors="replace").decode())
        except InfrastructureError:
            self._count(Status.INFRA)
            raise
        except ValueError as error:
            raise ValueError(f"Prompt {prompt.id}: {error}") from None
        self._count(verdict.status)
        return verdict

    def _count(self, status: Status) -> None:
        with self._lock:
            self.counts[status] += 1

    def _judge(self, problem: Problem, program: str) -> CodeVerdict:
        built = self._runner.build(program, problem.language)
        if isinstance(built, Result):
            return CodeVerdict(built.status, detail=f"does not compile: {last_words(built)}")
        for index, test in enumerate(problem.tests):
            if isinstance(test, IoTest):
                verdict = self._compare_output(built, test)
            elif isinstance(test, CallTest):
                verdict = self._call(program, test)
            else:
                verdict = self._carry_out(program, test)
            if not verdict.passed:
                return replace(verdict, test=index)
        return CodeVerdict(Status.OK)

    def _compare_output(self, program: Executable, test: IoTest) -> CodeVerdict:
        expected = test.stdout.encode()
        room = max(self._limits.output_bytes, 2 * len(expected))
        limits = replace(self._limits, output_bytes=room)
        done = self._runner.execute(program, stdin=test.stdin.encode(), limits=limits)
        if done.status is not Status.OK:
            return CodeVerdict(done.status, detail=last_words(done))
        if test.checker:
            passed = self._checker_accepts(test, done.stdout)
        else:
            passed = same_output(done.stdout, expected, test.tolerance)
        if passed:
            return CodeVerdict(Status.OK)
        return CodeVerdict(Status.WRONG, detail=f"printed {done.stdout[:80]!r}")

    def _checker_accepts(self, test: IoTest, output: bytes) -> bool:
        """Run the problem's checker on an output, in a sandbox without the response.

        An output that ends the checker otherwise than by an exit status is wrong.

        Raises:
            InfrastructureError: the checker cannot be run even on the expected output.
        """
        done = self._check_output(test, output)
        if done.status in (Status.OK, Status.RUNTIME):
            return done.status is Status.OK and accepted_by(done.stdout)
        healthy = self._check_output(test, test.stdout.encode())
        if healthy.status in (Status.OK, Status.RUNTIME):
            return False
        raise InfrastructureError(f"A checker ended with {healthy.status}: {last_words(healthy)}")

    def _check_output(self, test: IoTest, output: bytes) -> Result:
        files = {
            "checker.py": test.checker.encode(),
            "input": test.stdin.encode(),
            "expected": test.stdout.encode(),
            "output": output,
        }
        return self._runner.run(JUDGE_CHECKER, files=files, limits=self._limits)

    def _call(self, program: str, test: CallTest) -> CodeVerdict:
        answers = self._answers(program, test, [call_of(test)])
        if isinstance(answers, CodeVerdict):
            return answers
        expected = json.loads(test.result)
        allowed = [expected]
        if test.wrapped and isinstance(expected, list) and len(expected) == 1:
            allowed += expected
        if any(gives_json(answers[0], one) for one in allowed):
            return CodeVerdict(Status.OK)
        return CodeVerdict(Status.WRONG, detail=f"{expected!r:.80} expected")

    def _carry_out(self, program: str, test: CheckTest) -> CodeVerdict:
        """Make the check's calls, then judge the answers.

        The answers are judged here if the check only compares them with literals. Otherwise the
        check runs, and runs once more if it then makes other calls.
        """
        if cases := literal_cases(test):
            answers = self._answers(program, test, [call for call, _ in cases])
            if isinstance(answers, CodeVerdict):
                return answers
            for answer, (_, expected) in zip(answers, cases, strict=True):
                if not gives(answer, expected):
                    return CodeVerdict(Status.WRONG, detail=f"{expected!r:.80} expected")
            return CodeVerdict(Status.OK)
        calls = self._calls_of(test)
        for _ in range(ROUNDS):
            answers = self._answers(program, test, calls)
            if isinstance(answers, CodeVerdict):
                return answers
            report = self._ask(test, calls, answers)
            if isinstance(report, CodeVerdict):
                return report
            if report["verdict"] == "pass":
                return CodeVerdict(Status.OK)
            if report["verdict"] == "fail":
                return CodeVerdict(Status.WRONG, detail=report["fault"])
            calls = report["calls"]
        raise InfrastructureError(
            f"The check of {test.entry_point} makes other calls with each answer; after {ROUNDS} "
            "rounds there is no verdict"
        )

    def _answers(
        self, program: str, test: CheckTest | CallTest, calls: list[Any]
    ) -> list[str] | CodeVerdict:
        """A line of JSON for each call, or the verdict on a program that failed before."""
        given = {"program": program, "entry_point": test.entry_point, "calls": calls}
        given["prelude"] = PRELUDE if isinstance(test, CallTest) else ""
        limits = replace(self._limits, output_bytes=ANSWER_BYTES)
        done = self._runner.run(DRIVER, stdin=_message("candidate", given), limits=limits)
        if done.status is not Status.OK:
            return CodeVerdict(done.status, detail=last_words(done))
        answers = done.stdout.decode(errors="replace").split("\n")[:-1]
        if len(answers) < len(calls):
            ended = f"ended after {len(answers)} of {len(calls)} calls"
            return CodeVerdict(Status.RUNTIME, detail=ended)
        return answers[: len(calls)]

    def _calls_of(self, test: CheckTest) -> list[Any]:
        """The calls of a check that are known without any answer; found once."""
        if test not in self._first_calls:
            report = self._ask(test, [], [])
            assert isinstance(report, dict), "a check without answers has a report"
            self._first_calls[test] = report["calls"]
        return self._first_calls[test]

    def _ask(
        self, test: CheckTest, calls: list[Any], answers: list[str]
    ) -> dict[str, Any] | CodeVerdict:
        """Run the check with the known answers, in a sandbox without the response.

        A check that the sandbox ends twice, and not without answers, was ended by the answers:
        ``range(f(2))`` with 10¹² for ``f(2)`` is such a case. The response is then wrong.
        """
        given = {
            "setup": test.setup,
            "check": test.check,
            "entry_point": test.entry_point,
            "calls": calls,
            "answers": answers,
        }
        limits = Limits(output_bytes=ANSWER_BYTES)
        done = self._runner.run(DRIVER, stdin=_message("judge", given), limits=limits)
        if calls and done.status is not Status.OK:
            done = self._runner.run(DRIVER, stdin=_message("judge", given), limits=limits)
            if done.status is not Status.OK:
                detail = f"its answers made the check end with {done.status}"
                return CodeVerdict(Status.WRONG, detail=detail)
        if not calls and done.status in (Status.RUNTIME, Status.OUTPUT, Status.MEMORY):
            raise ValueError(f"the check of {test.entry_point} is broken: {last_words(done)}")
        if done.status is not Status.OK:
            raise InfrastructureError(
                f"The check of {test.entry_point} ended with {done.status}: {last_words(done)}"
            )
        report: dict[str, Any] = json.loads(done.stdout)
        if report["verdict"] == "broken":
            raise ValueError(f"the check of {test.entry_point} is broken: {report['fault']}")
        return report


def accepted_by(printed: bytes) -> bool:
    """Whether a checker that exited with 0 accepts: the last word that it printed is no number, or
    one above 0.

    >>> accepted_by(b"1\\n"), accepted_by(b"0"), accepted_by(b"ok 3 lines"), accepted_by(b"")
    (True, False, True, True)
    """
    words = printed.split()
    try:
        return not words or float(words[-1]) > 0
    except ValueError:
        return True


def _message(mode: str, given: dict[str, Any]) -> bytes:
    return json.dumps({"mode": mode, **given}).encode()


def code_reward(config: SandboxConfig) -> CodeReward:
    """The reward `code`, with the sandbox that the config names.

    Raises:
        ValueError: programs cannot be run safely here, or the service does not answer.
    """
    sandbox = open_sandbox(config)
    return CodeReward(sandbox.run, limits_of(config), sandbox.close)
