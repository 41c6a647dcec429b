import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_core.prompts.jsonl import read_prompts
from kimi_core.reward.code.problem import CheckTest, IoTest, Problem, problem_of
from kimi_core.reward.code.program import extract_program
from kimi_core.types import Prompt

PYTHON, CPP = Problem(()), Problem((), language="c++")
CONTINUED = Problem((), prefix="def f(x):\n    'Triple.'\n")


class TestExtraction:
    @pytest.mark.parametrize(
        ("response", "program"),
        [
            ("print(1)", "print(1)"),
            ("", ""),
            ("```python\nprint(1)\n```", "print(1)\n"),
            ("First:\n```python\n1\n```\nbetter:\n```Python\n2\n```\nso.", "2\n"),
            ("```py\n1\n```\n```\noutput\n```", "1\n"),
            ("```\n1\n```\n```cpp\n2\n```", "1\n"),
            ("```python\n1\n```\n```python3\n2", "2\n".rstrip()),
            ("  ```python\n  1\n  ```", "1\n"),
            ("```cpp\nint main;\n```", "```cpp\nint main;\n```"),
            ("a ```python b", "a ```python b"),
        ],
    )
    def test_python(self, response, program):
        assert extract_program(PYTHON, response) == program

    def test_cpp(self):
        response = "```python\n1\n```\n```c++\nint main() {}\n```\n```\nout\n```"
        assert extract_program(CPP, response) == "int main() {}\n"

    @pytest.mark.parametrize(
        ("response", "body"),
        [
            ("    return 3 * x", "    return 3 * x"),
            ("    return 3 * x\n\ndef g():\n    pass\n", "    return 3 * x\n\n"),
            ("    return 3 * x\nprint(f(2))", "    return 3 * x\n"),
            ("    if x:\n        return 3\n    # so\n    return 0\n# Test\n",
             "    if x:\n        return 3\n    # so\n    return 0\n"),
            ("    return 3 * x\n```\n\nIt triples:\n```python\nf(2)\n```", "    return 3 * x\n"),
            ("    y = [\n1]\n    return y\nif __name__", "    y = [\n1]\n    return y\n"),
            ("", ""),
        ],
    )  # fmt: skip
    def test_a_continuation_is_cut_where_something_else_begins(self, response, body):
        assert extract_program(CONTINUED, response) == CONTINUED.prefix + body

    def test_a_block_stands_behind_the_prefix(self):
        block = "def f(x):\n    return 3 * x\n"
        found = extract_program(CONTINUED, f"Here:\n```python\n{block}```")
        assert found == f"{CONTINUED.prefix}\n{block}"

    @given(st.text())
    def test_whatever_a_model_writes_comes_out_as_text(self, response):
        for problem in (PYTHON, CPP, CONTINUED):
            assert isinstance(extract_program(problem, response), str)


class TestProblem:
    def test_from_a_line_of_jsonl(self, tmp_path):
        line = {
            "prompt": "Add.",
            "answer": "?",
            "tests": [{"stdin": "1 2", "stdout": "3"}, {"check": "assert f()", "entry_point": "f"}],
            "prefix": "import math\n",
        }
        (tmp_path / "p.jsonl").write_text(json.dumps(line))
        (prompt,) = read_prompts(tmp_path / "p.jsonl")
        tests = (IoTest("1 2", "3"), CheckTest("assert f()", "f"))
        assert problem_of(prompt) == Problem(tests, "python", "import math\n")

    @pytest.mark.parametrize(
        ("tags", "complaint"),
        [
            ({}, "Prompt 3 has no tests"),
            ({"tests": "[1"}, '"tests" is not JSON'),
            ({"tests": "[]"}, "non-empty list"),
            ({"tests": "{}"}, "non-empty list"),
            ({"tests": "[1]"}, "1 is no test"),
            ({"tests": '[{"stdin": "1"}]'}, "is no test; allowed are"),
            ({"tests": '[{"stdin": "1", "stdout": 2}]'}, "all others are strings"),
            ({"tests": '[{"check": "assert f()"}]'}, "is no test"),
            ({"tests": '[{"stdin": "", "stdout": "", "more": ""}]'}, "is no test"),
            ({"tests": '[{"stdin": "", "stdout": ""}]', "language": "rust"}, "allowed are c++, cc"),
            ({"tests": '[{"check": "assert f()", "entry_point": "f"}]', "language": "c++"},
             'only "stdin" tests a program in c++'),
        ],
    )  # fmt: skip
    def test_a_malformed_one_is_named(self, tags, complaint):
        with pytest.raises(ValueError, match="Prompt 3") as caught:
            problem_of(Prompt(3, "?", "!", tags=tags))
        assert complaint in str(caught.value)
