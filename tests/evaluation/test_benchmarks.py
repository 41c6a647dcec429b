"""Benchmarks are read as they are published, and bad lines are named."""

import json

import pytest

from kimi_core.config import MathConfig
from kimi_core.evaluation.benchmarks import choice, chosen, files_of, load_benchmark, questions_of
from kimi_core.reward.math.reward import MathReward
from kimi_core.types import Prompt

GSM8K = {
    "question": "Natalia sold clips to 48 of her friends in April, and then she sold half as many "
    "clips in May. How many clips did Natalia sell altogether in April and May?",
    "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nNatalia sold 48+24 = "
    "<<48+24=72>>72 clips altogether in April and May.\n#### 72",
}
MATH_500 = {
    "problem": "Convert the point $(0,3)$ in rectangular coordinates to polar coordinates.  Enter "
    "your answer in the form $(r,\\theta),$ where $r > 0$ and $0 \\le \\theta < 2 \\pi.$",
    "solution": "We have that $r = \\sqrt{0^2 + 3^2} = 3.$ ... Therefore, the polar coordinates "
    "are $\\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}.$",
    "answer": "\\left( 3, \\frac{\\pi}{2} \\right)",
    "subject": "Precalculus",
    "level": 2,
    "unique_id": "test/precalculus/807.json",
}
MATH = {
    "problem": "How many vertical asymptotes does the graph of $y=\\frac{2}{x^2+x-6}$ have?",
    "level": "Level 3",
    "type": "Algebra",
    "solution": "The denominator of the rational function factors into $x^2+x-6=(x-2)(x+3)$. Since "
    "the numerator is always nonzero, there is a vertical asymptote whenever the denominator is "
    "$0$, which occurs for $x = 2$ and $x = -3$.  Therefore, the graph has $\\boxed{2}$ vertical "
    "asymptotes.",
}
AIME_2024 = {
    "id": 60,
    "problem": "Every morning Aya goes for a $9$-kilometer-long walk and stops at a coffee shop "
    "afterwards. When she walks at a constant speed of $s$ kilometers per hour, the walk takes her "
    "4 hours, including $t$ minutes spent in the coffee shop. ...",
    "solution": "...",
    "answer": "204",
    "year": "2024",
}
AIME_ROWS = {"ID": "2024-I-1", "Problem": AIME_2024["problem"], "Solution": "...", "Answer": 204}
AIME_2025 = {
    "question": "Find the sum of all integer bases $b>9$ for which $17_b$ is a divisor of $97_b.$",
    "answer": "70",
}
MMLU = {
    "question": "Find the degree for the given field extension Q(sqrt(2), sqrt(3), sqrt(18)) over "
    "Q.",
    "subject": "abstract_algebra",
    "choices": ["0", "4", "2", "6"],
    "answer": 1,
}
MMLU_CSV = f'"{MMLU["question"]}",0,4,2,6,B\n'
MMLU_PRO = {
    "question_id": 70,
    "question": "Typical advertising regulatory bodies suggest, for example that adverts must not: "
    "encourage _________, cause unnecessary ________ or _____, and must not cause _______ offence.",
    "options": [f"Option {n}" for n in range(8)]
    + ["Unsafe practices, Distress, Fear, Serious", "-"],
    "answer": "I",
    "answer_index": 8,
    "cot_content": "",
    "category": "business",
    "src": "ori_mmlu-business_ethics",
}
MBPP = {
    "task_id": 11,
    "text": "Write a python function to remove first and last occurrence of a given character from "
    "the string.",
    "code": "def remove_Occ(s,ch):\r\n    return s.replace(ch, '', 1)",
    "test_list": ['assert remove_Occ("hello","l") == "heo"'],
    "test_setup_code": "",
    "challenge_test_list": [],
}


def read(tmp_path, name, *lines, suffix=".jsonl") -> list[Prompt]:
    path = tmp_path / f"test{suffix}"
    path.write_text(
        "".join(one if isinstance(one, str) else json.dumps(one) + "\n" for one in lines)
    )
    return load_benchmark(name, files_of(name, path))


@pytest.mark.parametrize(
    ("name", "line", "answer", "subject"),
    [
        ("gsm8k", GSM8K, "72", ""),
        ("math-500", MATH_500, MATH_500["answer"], "Precalculus"),
        ("math-500", MATH, "2", "Algebra"),
        ("aime", AIME_2024, "204", ""),
        ("aime", AIME_ROWS, "204", ""),
        ("aime", AIME_2025, "70", ""),
        ("mmlu", MMLU, "B", "abstract_algebra"),
        ("mmlu-pro", MMLU_PRO, "I", "business"),
    ],
)
def test_lines_as_they_are_published(tmp_path, name, line, answer, subject):
    (prompt,) = read(tmp_path, name, line)
    question = next(line[key] for key in ("problem", "question", "Problem") if key in line)
    assert prompt.text.startswith(question)
    assert (prompt.answer, prompt.tags["subject"]) == (answer, subject)


def test_other_files_and_folders(tmp_path):
    (prompt,) = read(tmp_path, "mmlu", MMLU_CSV, suffix=".csv")
    assert (prompt.answer, prompt.text.count("\n")) == ("B", 7) and "\nB) 4\n" in prompt.text
    (tmp_path / "test.csv").unlink()
    (tmp_path / "algebra").mkdir()
    (tmp_path / "algebra" / "1.json").write_text(json.dumps(MATH, indent=1))
    (tmp_path / "b.json").write_text(json.dumps([MATH_500, MATH]))
    found = load_benchmark("math-500", files_of("math-500", tmp_path))
    assert [one.id for one in found] == [0, 1, 2]
    assert [one.tags["subject"] for one in found] == ["Algebra", "Precalculus", "Algebra"]
    assert questions_of("math-500", files_of("math-500", tmp_path))[0] == MATH["problem"]
    (code,) = read(tmp_path, "mbpp", MBPP)
    assert "remove first and last" in code.text and "remove_Occ" in code.tags["tests"]


def test_answers_are_judged_as_the_papers_do(tmp_path):
    (sums,) = read(tmp_path, "gsm8k", GSM8K)
    reward = MathReward(MathConfig())
    assert reward(sums, "So it is \\boxed{72}.") == reward(sums, "The answer is 72.") == 1
    assert reward(sums, "\\boxed{24}") == 0
    (polar,) = read(tmp_path, "math-500", MATH_500)
    assert reward(polar, "\\boxed{(3, \\pi/2)}") == 1
    reward.close()
    (options,) = read(tmp_path, "mmlu", MMLU)
    assert choice(options, "A) is 0, which is wrong.\nAnswer: B") == 1
    assert choice(options, "Answer: C") == choice(options, "4") == 0


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is (D).", "D"),
        ("**Answer: C**", "C"),
        ("\\boxed{\\text{A}}", "A"),
        ("Answer: B. Wait.\nAnswer: A", "A"),
        ("C", "C"),
        ("B) 4", "B"),
        ("the answer is a number", None),
        ("Answer: It depends", None),
        ("A man walks.", None),
        ("", None),
    ],
)
def test_the_letter_of_a_response(text, letter):
    assert chosen(text) == letter


@pytest.mark.parametrize(
    ("name", "lines", "said"),
    [
        ("gsm8k", [GSM8K, {"question": "?", "answer": "72"}], r"line 2 .*gsm8k.*has no ####"),
        ("gsm8k", [{"problem": "?"}], r"line 1 .*KeyError: 'answer'.*it has problem"),
        ("math-500", [{"problem": "?", "solution": "2"}], r"has no \\boxed"),
        ("mmlu", [MMLU | {"answer": 7}], "'H' is none of 4 options"),
        ("mmlu", [MMLU | {"choices": []}], "'B' is none of 0 options"),
        ("mmlu", ["[1]\n"], r"line 1 .*it has \[1\]"),
        ("aime", [{"problem": "", "answer": 3}], "the question or the answer is empty"),
        ("aime", ['{"problem": \n'], "is not JSONL"),
        ("aime", ["\n"], "no problems in"),
    ],
)
def test_bad_lines_are_named(tmp_path, name, lines, said):
    with pytest.raises(ValueError, match=said):
        read(tmp_path, name, *lines)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"test\.csv, line 2 .*'' is none of 0 options"):
        read(tmp_path, "mmlu", MMLU_CSV + "one cell\n", suffix=".csv")
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "\xe9"}\n')
    with pytest.raises(ValueError, match=r"latin\.jsonl is not JSONL: 'utf-8'"):
        load_benchmark("gsm8k", [tmp_path / "latin.jsonl"])


def test_missing_files(tmp_path):
    with pytest.raises(ValueError, match="No benchmark 'gsm'; there are aime, math-500"):
        files_of("gsm", None)
    with pytest.raises(ValueError, match="needs --data"):
        files_of("gsm8k", None)
    with pytest.raises(ValueError, match=r"No \.jsonl, \.json, \.csv or \.parquet file"):
        files_of("gsm8k", tmp_path)
    assert files_of("humaneval", None) == []
