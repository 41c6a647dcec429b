"""Test generation: the rules on their own, then real CYaRon generators with wrong submissions."""

import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plain_run import plain_run, result

from kimi_core.prompts.jsonl import read_prompts
from kimi_core.reward.base import InfrastructureError
from kimi_core.reward.code import testgen
from kimi_core.reward.code.reward import CodeReward
from kimi_core.reward.code.runner import Runner
from kimi_core.reward.code.testgen import ProblemSource, decide, main, make_tests, read_sources
from kimi_core.sandbox import Limits, Status

GOOD = "n = int(input())\nprint(sum(map(int, input().split())))"
ALSO_GOOD = "input()\ntotal = 0\nfor x in input().split(): total += int(x)\nprint(total, end='')"
CRASHES = "raise SystemExit(1)"
GENERATOR = """
import sys
from cyaron import *

n = int(sys.argv[1])
print(n)
print(*(randint(-1000, 1000) for _ in range(n)))
"""
TREES = """
import sys
from cyaron import *

n = int(sys.argv[1]) + 1
print(n)
print(Graph.tree(n))
"""
LEAVES = """
n = int(input())
degree = [0] * (n + 1)
for _ in range(n - 1):
    a, b, _ = map(int, input().split())
    degree[a] += 1
    degree[b] += 1
print(degree.count(1))
"""


def few(monkeypatch, cases: int) -> None:
    monkeypatch.setattr(testgen, "CASES", cases)


class TestDecision:
    @staticmethod
    def outputs(*rows: str) -> list[list[bytes | None]]:
        """A letter an output, a dot a failure."""
        return [[None if c == "." else c.encode() for c in row] for row in rows]

    def decided(self, *rows: str, faults=None):
        cases = [str(index).encode() for index in range(len(rows))]
        return decide("p", cases, self.outputs(*rows), Counter(faults or {}))

    def test_all_agree(self):
        report = self.decided("aaaaaaaaaa", "bbbbbbbbbb")
        assert report.kept and report.valid == 2 and report.passed == (2,) * 10
        assert report.tests == ({"stdin": "0", "stdout": "a"}, {"stdin": "1", "stdout": "b"})

    def test_seven_make_a_case_and_six_do_not(self):
        assert self.decided("aaaaaaabbb", "cccccccccc").valid == 2
        report = self.decided("aaaaaabbbb", "cccccccccc")
        assert (report.kept, report.valid) == (True, 1)
        assert report.dropped == {"fewer than 7 submissions agree": 1}

    def test_failures_agree_with_nobody(self):
        report = self.decided("aaa.......", "..........")
        assert (report.kept, report.valid, report.reason) == (False, 0, "no case is valid")

    def test_nine_keep_a_problem_and_eight_do_not(self):
        assert self.decided("aaaaaaaaab").kept
        report = self.decided("aaaaaaaabb")
        assert not report.kept and report.tests == ()
        assert report.reason == "8 of 10 submissions pass all 1 valid cases, 9 are needed"

    def test_to_pass_is_to_pass_all(self):
        # Each case has eight of ten, but only six pass both.
        report = self.decided("aaaaaaaabb", "bbaaaaaaaa")
        assert not report.kept and report.reason.startswith("6 of 10")

    def test_cases_that_were_never_made_are_counted(self):
        report = self.decided("aaaaaaaaaa", faults={"the generator ended with TIME": 3})
        assert report.kept and report.dropped == {"the generator ended with TIME": 3}

    def test_no_case_at_all(self):
        report = self.decided(faults={"the generator ended with RUNTIME: x": 50})
        assert (report.kept, report.generated, report.reason) == (False, 0, "no case is valid")

    def test_what_is_not_text_cannot_be_a_test(self):
        report = decide("p", [b"\xff", b"1"], [[b"a"] * 10, [b"\xff"] * 10], Counter())
        assert not report.kept and report.dropped == {"input or output is not UTF-8": 2}

    @given(st.lists(st.text("ab.", min_size=10, max_size=10), max_size=12))
    def test_what_is_kept_is_what_the_report_asks_for(self, rows):
        report = self.decided(*rows)
        assert report.valid + sum(report.dropped.values()) == report.generated == len(rows)
        valid = [row for row in rows if max(row.count("a"), row.count("b")) >= 7]
        right = ["a" if row.count("a") >= 7 else "b" for row in valid]
        passing = sum(
            all(row[i] == r for row, r in zip(valid, right, strict=True)) for i in range(10)
        )
        assert report.valid == len(valid)
        assert report.kept is (bool(valid) and passing >= 9)
        assert len(report.tests) == (len(valid) if report.kept else 0)


class TestGeneration:
    @pytest.fixture
    def runner(self, run):
        pytest.importorskip("cyaron", reason="needs pip install 'kimi-core[testgen]'")
        return Runner(run)

    def test_good_submissions(self, runner, monkeypatch):
        few(monkeypatch, 5)
        source = ProblemSource("sum", GENERATOR, (GOOD,) * 5 + (ALSO_GOOD,) * 4 + (CRASHES,))
        report = make_tests(source, runner, Limits(), threads=2)
        assert report.kept, report
        assert (report.generated, report.valid, report.passed) == (5, 5, (5,) * 9 + (0,))
        for number, test in enumerate(report.tests, 1):
            count, values = test["stdin"].split("\n", 1)
            assert int(count) == number == len(values.split())
            assert int(test["stdout"]) == sum(map(int, values.split()))

    @pytest.mark.nightly
    def test_the_seed_decides(self, runner, monkeypatch):
        few(monkeypatch, 1)
        source = ProblemSource("tree", TREES, (LEAVES,) * 10)
        first, same, other = (
            make_tests(source, runner, Limits(), seed=seed, threads=2).tests for seed in (1, 1, 2)
        )
        assert first == same and len(first) == len(other) == 1

    def test_a_graph_and_two_wrong_submissions(self, runner, monkeypatch):
        few(monkeypatch, 4)
        wrong = LEAVES.replace("degree.count(1)", "degree.count(1) + (n > 3)")
        report = make_tests(
            ProblemSource("leaves", TREES, (LEAVES,) * 8 + (wrong,) * 2), runner, Limits()
        )
        assert not report.kept
        assert report.valid == 4
        assert report.passed[:8] == (4,) * 8 and max(report.passed[8:]) < 4
        assert report.reason == "8 of 10 submissions pass all 4 valid cases, 9 are needed"

    def test_a_generator_that_fails_now_and_then(self, runner, monkeypatch):
        few(monkeypatch, 4)
        fails = GENERATOR + "assert n % 2, 'odd ones only'\n"
        report = make_tests(ProblemSource("sum", fails, (GOOD,) * 10), runner, Limits(), threads=2)
        assert report.kept and report.generated == report.valid == 2
        assert report.dropped == {
            "the generator ended with RUNTIME: AssertionError: odd ones only": 2
        }

    @pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on this machine")
    @pytest.mark.nightly
    def test_cpp_submissions(self, runner, monkeypatch):
        few(monkeypatch, 2)
        adder = "#include <iostream>\nint main() { int n, x, s = 0; std::cin >> n;"
        adder += " while (std::cin >> x) s += x; std::cout << s << std::endl; }"
        broken = "int main( {"
        source = ProblemSource("sum", GENERATOR, (adder,) * 9 + (broken,), "c++")
        report = make_tests(source, runner, Limits(), threads=2)
        assert report.kept and report.passed == (2,) * 9 + (0,)


def test_a_sandbox_that_fails_gives_no_verdict(monkeypatch):
    pytest.importorskip("cyaron", reason="needs pip install 'kimi-core[testgen]'")
    runner = Runner(lambda *args, **kwargs: result(Status.INFRA))
    with pytest.raises(InfrastructureError):
        make_tests(ProblemSource("p", GENERATOR, (GOOD,) * 10), runner, Limits(), threads=1)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "line 1"),
        ("[]", "line 1"),
        ('{"name": "p", "generator": "g"}', "KeyError.*submissions"),
        ('{"name": "p", "generator": "g", "submissions": ["s"]}', "a list of 10 programs"),
        (json.dumps({"name": 1, "generator": "g", "submissions": ["s"] * 10}), "text"),
        (json.dumps({"name": "p", "generator": "g", "language": "rust", "submissions": ["s"] * 10}),
         "allowed are python"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named(tmp_path, line, complaint):
    path = tmp_path / "problems.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError, match=complaint):
        list(read_sources(path))


def test_from_the_shell(tmp_path, monkeypatch, capsys):
    """What comes out is a source of prompts that the code reward takes."""
    pytest.importorskip("cyaron", reason="needs pip install 'kimi-core[testgen]'")
    few(monkeypatch, 2)
    sandbox = SimpleNamespace(run=plain_run, close=lambda: None)
    monkeypatch.setattr(testgen, "open_sandbox", lambda config: sandbox)
    lines = [
        {"name": "sum", "generator": GENERATOR, "submissions": [GOOD] * 10,
         "prompt": "Add them up.", "answer": GOOD},
        {"name": "never", "generator": "1 / 0", "submissions": [GOOD] * 10,
         "prompt": "?", "answer": "?"},
    ]  # fmt: skip
    problems = tmp_path / "problems.jsonl"
    problems.write_text("\n".join(map(json.dumps, lines)))
    out, reports = tmp_path / "kept.jsonl", tmp_path / "report.jsonl"
    assert main([str(problems), "--out", str(out), "--report", str(reports)]) == 0
    said = capsys.readouterr().out
    assert "sum: kept, 10 of 10 submissions pass all 2 valid cases" in said
    assert "never: dropped, no case is valid" in said
    first, second = map(json.loads, reports.read_text().splitlines())
    assert (first["kept"], first["tests"], second["kept"]) == (True, 2, False)
    assert second["dropped"] == {
        "the generator ended with RUNTIME: ZeroDivisionError: division by zero": 2
    }
    (prompt,) = read_prompts(out)
    reward = CodeReward(plain_run)
    assert reward(prompt, GOOD) == 1.0 and reward(prompt, CRASHES) == 0.0


def test_no_file(tmp_path, capsys):
    assert main([str(tmp_path / "gone.jsonl"), "--out", str(Path("/dev/null"))]) == 2
    assert "error: No file" in capsys.readouterr().err
