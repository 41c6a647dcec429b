"""Lines of published datasets, written by hand in their formats, are read as they are."""

import base64
import json
import pickle
import zlib

import pytest
from plain_run import plain_run

from kimi_core.prompts.code_datasets import as_problem
from kimi_core.prompts.jsonl import read_prompts
from kimi_core.reward.code.check_problems import check_problems
from kimi_core.reward.code.problem import CallTest, CheckTest, IoTest, problem_of
from kimi_core.reward.code.reward import CodeReward

ADDER = "a, b = map(int, input().split())\nprint(a + b)"
SOLUTION = "class Solution:\n    def add(self, a: List[int], b: int) -> List[int]:\n"
SOLUTION += "        return [x + b for x in a]\n"
IO = {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]}
FUNCTIONAL = {"fn_name": "add", "inputs": [[[1, 2], 3]], "outputs": [[4, 5]]}


def packed(tests: list) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


LINES = {
    "LiveCodeBench, stdin": (
        {
            "question_title": "Sum",
            "question_content": "Print a + b.",
            "starter_code": "",
            "public_test_cases": json.dumps(
                [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]
            ),
            "private_test_cases": packed(
                [{"input": "5 5\n", "output": "10\n", "testtype": "stdin"}]
            ),
            "metadata": "{}",
        },
        [IoTest("1 2\n", "3\n"), IoTest("5 5\n", "10\n")],
        ADDER,
    ),
    "LiveCodeBench, functional": (
        {
            "question_content": "Add b to all of a.",
            "starter_code": "class Solution:\n    def add(self, a, b):\n        ",
            "public_test_cases": json.dumps(
                [{"input": "[1, 2]\n3", "output": "[4, 5]", "testtype": "functional"}]
            ),
            "private_test_cases": "[]",
            "metadata": json.dumps({"func_name": "add"}),
        },
        [CallTest("add", "[[1, 2], 3]", "[4, 5]")],
        SOLUTION,
    ),
    "APPS and TACO, stdin": (
        {
            "question": "Print a + b.",
            "input_output": json.dumps(IO),
            "solutions": json.dumps([ADDER]),
            "starter_code": "",
            "difficulty": "interview",
        },
        [IoTest("1 2\n", "3\n"), IoTest("3 4\n", "7\n")],
        ADDER,
    ),
    "TACO, lists of lines": (
        {
            "question": "?",
            "input_output": json.dumps({"inputs": [["1 2"]], "outputs": [["3", ""]]}),
            "solutions": json.dumps([ADDER]),
        },
        [IoTest("1 2", "3\n")],
        ADDER,
    ),
    "APPS, functional": (
        {
            "question": "?",
            "input_output": json.dumps(FUNCTIONAL),
            "solutions": json.dumps([SOLUTION]),
            "starter_code": "class Solution:",
        },
        [CallTest("add", "[[1, 2], 3]", "[4, 5]", wrapped=True)],
        SOLUTION,
    ),
    "verl prime_code": (
        {
            "data_source": "taco",
            "prompt": [{"role": "user", "content": "Print a + b."}],
            "ability": "code",
            "reward_model": {"style": "rule", "ground_truth": json.dumps(IO)},
        },
        [IoTest("1 2\n", "3\n"), IoTest("3 4\n", "7\n")],
        ADDER,
    ),
    "code_contests": (
        {
            "name": "1_A",
            "description": "Print a + b.",
            "public_tests": {"input": ["1 2\n"], "output": ["3\n"]},
            "private_tests": {"input": [], "output": []},
            "generated_tests": {"input": ["7 8\n"], "output": ["15\n"]},
            "solutions": {"language": [2, 3], "solution": ["int main() {}", ADDER]},
        },
        [IoTest("1 2\n", "3\n"), IoTest("7 8\n", "15\n")],
        ADDER,
    ),
    "open-r1 verifiable": (
        {
            "problem": "Print a + b.",
            "gold_standard_solution": f"```python\n{ADDER}\n```",
            "verification_info": json.dumps(
                {
                    "language": "python",
                    "test_cases": [
                        {"fn_name": None, "input": "1 2", "output": "3", "type": "stdin_stdout"}
                    ],
                }
            ),
        },
        [IoTest("1 2", "3")],
        ADDER,
    ),
    "open-r1 codeforces": (
        {
            "description": "Print a + b.",
            "input_format": "Two integers.",
            "output_format": "Their sum.",
            "official_tests": [{"input": "1 2", "output": "3"}],
            "generated_checker": "import sys\nprint(int('3' in open(sys.argv[3]).read()))",
        },
        [IoTest("1 2", "3", checker="import sys\nprint(int('3' in open(sys.argv[3]).read()))")],
        ADDER,
    ),
    "SandboxFusion": (
        {
            "id": 1,
            "content": "Print a + b.",
            "labels": {"programming_language": "python"},
            "test": [{"input": {"stdin": "1 2\n"}, "output": {"stdout": "3\n"}}],
            "canonical_solution": ADDER,
        },
        [IoTest("1 2\n", "3\n")],
        ADDER,
    ),
    "MBPP": (
        {
            "task_id": 2,
            "text": "Triple a number.",
            "code": "def triple(x):\n    return 3 * x",
            "test_list": ["assert triple(2) == 6", "assert set(triple(n) for n in (1,)) == {3}"],
            "test_setup_code": "",
            "challenge_test_list": ["assert triple(0) == 0"],
        },
        [
            CheckTest(
                "assert triple(2) == 6\nassert set(triple(n) for n in (1,)) == {3}\n"
                "assert triple(0) == 0",
                "triple",
            )
        ],
        "def triple(x):\n    return 3 * x",
    ),
    "HumanEval": (
        {
            "task_id": "HumanEval/0",
            "prompt": "def triple(x):\n",
            "canonical_solution": "    return 3 * x\n",
            "test": "def check(candidate):\n    assert candidate(2) == 6\n",
            "entry_point": "triple",
        },
        [CheckTest("def check(candidate):\n    assert candidate(2) == 6\n", "triple")],
        "    return 3 * x\n",
    ),
}


@pytest.mark.parametrize(("line", "tests", "solution"), LINES.values(), ids=LINES)
def test_a_line_is_read_and_its_solution_passes(tmp_path, line, tests, solution):
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps(line))
    (prompt,) = read_prompts(path)
    assert problem_of(prompt).tests == tuple(tests)
    reward = CodeReward(plain_run)
    assert reward.judge(prompt, solution).passed
    assert not reward.judge(prompt, "").passed
    assert not reward.judge(prompt, solution.replace("+ b", "+ b + 1").replace("3 *", "4 *")).passed


def test_verls_math_has_an_answer(tmp_path):
    line = {"prompt": [{"role": "user", "content": "1 + 1?"}], "reward_model": {}}
    line["reward_model"] = {"style": "rule", "ground_truth": "2"}
    (tmp_path / "p.jsonl").write_text(json.dumps(line))
    (prompt,) = read_prompts(tmp_path / "p.jsonl")
    assert (prompt.text, prompt.answer, prompt.tags) == ("1 + 1?", "2", {})


def test_a_line_with_our_keys_is_left_alone():
    assert as_problem({"prompt": "?", "answer": "!"}) is None


class Evil:
    def __reduce__(self):
        return eval, ("1 + 1",)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"private_test_cases": "x"}, "LiveCodeBench|Error"),
        (
            {"private_test_cases": base64.b64encode(zlib.compress(pickle.dumps(Evil()))).decode()},
            "allowed is text",
        ),
        ({"public_test_cases": "[]", "private_test_cases": ""}, "no tests"),
        ({"metadata": "{", "private_test_cases": ""}, "neither JSON"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, change, said):
    line = LINES["LiveCodeBench, stdin"][0] | change
    (tmp_path / "p.jsonl").write_text("\n" + json.dumps(line))
    with pytest.raises(ValueError, match="line 2") as caught:
        read_prompts(tmp_path / "p.jsonl")
    assert said.split("|")[-1] in str(caught.value)


VARIANTS = {
    "verification_info of Python literals": (
        {"prompt": "?", "verification_info": str({"test_cases": [{"input": "1", "output": "2"}]})},
        IoTest("1", "2"),
    ),
    "tests of SandboxFusion as text": (
        {"content": "?", "test": '[{"input": {"stdin": "1"}, "output": {"stdout": "2"}}]'},
        IoTest("1", "2"),
    ),
    "test_list as text": (
        {"text": "?", "test_list": '["assert f(1) == 2"]', "code": "def f(x): return x + 1"},
        CheckTest("assert f(1) == 2", "f"),
    ),
    "MBPP+": (
        {"prompt": "?", "test_list": ["assert f(1) == 2"], "test": "assert f(3) == 4"},
        CheckTest("assert f(3) == 4", "f"),
    ),
    "LeetCodeDataset": (
        {
            "problem_description": "?",
            "prompt": "from math import *",
            "entry_point": "Solution().f",
            "completion": "class Solution:\n    def f(self, x): return x + 1",
            "test": "def check(candidate):\n    assert candidate(x=1) == 2",
        },
        CheckTest(
            "def check(candidate):\n    assert candidate(x=1) == 2", "f", "from math import *"
        ),
    ),
}


@pytest.mark.parametrize(("line", "last"), VARIANTS.values(), ids=VARIANTS)
def test_variants_of_formats(tmp_path, line, last):
    (tmp_path / "p.jsonl").write_text(json.dumps(line))
    (prompt,) = read_prompts(tmp_path / "p.jsonl")
    found = problem_of(prompt)
    assert found.tests[-1] == last
    if prompt.answer:
        assert CodeReward(plain_run).judge(prompt, prompt.answer).passed


def test_a_math_problem_of_open_r1(tmp_path):
    line = {"problem": "6 * 7?", "verification_info": "{'ground_truth': 42}"}
    (tmp_path / "p.jsonl").write_text(json.dumps(line))
    (prompt,) = read_prompts(tmp_path / "p.jsonl")
    assert (prompt.text, prompt.answer) == ("6 * 7?", "42")


def test_a_file_of_problems_is_checked_before_a_run(tmp_path):
    sound = {"prompt": "Add.", "answer": ADDER, "tests": [{"stdin": "1 2", "stdout": "3"}]}
    problems = [
        sound,
        sound | {"answer": "print(4)"},
        sound | {"answer": ""},
        sound | {"answer": "pass", "tests": [{"stdin": "", "stdout": ""}]},
        sound | {"tests": [{"stdin": 1}]},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, problems)))
    said: list[str] = []
    prompts = read_prompts(tmp_path / "p.jsonl")
    counts = check_problems(prompts, CodeReward(plain_run), workers=2, say=said.append)
    assert counts == {
        "sound": 1,
        "no reference": 1,
        "malformed": 1,
        "reference fails": 1,
        "empty passes": 1,
        "no verdict": 0,
    }
    assert [json.loads(line)["prompt"] for line in said] == [1, 3, 4]
