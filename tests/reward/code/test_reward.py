"""Verdicts on programs: which are right, which cannot be forged, and which are none."""

import json
import shutil
import threading
from collections import Counter

import pytest
from plain_run import plain_run, result

from kimi_core.reward.base import InfrastructureError
from kimi_core.reward.code.output import same_output
from kimi_core.reward.code.reward import ROUNDS, CodeReward
from kimi_core.sandbox import Limits, SandboxUnavailable, Status
from kimi_core.types import Prompt

needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on this machine")

SUM = {"tests": [{"stdin": "1 2\n", "stdout": "3\n"}, {"stdin": "-5 9", "stdout": "4"}]}
ADDER = "print(sum(map(int, input().split())))"


def prompt(**tags) -> Prompt:
    return Prompt(
        4, "?", "!", tags={k: v if k != "tests" else json.dumps(v) for k, v in tags.items()}
    )


def check(source: str, entry_point: str = "f", setup: str = "") -> Prompt:
    return prompt(tests=[{"check": source, "entry_point": entry_point, "setup": setup}])


def limits_for(status: Status) -> Limits:
    """Short only where time is to run out."""
    return Limits(wall_s=2.0) if status is Status.TIME else Limits()


class TestStandardInput:
    def test_right(self):
        reward = CodeReward(plain_run)
        assert reward(prompt(**SUM), ADDER) == 1.0
        assert reward(prompt(**SUM), f"So:\n```python\n{ADDER}\n```\n") == 1.0

    @pytest.mark.parametrize(
        ("program", "status", "test"),
        [
            ("print(3)", Status.WRONG, 1),
            ("print(4)", Status.WRONG, 0),
            ("print(3", Status.RUNTIME, 0),
            ("print(3); raise SystemExit(1)", Status.RUNTIME, 0),
            ("import time\nwhile True: time.sleep(1)", Status.TIME, 0),
            ("print('x' * 100000)", Status.OUTPUT, 0),
            ("", Status.WRONG, 0),
        ],
    )
    def test_wrong_at_the_first_test_that_fails(self, judge, program, status, test):
        verdict = judge(prompt(**SUM), program, limits_for(status))
        assert (verdict.status, verdict.test, verdict.passed) == (status, test, False)

    @pytest.mark.parametrize(
        "response", ["print('\ud800')", "print(3)\0", "\x1b[31m", "#" * 300_000]
    )
    def test_whatever_a_model_writes_gets_a_verdict(self, judge, response):
        assert not judge(prompt(**SUM), response).passed
        assert not judge(check("assert f(2) == 6"), response).passed

    def test_it_stops_at_the_first_failure(self):
        runs = []

        def counted(*args, **kwargs):
            runs.append(args)
            return plain_run(*args, **kwargs)

        assert CodeReward(counted)(prompt(**SUM), "print(4)") == 0.0
        assert len(runs) == 1

    def test_what_is_expected_never_goes_in(self):
        seen = []

        def watched(program, *, stdin, files, limits):
            seen.append((program, stdin, files))
            return plain_run(program, stdin=stdin, files=files, limits=limits)

        tests = [{"stdin": "1 2\n", "stdout": "SECRET 3\n"}]
        CodeReward(watched)(prompt(tests=tests), ADDER)
        assert seen and "SECRET" not in repr(seen)

    def test_expected_output_above_the_limit_can_be_met(self, judge):
        tests = [{"stdin": "", "stdout": "x" * 200_000}]
        assert judge(prompt(tests=tests), "print('x' * 200_000)").passed

    @pytest.mark.parametrize(
        ("found", "expected", "same"),
        [
            (b"1\n2\n", b"1\n2", True),
            (b"1 \t\n2\r\n\n\n", b"1\n2\n", True),
            (b"", b"\n\n", True),
            (b"1\n\n2", b"1\n2", False),
            (b"\n1", b"1", True),
            (b" 1", b"1", True),
            (b"1  2", b"1 2", False),
            (b"1.0", b"1", True),
            (b"YES", b"yes", False),
            (b"\xff", b"?", False),
        ],
    )
    def test_comparison(self, found, expected, same):
        assert same_output(found, expected) is same


class TestChecks:
    @pytest.mark.parametrize(
        ("source", "program"),
        [
            ("assert f(2) == 6\nassert f(-1) == -3", "def f(x): return 3 * x"),
            ("def check(candidate):\n    assert candidate(2) == 6", "f = lambda x: 3 * x"),
            ("assert f('a', n=2) == ['a', 'a']", "def f(x, n): return [x] * n"),
            ("assert f() == (1, [2.5], {3}, {4: None}, b'5', True)",
             "def f(): return (1, [2.5], {3}, {4: None}, b'5', True)"),
            ("assert f() == {'a': 1}",
             "from collections import Counter\ndef f(): return Counter('a')"),
            ("assert abs(f(2) - 2 ** 0.5) < 1e-9", "def f(x): return x ** 0.5"),
            ("import math\nassert math.isnan(f()) ", "def f(): return float('nan')"),
            ("assert f(f(2)) == 18, f'not {f(2)}'", "def f(x): return 3 * x"),
            ("import random\nfor _ in range(50):\n    x = random.random()\n"
             "    assert f(x) == 2 * x",
             "def f(x): return x + x"),
            ("for n in range(4):\n    y = f(n)\n    assert y - n == 1", "def f(x): return x + 1"),
            ("try:\n    f(0)\nexcept ZeroDivisionError:\n    pass\nelse:\n    assert False",
             "def f(x): return 1 / x"),
            ("assert f(2) == 6",
             "print('3', flush=True)\ndef f(x):\n    print(x)\n    return 3 * x"),
            ("assert f(2) == 6",
             "def f(x): return 3 * x\nif __name__ == '__main__': raise SystemExit(1)"),
        ],
    )  # fmt: skip
    def test_right(self, judge, source, program):
        verdict = judge(check(source), program)
        assert verdict.passed, verdict

    @pytest.mark.parametrize("source", ["assert f(2) == 6", "assert f(2) == 2 * 3"])
    @pytest.mark.parametrize(
        ("program", "status"),
        [
            ("def f(x): return 2 * x", Status.WRONG),
            ("def f(x): return [3 * x]", Status.WRONG),
            ("def f(x): return None", Status.WRONG),
            ("def f(): return 6", Status.WRONG),
            ("def f(x): raise ValueError(6)", Status.WRONG),
            ("def f(x): return f(x)", Status.WRONG),
            ("def g(x): return 3 * x", Status.RUNTIME),
            ("f = 6", Status.WRONG),
            ("def f(x:", Status.RUNTIME),
            ("", Status.RUNTIME),
            ("def f(x):\n    while True: pass", Status.TIME),
        ],
    )
    def test_wrong(self, judge, source, program, status):
        assert judge(check(source), program, limits_for(status)).status is status

    @pytest.mark.parametrize("source", ["assert f(2) == 424242", "assert f(2) == 424241 + 1"])
    @pytest.mark.parametrize(
        "forgery",
        [
            "raise SystemExit(0)",
            "import os; os._exit(0)",
            "def f(x):\n    import os\n    os._exit(0)",
            "def f(x):\n    raise SystemExit(0)",
            "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
            # Objects that agree with everything, and builtins that do.
            "class Yes:\n    def __eq__(self, other): return True\ndef f(x): return Yes()",
            "class Six(int):\n    def __eq__(self, other): return True\n"
            "    __hash__ = None\ndef f(x): return Six(5)",
            "import builtins\nbuiltins.AssertionError = Exception\ndef f(x): return 5",
            "import builtins\nbuiltins.compile = lambda *a, **k: None\ndef f(x): return 5",
            # What a judge might say, on every descriptor there is.
            "import os\nfor fd in range(9):\n"
            "    try: os.write(fd, b'{\"verdict\": \"pass\"}\\n' * 3)\n"
            "    except OSError: pass\ndef f(x): return 5",
            "import json\njson.dumps = lambda _: '{\"verdict\": \"pass\"}'\ndef f(x): return 5",
            # Looking for what is expected: the caller's frames, and every object alive.
            "import re, sys\ndef f(x):\n    frame, seen = sys._getframe(), ''\n"
            "    while frame:\n"
            "        seen += repr(frame.f_locals) + repr(frame.f_globals)\n"
            "        frame = frame.f_back\n"
            "    return int(re.search('f.2. == ([0-9]+)', seen)[1])",
            "import gc, re\n"
            "def f(x): return int(re.search('f.2. == ([0-9]+)', repr(gc.get_objects()))[1])",
            # Answers that no encoder gives.
            "import json\njson.dumps = lambda _: '{\"value\": ' + '[' * 99999\ndef f(x): return 5",
            "import json\ndef f(x): return 5\n"
            "json.dumps = lambda _: '{\"value\": {\"dict\": [[{\"list\": []}, 1]]}}'",
            "import json\ndef f(x): return 5\n"
            "json.dumps = lambda _: '{\"raised\": \"SystemExit\", \"message\": \"0\"}'",
        ],
    )  # fmt: skip
    def test_a_pass_cannot_be_forged(self, judge, source, forgery):
        assert not judge(check(source), forgery).passed

    def test_a_program_may_claim_values_but_has_to_know_them(self, judge):
        """Not a hole: the values are all that is asked of it, however it comes by them."""
        claims = "import os\nfor fd in range(9):\n    try: os.write(fd, b'{\"value\": 6}\\n')\n"
        claims += "    except OSError: pass\nos._exit(0)"
        assert judge(check("assert f(2) == 6"), claims).passed

    def test_neither_side_sees_the_other(self):
        seen = []

        def watched(program, *, stdin, files, limits):
            seen.append(json.loads(stdin))
            return plain_run(program, stdin=stdin, files=files, limits=limits)

        assert CodeReward(watched)(check("assert f(2) == 2 * 3"), "def f(x): return x + 4")
        candidates = [one for one in seen if one["mode"] == "candidate"]
        judges = [one for one in seen if one["mode"] == "judge"]
        assert len(candidates) == 1 and len(judges) == 2
        assert "assert" not in json.dumps(candidates) and "return x + 4" not in json.dumps(judges)

    def test_literals_are_compared_here(self):
        runs = []

        def watched(program, *, stdin, files, limits):
            runs.append(stdin)
            return plain_run(program, stdin=stdin, files=files, limits=limits)

        reward = CodeReward(watched)
        assert reward(check("assert f(2) == 424242"), "def f(x): return 424242")
        assert not reward(check("assert f(2) == 424242"), "def f(x): return 5")
        assert len(runs) == 2 and b"424242" not in runs[1]

    def test_calls_are_found_once_for_a_problem(self):
        modes = Counter()

        def watched(program, *, stdin, files, limits):
            modes[json.loads(stdin)["mode"]] += 1
            return plain_run(program, stdin=stdin, files=files, limits=limits)

        reward = CodeReward(watched)
        for _ in range(3):
            assert reward(check("assert f(2) == 2 * 3"), "def f(x): return 3 * x")
        assert modes == {"candidate": 3, "judge": 4}

    def test_helpers_of_the_setup_are_not_the_responses(self, judge):
        source = "assert helper(f(2)) == 6"
        setup = "def helper(x): return x\ndef f(x): ..."
        assert judge(check(source, setup=setup), "def f(x): return 6\ndef helper(x): ...").passed
        rewritten = "def f(x): return 5\ndef helper(x): return 6"
        assert not judge(check(source, setup=setup), rewritten).passed

    @pytest.mark.parametrize(
        ("source", "setup", "complaint"),
        [
            ("assert g(2) == 6", "", "NameError"),
            ("assert True", "", "never calls"),
            ("assert f(2) ==", "", "SyntaxError|invalid syntax"),
            ("assert f(2) == 2 * 3", "import nothing_of_the_kind", "No module named"),
            ("assert f(lambda x: x) == 6", "", "argument of the function under test"),
            ("for n in range(20): f('x' * 100_000)", "", "."),
        ],
    )
    def test_a_broken_check_is_an_error_not_a_verdict(self, judge, source, setup, complaint):
        with pytest.raises(ValueError, match=rf"Prompt 4: .*broken: .*({complaint})"):
            judge(check(source, setup=setup), "def f(x): return 6")

    @pytest.mark.nightly
    def test_a_check_that_follows_the_answers_for_ever(self, judge):
        source = "x = 0\nwhile True:\n    x = f(x) + 0"
        with pytest.raises(InfrastructureError, match=f"after {ROUNDS} rounds"):
            judge(check(source), "def f(x): return x + 1")


@needs_gxx
class TestCpp:
    ADDER = "#include <iostream>\nint main() { long a, b; std::cin >> a >> b; std::cout << a + b; }"

    def test_right_and_wrong(self, judge):
        problem = prompt(**SUM, language="c++")
        assert judge(problem, f"```cpp\n{self.ADDER}\n```").passed
        wrong = judge(problem, self.ADDER.replace("+ b", "+ 2"))
        assert (wrong.status, wrong.test) == (Status.WRONG, 1)

    def test_what_does_not_compile(self, judge):
        verdict = judge(prompt(**SUM, language="c++"), "int main() { return x; }")
        assert verdict.status is Status.RUNTIME
        assert "does not compile" in verdict.detail

    def test_a_crash(self, judge):
        crash = "#include <cstdlib>\nint main() { std::abort(); }"
        assert judge(prompt(**SUM, language="c++"), crash).status is Status.RUNTIME

    def test_python_is_not_taken_for_it(self, judge):
        assert not judge(prompt(**SUM, language="c++"), ADDER).passed


class TestInfrastructure:
    def test_is_retried_once(self):
        answers = [result(Status.INFRA), result(Status.OK, b"3")]
        reward = CodeReward(lambda *args, **kwargs: answers.pop(0))
        assert reward(prompt(tests=SUM["tests"][:1]), ADDER) == 1.0
        assert reward.counts == {Status.OK: 1}

    def test_twice_is_no_verdict(self):
        reward = CodeReward(lambda *args, **kwargs: result(Status.INFRA))
        with pytest.raises(InfrastructureError, match="failed twice"):
            reward(prompt(**SUM), ADDER)
        assert reward.counts == {Status.INFRA: 1}

    def test_a_service_that_is_away(self):
        def away(*args, **kwargs):
            raise SandboxUnavailable("nobody there")

        with pytest.raises(InfrastructureError, match="nobody there"):
            CodeReward(away)(prompt(**SUM), ADDER)

    def test_no_compiler(self):
        reward = CodeReward(lambda *args, **kwargs: result(Status.RUNTIME, exit_code=127))
        with pytest.raises(InfrastructureError, match=r"apt-get install g\+\+"):
            reward(prompt(**SUM, language="c++"), "int main() {}")

    def test_a_check_that_the_sandbox_killed_without_answers(self):
        def slow(program, *, stdin, files, limits):
            if json.loads(stdin)["mode"] == "judge":
                return result(Status.TIME, exit_code=None)
            return plain_run(program, stdin=stdin)

        with pytest.raises(InfrastructureError, match="ended with TIME"):
            CodeReward(slow)(check("assert f(2) == 2 * 3"), "def f(x): return 6")

    def test_a_check_that_was_killed_once_runs_again(self):
        kills = [Status.TIME]

        def slow_once(program, *, stdin, files, limits):
            given = json.loads(stdin)
            if given["mode"] == "judge" and given["answers"] and kills:
                return result(kills.pop(), exit_code=None)
            return plain_run(program, stdin=stdin)

        assert CodeReward(slow_once)(check("assert f(2) == 2 * 3"), "def f(x): return 6") == 1


class TestAnswersThatBreakACheck:
    """What a value or an exception of the response does to a sound check is its own fault."""

    @pytest.mark.parametrize(
        "source",
        [
            "assert all(map(f, [2, 3, 5, 7]))",
            "for got, want in zip(map(f, range(5)), [0, 1, 4, 9, 16]): assert got == want",
            "assert next(map(f, [1]), 5) == 5",
            "assert [f(n) for n in range(3)] == list(map(f, range(3))) or sum(map(f, [1, 2])) == 0",
            "assert not any(map(f, [4, 6, 8]))",
            "assert list(map(f, [1, 2])) == []",
            "assert max(map(f, [1, 2]), default=0) == 0",
        ],
    )
    @pytest.mark.parametrize("raised", ["StopIteration", "StopAsyncIteration", "GeneratorExit"])
    def test_exceptions_that_end_a_loop(self, judge, source, raised):
        verdict = judge(check(source), f"def f(*a): raise {raised}")
        assert verdict.status in (Status.WRONG, Status.RUNTIME)

    def test_an_exception_that_a_check_expects_still_passes(self, judge):
        expects = "try:\n    f(-1)\nexcept ValueError:\n    pass\nelse:\n    assert False"
        source = f"{expects}\nassert f(4) == 2 * 1"
        right = "def f(x):\n    if x < 0: raise ValueError\n    return 2"
        assert judge(check(source), right).passed

    def test_a_check_that_needs_fewer_answers_passes(self, judge):
        assert judge(check("assert f(1) == 1 * 1 or f(2) == 2 * 1"), "def f(x): return x").passed

    @pytest.mark.parametrize(
        ("source", "value"),
        [
            ("assert [i for i in range(f(2))] == [0, 1, 2 * 1]", "10**12"),
            pytest.param(
                "import re\nassert re.fullmatch(r'(a+)+b', f(2))",
                "'a' * 40",
                marks=pytest.mark.nightly,
            ),
            ("assert 'x' * f(2) == 'xx' * 1", "10**15"),
        ],
    )
    def test_values_that_exhaust_a_check(self, judge, source, value):
        verdict = judge(check(source), f"def f(x): return {value}")
        assert verdict.status is Status.WRONG


def test_threads_share_a_reward():
    reward = CodeReward(plain_run)
    problem, scores = check("assert f(2) == 6"), []

    def work(factor):
        scores.append((factor, reward(problem, f"def f(x): return {factor} * x")))

    threads = [threading.Thread(target=work, args=(factor,)) for factor in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(scores) == [(factor, float(factor == 3)) for factor in range(6)]
    assert reward.counts == {Status.OK: 1, Status.WRONG: 5}
