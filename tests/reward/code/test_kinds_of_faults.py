"""Programs, checks and outputs by the kinds of their faults: each verdict is that of plain Python,
or of the judges that the problems come from."""

import ast
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kimi_core.reward.code.literals import literal_cases
from kimi_core.reward.code.output import same_output
from kimi_core.reward.code.problem import (
    CallTest,
    CheckTest,
    IoTest,
    Problem,
    check_sources,
    problem_of,
)
from kimi_core.reward.code.program import extract_program
from kimi_core.reward.code.reward import CodeReward
from kimi_core.sandbox import Limits, Pool, SandboxUnavailable, Status
from kimi_core.types import Prompt

PAIRS = [json.loads(line) for line in Path(__file__).with_name("output_pairs.jsonl").open()]


def problem(*tests: dict, **tags: str) -> Prompt:
    return Prompt(4, "?", "", tags={"tests": json.dumps(tests), **tags})


def check(source: str, entry_point: str = "f", setup: str = "") -> Prompt:
    return problem({"check": source, "entry_point": entry_point, "setup": setup})


class TestOutputs:
    @pytest.mark.parametrize("pair", PAIRS, ids=lambda p: f"{p['output']!r} for {p['expected']!r}")
    def test_pair(self, pair):
        found = same_output(pair["output"].encode(), pair["expected"].encode())
        assert found is pair["right"]

    def test_what_all_four_judges_say_is_said_here(self):
        """LiveCodeBench, SandboxFusion, open-r1 and verl's prime_code."""
        votes = [pair for pair in PAIRS if "accepted_by" in pair]
        assert len(PAIRS) >= 72 and len(votes) >= 45
        assert all(pair["right"] for pair in votes if pair["accepted_by"] == 4)
        assert not any(pair["right"] for pair in votes if pair["accepted_by"] == 0)

    @pytest.mark.parametrize(
        ("output", "tolerance", "right"),
        [
            ("0.3333", 1e-3, True),
            ("0.3343", 1e-3, True),
            ("0.3353", 1e-3, False),
            ("nan", 0.5, False),
            ("1e400", 0.5, False),
            ("", 0.5, False),
            ("0.3333 0", 1e-3, False),
        ],
    )
    def test_within_a_tolerance(self, output, tolerance, right):
        assert same_output(output.encode(), b"0.33333", tolerance) is right

    def test_a_tolerance_of_a_test(self, judge):
        test = {"stdin": "", "stdout": "0.666666", "tolerance": 1e-4}
        assert judge(problem(test), "print(2/3)").passed
        assert not judge(problem(test), "print(0.67)").passed

    @pytest.mark.parametrize("tolerance", [-1, 1, "x", True, None])
    def test_a_tolerance_that_cannot_be(self, tolerance):
        with pytest.raises(ValueError, match="tolerance"):
            problem_of(problem({"stdin": "", "stdout": "", "tolerance": tolerance}))

    CHECKER = """
import sys
given, expected, output = (open(name).read().split() for name in sys.argv[1:])
a, b = map(int, output)
print(int(a + b == int(given[0]) and a != b))
"""

    @pytest.mark.parametrize(
        ("program", "passed"),
        [
            ("print(1, 6)", True),
            ("print(4, 3)", True),
            ("print(1, 1)", False),
            ("print('x y')", False),
            ("print(1)", False),
            ("print()", False),
        ],
    )
    def test_a_checker_judges_problems_with_several_right_outputs(self, judge, program, passed):
        test = {"stdin": "7", "stdout": "3 4", "checker": self.CHECKER}
        assert judge(problem(test), program).passed is passed


FENCES = {
    "comment behind the language": "```python # solution\nprint(1)\n```",
    "attributes": "```{.python}\nprint(1)\n```",
    "version": "```Python 3\nprint(1)\n```",
    "title": '```python title="a.py"\nprint(1)\n```',
    "quoted": "> ```python\n> print(1)\n> ```",
    "text before the fence": "Here it is: ```python\nprint(1)\n```",
    "closed behind code": "```python\nprint(1)```\nThat is it.",
    "tildes": "~~~py\nprint(1)\n~~~",
    "longer fence": "````python\nprint(1)\n````",
    "indented in a list": "1. So:\n   ```python\n   print(1)\n   ```",
    "never closed": "```python\nprint(1)\n",
    "empty block behind": "```python\nprint(1)\n```\n```python\n```",
    "output behind": "```python\nprint(1)\n```\nIt prints:\n```\n1\n```",
    "in the thoughts and after them": "<think>```python\nprint(input())\n```</think>\n"
    "```python\nprint(1)\n```",
    "on the line of the thoughts' end": "<think>\n```python\nprint(input())\n```</think>```python\n"
    "print(1)\n```",
    "in the thoughts alone": "<think>```python\nprint(1)\n```</think> That is it.",
    "inline fence before": "Use ```print``` so:\n```python\nprint(1)\n```",
}


class TestPrograms:
    @pytest.mark.parametrize("response", FENCES.values(), ids=FENCES)
    def test_fences(self, response):
        assert extract_program(Problem(()), response).strip() == "print(1)"

    def test_a_fence_in_a_docstring_closes_nothing(self):
        code = 'def f():\n    """\n    ```\n    f()\n    ```\n    """\n'
        assert extract_program(Problem(()), f"```python\n{code}```") == code

    def test_a_continuation_after_thoughts(self):
        asked = Problem((CallTest("f", "[2]", "2"),), prefix="def f(x):\n")
        response = "<think>def f(x): return 7</think>    return x\n\nprint(f(2))"
        assert extract_program(asked, response) == "def f(x):\n    return x\n\n"

    def test_the_last_block_that_defines_the_function(self):
        response = "```python\ndef f(x):\n    return x\n```\nFor example:\n```python\nf(2)\n```"
        asked = Problem((CallTest("f", "[2]", "2"),))
        assert extract_program(asked, response) == "def f(x):\n    return x\n"

    def test_the_last_block_that_reads_input(self):
        response = "```python\nprint(input())\n```\nAnd a test:\n```python\nassert g(2)\n```"
        asked = Problem((IoTest("2", "2"),))
        assert extract_program(asked, response) == "print(input())\n"

    @pytest.mark.parametrize("name", ["python3", "Python", "py", "pypy3", "python 3.11"])
    def test_names_of_python(self, name):
        assert problem_of(problem({"stdin": "", "stdout": ""}, language=name)).language == "python"

    @pytest.mark.parametrize("name", ["cpp", "C++17", "c++", "cxx", "cc"])
    def test_names_of_cpp(self, name):
        assert problem_of(problem({"stdin": "", "stdout": ""}, language=name)).language == "c++"


SOLUTION = """class Solution:
    def twoSum(self, nums: List[int], target: int) -> List[int]:
        seen = {}
        for i, n in enumerate(nums):
            if target - n in seen:
                return RESULT
            seen[n] = i
"""


TWO_SUM = {"entry_point": "twoSum", "args": [[2, 7, 11], 9], "result": [0, 1]}


class TestCalls:
    @pytest.mark.parametrize(
        ("result", "passed"),
        [
            ("[seen[target - n], i]", True),
            ("(seen[target - n], i)", True),
            ("[seen[target - n], float(i)]", True),
            ("[i, seen[target - n]]", False),
            ("{0, 1}", False),
            ("'[0, 1]'", False),
            ("None", False),
            ("[0, 1, 1]", False),
        ],
    )
    def test_a_method_of_class_solution(self, judge, result, passed):
        assert judge(problem(TWO_SUM), SOLUTION.replace("RESULT", result)).passed is passed

    def test_a_plain_function_will_do(self, judge):
        assert judge(problem(TWO_SUM), "def twoSum(a, b): return [0, 1]").passed

    def test_a_result_in_a_list_of_one(self, judge):
        test = {"entry_point": "f", "args": [3], "result": [9], "wrapped": True}
        assert judge(problem(test), "def f(x): return x * x").passed
        assert not judge(problem(test), "def f(x): return x + x").passed

    def test_objects_are_compared_as_json(self, judge):
        test = {"entry_point": "f", "args": [], "result": {"1": [2, {"a": None}]}}
        assert judge(problem(test), "def f(): return {1: (2, {'a': None})}").passed
        assert not judge(problem(test), "def f(): return {1: (2, {'a': 0})}").passed

    @pytest.mark.parametrize("line", ['{"value": {"dict": [1]}}', '{"value": {"dict": 3}}', "[]"])
    def test_forged_answers_are_wrong_and_raise_nothing(self, judge, line):
        test = {"entry_point": "f", "args": [], "result": {"a": 1}}
        forged = f"import os\nos.write(3, b'x') if 0 else print({line!r})\ndef f(): pass"
        assert not judge(problem(test), forged).passed


RETURNED = {
    "range": ("range(x)", "f(3) == range(3) and list(f(3)) == [0, 1, 2] and f(3) != [0, 1, 2]"),
    "map": ("map(str, range(x))", "list(f(3)) == ['0', '1', '2']"),
    "generator": ("(i for i in range(x))", "sum(f(4)) == 6 and f(4) != [0, 1, 2, 3]"),
    "endless generator": ("__import__('itertools').count(x)", "next(f(5)) == 5"),
    "zip": ("zip('ab', range(x))", "dict(f(2)) == {'a': 0, 'b': 1}"),
    "keys": ("{x: 1, 2: 3}.keys()", "f(1) == {1, 2} and sorted(f(1)) == [1, 2]"),
    "values": ("{x: 1, 2: 3}.values()", "list(f(1)) == [1, 3]"),
    "items": ("{x: 1}.items()", "dict(f(4)) == {4: 1}"),
    "deque": ("__import__('collections').deque([x])", "f(4)[0] == 4 and f(4) != [4]"),
    "Decimal": ("__import__('decimal').Decimal(x) / 4", "f(1) == 0.25 and str(f(1)) == '0.25'"),
    "Fraction": ("__import__('fractions').Fraction(x, 6)", "f(2).denominator == 3"),
    "date": ("__import__('datetime').date(2026, 1, x)", "f(5).weekday() == 0"),
    "datetime": ("__import__('datetime').datetime(2026, 1, x, 7)", "f(5).hour == 7"),
    "timedelta": ("__import__('datetime').timedelta(x)", "f(2).total_seconds() == 172800"),
    "factorial": ("__import__('math').factorial(x)", "f(2000) % 2003 == f(2000) % 2003 > 0"),
    "Counter": ("__import__('collections').Counter(['a'] * x)", "f(2) == {'a': 2}"),
    "bytearray": ("bytearray(x)", "f(2) == b'\\0\\0'"),
}


class TestChecks:
    @pytest.mark.parametrize(("value", "asserted"), RETURNED.values(), ids=RETURNED)
    def test_values_that_functions_return(self, judge, value, asserted):
        program = f"def f(x):\n    return {value}"
        assert judge(check(f"assert {asserted}"), program).passed
        assert not judge(check(f"assert not ({asserted})"), program).passed

    @pytest.mark.parametrize(
        ("value", "passed"),
        [
            ("__import__('decimal').Decimal('2')", True),
            ("__import__('fractions').Fraction(2)", True),
            ("__import__('fractions').Fraction(10**5000, 10**4999 * 5)", True),
            ("__import__('fractions').Fraction(10**5000 + 1, 10**5000)", False),
            ("2 + 0j", True),
            ("__import__('decimal').Decimal('2.5')", False),
            ("__import__('decimal').Decimal('sNaN')", False),
            ("10**5000", False),
        ],
    )
    def test_a_literal_and_numbers_of_other_types(self, judge, value, passed):
        assert judge(check("assert f(1) == 2"), f"def f(x):\n    return {value}").passed is passed

    def test_an_expected_number_of_many_digits(self, judge):
        source = "assert f(1) == 10**5000"
        assert judge(check(source), "def f(x): return 10**5000").passed
        assert not judge(check(source), "def f(x): return 10**5000 + 1").passed

    def test_a_digit_string_beyond_pythons_limit_in_the_check(self, judge):
        source = "assert f(1) == 1" + "0" * 5000
        assert judge(check(source), "def f(x): return 10**5000").passed
        assert not judge(check(source), "def f(x): return 10**4999").passed

    def test_calls_that_follow_each_other(self, judge):
        source = "x = 1\nfor i in range(12):\n    x = f(x)\nassert x == 4096"
        assert judge(check(source), "def f(x): return 2 * x").passed
        assert not judge(check(source), "def f(x): return 2 * x + (x == 64)").passed

    UNITTEST = """
import unittest

class TestF(unittest.TestCase):
    def test_small(self):
        self.assertEqual(f(1), 2)
        self.assertTrue(f(2) > 3, f"got {f(2)}")

    def test_raises(self):
        with self.assertRaises(ValueError):
            f(-1)

if __name__ == "__main__":
    unittest.main()
"""

    @pytest.mark.parametrize(
        ("body", "passed"),
        [
            ("if x < 0: raise ValueError\n    return 2 * x", True),
            ("return 2 * x", False),
            ("if x < 0: raise ValueError\n    return 2", False),
            ("if x < 0: raise SystemExit\n    return 2 * x", False),
        ],
    )
    def test_unittest(self, judge, body, passed):
        assert judge(check(self.UNITTEST), f"def f(x):\n    {body}").passed is passed

    @pytest.mark.parametrize(
        "source",
        [
            UNITTEST.partition("if __name__")[0],
            "from solution import f\n\ndef test_small():\n    assert f(2) == 4\n\n"
            "def test_raises():\n    try:\n        f(-1)\n    except ValueError:\n        return\n"
            "    assert False",
        ],
        ids=["unittest", "pytest"],
    )
    def test_tests_that_a_runner_would_find(self, judge, source):
        right = "def f(x):\n    if x < 0: raise ValueError\n    return 2 * x"
        assert judge(check(source), right).passed
        assert not judge(check(source), "def f(x): return 2 * x").passed
        assert not judge(check(source), "import unittest\ndef f(x): raise unittest.SkipTest").passed

    @pytest.mark.parametrize(
        ("test", "said"),
        [
            ({"check": "assert f(1) ==", "entry_point": "f"}, '"check" is not Python'),
            ({"check": "assert 1", "entry_point": "f"}, "\"check\" never calls 'f'"),
            ({"check": "assert f(1)", "setup": "def (", "entry_point": "f"}, '"setup" is not'),
            ({"stdin": "", "stdout": "", "checker": "def ("}, "the checker is not Python"),
        ],
    )
    def test_sources_that_cannot_run_are_refused_before_a_run(self, test, said):
        with pytest.raises(ValueError, match=f"Prompt 4: {said}"):
            check_sources(problem(test))

    def test_sources_that_can_run_are_not_refused(self):
        long = "assert f(1) == 1" + "0" * 5000
        check_sources(problem({"check": long, "entry_point": "f"}))
        check_sources(problem({"check": "def check(candidate): pass", "entry_point": "f"}))

    @pytest.mark.parametrize(("ending", "passed"), [("f(2) != 4", True), ("f(2) == 4", False)])
    def test_a_check_that_ends_by_exit(self, judge, ending, passed):
        source = f"import sys\nsys.exit({ending})"
        assert judge(check(source), "def f(x): return 2 * x").passed is passed


@pytest.fixture(scope="module")
def pool():
    try:
        pool = Pool(8)
    except SandboxUnavailable as error:
        pytest.skip(f"no sandbox on this machine: {error}")
    with pool:
        yield pool


@pytest.fixture(scope="module")
def numpy(pool):
    if b"ModuleNotFoundError" in pool.run("import numpy").stderr:
        pytest.skip("numpy has another Python than the sandbox, or lies in a closed folder")


class TestSandbox:
    def test_a_number_of_any_length_is_printed_and_read(self, pool):
        test = {"stdin": "9" * 5000, "stdout": "1" + "0" * 5000}
        assert CodeReward(pool.run).judge(problem(test), "print(int(input()) + 1)").passed

    @pytest.mark.nightly
    def test_waiting_for_a_core_is_not_held_against_a_program(self, pool):
        """Eight programs of 1 CPU-second on two cores take 4 s, with a wall-clock limit of 1.5."""
        program = "import time\nwhile time.process_time() < 1: pass"
        limits = Limits(wall_s=1.5, cpu_s=3)
        with ThreadPoolExecutor(8) as threads:
            runs = [threads.submit(pool.run, program, limits=limits) for _ in range(8)]
            assert {run.result().status for run in runs} == {Status.OK}

    def test_the_waits_of_ended_processes_stay_uncounted(self, pool):
        """Three children on one core, 0.4 CPU-seconds each: 0.8 of 1.9 s are waits for the core."""
        program = """
import os, time
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
children = []
for _ in range(3):
    if not (child := os.fork()):
        while time.process_time() < 0.4: pass
        os._exit(0)
    children.append(child)
for child in children: os.waitpid(child, 0)
time.sleep(0.7)
"""
        done = pool.run(program, limits=Limits(wall_s=1.6, cpu_s=3))
        assert (done.status, done.detail) == (Status.OK, "")
        assert done.wall_s > 1.8

    def test_waiting_for_something_else_is(self, pool):
        done = pool.run("import time; time.sleep(60)", limits=Limits(wall_s=0.5))
        assert done.status is Status.TIME and done.wall_s < 10

    def test_numpy_is_there_for_programs_and_checks(self, pool, numpy):
        done = pool.run("import numpy as np; print(np.ones((3, 3)).sum())")
        assert done.stdout == b"9.0\n"

    @pytest.mark.parametrize(("first", "passed"), [("seen[target - n]", True), ("i", False)])
    def test_a_result_with_numbers_of_numpy(self, pool, numpy, first, passed):
        program = SOLUTION.replace("RESULT", f"[__import__('numpy').int64({first}), i]")
        assert CodeReward(pool.run).judge(problem(TWO_SUM), program).passed is passed

    def test_a_check_with_numpy(self, pool, numpy):
        source = "import numpy as np\nnp.testing.assert_allclose(f(3), np.arange(3) / 2)"
        reward = CodeReward(pool.run)
        assert reward.judge(check(source), "def f(x): return [i / 2 for i in range(x)]").passed
        program = "import numpy as np\ndef f(x): return np.arange(x) / 2"
        assert reward.judge(check(source), program).passed
        assert not reward.judge(check(source), "def f(x): return [0, 1, 2]").passed


def test_threads_take_turns_at_the_parser(monkeypatch):
    """CPython 3.11 raises SystemError if the conversions of two threads meet."""
    inside, most, parse = [], [], ast.parse

    def watched(source):
        inside.append(source)
        most.append(len(inside))
        time.sleep(0.01)
        inside.remove(source)
        return parse(source)

    monkeypatch.setattr(ast, "parse", watched)
    tests = [CheckTest(f"assert f({i}, 'turns') == {i}", "f") for i in range(16)]
    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(literal_cases, tests))
    assert len(most) == 16 and set(most) == {1}
