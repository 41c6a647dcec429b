import json
import re
from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_core.config import PromptsConfig
from kimi_core.prompts.jsonl import load_examples, read_prompts
from kimi_core.prompts.load import load_prompts, split
from kimi_core.tasks import addition, maximum, multiply
from kimi_core.types import Prompt


def problems(prompts):
    return {prompt.tags["problem"] for prompt in prompts}


@pytest.fixture
def lines(tmp_path):
    """Write lines to data.jsonl and return its path."""

    def write(*records):
        path = tmp_path / "data.jsonl"
        texts = [r if isinstance(r, str) else json.dumps(r) for r in records]
        path.write_text("\n".join(texts), encoding="utf-8")
        return path

    return write


class TestDispatch:
    def test_multiply(self):
        assert load_prompts(PromptsConfig(source="multiply")) == multiply.prompts()

    @pytest.mark.parametrize("task", [addition, maximum])
    def test_few_shot_tasks_take_their_settings(self, task):
        source = task.__name__.rpartition(".")[2]
        config = PromptsConfig(source=source, task={"shots": 2, "largest": 9}, split_seed=3)
        assert load_prompts(config) == task.prompts(2, 9, 3)

    def test_jsonl_is_relative_to_the_folder(self, lines):
        path = lines({"prompt": "1+1=", "answer": "2"})
        config = PromptsConfig(source="data.jsonl")
        assert load_prompts(config, base_folder=path.parent) == [Prompt(0, "1+1=", "2")]

    def test_function(self, tmp_path):
        (tmp_path / "mine.py").write_text(
            "from kimi_core.types import Prompt\ndef make():\n    return [Prompt(5, 'a', 'b')]\n"
        )
        config = PromptsConfig(source="mine.py:make")
        assert load_prompts(config, base_folder=tmp_path) == [Prompt(5, "a", "b")]

    def test_unknown(self):
        with pytest.raises(ValueError, match="'multply'; allowed are multiply, addition"):
            load_prompts(PromptsConfig(source="multply"))

    @pytest.mark.parametrize(
        ("body", "message"),
        [
            ("[]", "expected a non-empty list of Prompt"),
            ("None", "found None; expected a non-empty list"),
            ("[('a', 'b')]", r"found \('a', 'b'\) at index 0; expected a Prompt"),
            ("[Prompt(1, 'a', 'b'), Prompt(1, 'c', 'd')]", "two prompts have the id 1"),
        ],
    )
    def test_what_a_function_must_return(self, tmp_path, body, message):
        (tmp_path / "mine.py").write_text(
            f"from kimi_core.types import Prompt\ndef make():\n    return {body}\n"
        )
        with pytest.raises(ValueError, match=message):
            load_prompts(PromptsConfig(source="mine.py:make"), base_folder=tmp_path)


class TestSplit:
    @given(
        st.lists(st.integers(0, 8), min_size=4, max_size=40),
        st.integers(1, 40),
        st.integers(0, 5),
    )
    def test_no_problem_is_on_both_sides(self, tags, held_out, seed):
        prompts = [Prompt(i, f"{i}", "", tags={"problem": str(t)}) for i, t in enumerate(tags)]
        try:
            train, test = split(prompts, held_out, seed)
        except ValueError:
            return
        assert not problems(train) & problems(test)
        assert sorted(p.id for p in [*train, *test]) == list(range(len(tags)))
        assert 0 < len(test) <= held_out
        assert train

    def test_it_is_exact_where_every_problem_has_one_prompt(self):
        train, test = split(multiply.prompts(), 500, 0)
        assert (len(train), len(test)) == (6700, 500)

    def test_the_seed_decides(self):
        prompts = multiply.prompts()
        assert split(prompts, 500, 1) == split(prompts, 500, 1)
        assert split(prompts, 500, 1) != split(prompts, 500, 2)

    def test_the_same_text_without_a_tag_stays_together(self):
        prompts = [Prompt(i, text, "") for i, text in enumerate("abcabc")]
        train, test = split(prompts, 2, 0)
        assert not {p.text for p in train} & {p.text for p in test}

    @pytest.mark.parametrize("held_out", [4, 5])
    def test_too_many(self, held_out):
        prompts = [Prompt(i, str(i), "") for i in range(4)]
        with pytest.raises(ValueError, match=f"Cannot hold out {held_out} of 4 prompts"):
            split(prompts, held_out, 0)

    def test_problems_too_large_to_hold_out(self):
        prompts = [Prompt(i, "same", "") for i in range(4)]
        with pytest.raises(ValueError, match="each problem has at least 4"):
            split(prompts, 2, 0)


class TestAddition:
    def test_every_unordered_pair_once(self):
        prompts = addition.prompts(shots=1, largest=20, seed=0)
        assert len(prompts) == len(problems(prompts)) == 20 * 21 // 2
        assert [prompt.id for prompt in prompts] == list(range(210))

    def test_answers_are_sums_and_examples_are_right_and_others(self):
        for prompt in addition.prompts(shots=3, largest=5, seed=0):
            *examples, question = prompt.text.split("\n")
            assert len(examples) == 3
            pair = self.operands(question)
            assert sum(pair) == int(prompt.answer)
            assert sorted(pair) == [int(n) for n in prompt.tags["problem"].split("+")]
            for example in examples:
                left, right = example.removesuffix("$").split("=")
                assert sum(self.operands(left)) == int(right)
                assert sorted(self.operands(left)) != sorted(pair)

    @staticmethod
    def operands(text):
        return [int(number) for number in text.strip("$ =").split("+")]

    def test_layout(self):
        first = addition.prompts(shots=1, largest=2, seed=0)[0]
        assert re.fullmatch(r"\$\d \+ \d = \d\$\n\$1 \+ 1 = ", first.text)

    def test_without_shots(self):
        assert all("\n" not in prompt.text for prompt in addition.prompts(0, 5, 0))

    def test_smallest_range_terminates(self):
        assert len(addition.prompts(shots=2, largest=2, seed=0)) == 3

    def test_the_seed_decides(self):
        assert addition.prompts(2, 9, 1) == addition.prompts(2, 9, 1)
        assert addition.prompts(2, 9, 1) != addition.prompts(2, 9, 2)

    def test_enough_to_hold_out_300(self):
        train, test = split(addition.prompts(1, 40, 0), 300, 0)
        assert len(problems(test)) == 300
        assert len(train) > 300

    @pytest.mark.parametrize(("shots", "largest"), [(-1, 9), (1, 1)])
    def test_bad_settings_are_named(self, shots, largest):
        with pytest.raises(ValueError, match=r"prompts\.task\.(shots = -1|largest = 1)"):
            addition.prompts(shots, largest, 0)


class TestMaximum:
    @staticmethod
    def numbers(line):
        return [int(number) for number in re.findall(r"\d+", line.partition("=")[0])]

    def test_no_two_problems_share_a_pair_of_numbers(self):
        prompts = maximum.prompts(shots=1, largest=99, seed=0)
        assert [prompt.id for prompt in prompts] == list(range(len(prompts)))
        assert len(prompts) > 1500
        pairs: list[tuple[int, int]] = []
        for prompt in prompts:
            numbers = sorted(self.numbers(prompt.text.split("\n")[-1]))
            assert len(set(numbers)) == 3 and 1 <= numbers[0] and numbers[2] <= 99
            assert prompt.answer == str(numbers[2])
            assert prompt.tags["problem"] == ",".join(map(str, numbers))
            pairs += combinations(numbers, 2)
        assert len(set(pairs)) == len(pairs)

    def test_the_maximum_stands_in_every_place_and_examples_are_right_and_others(self):
        places = Counter()
        for prompt in maximum.prompts(shots=2, largest=20, seed=0):
            *examples, question = prompt.text.split("\n")
            assert len(examples) == 2
            places[self.numbers(question).index(int(prompt.answer))] += 1
            for example in examples:
                shown = self.numbers(example)
                assert int(example.removesuffix("$").split("=")[1]) == max(shown)
                assert not set(shown) & set(self.numbers(question))
        assert min(places[place] for place in range(3)) > places.total() / 6

    def test_layout(self):
        first = maximum.prompts(shots=1, largest=9, seed=0)[0]
        line = r"\$max\(\d, \d, \d\) = "
        assert re.fullmatch(rf"{line}\d\$\n{line}", first.text)

    def test_the_seed_decides(self):
        assert maximum.prompts(1, 20, 1) == maximum.prompts(1, 20, 1)
        assert maximum.prompts(1, 20, 1) != maximum.prompts(1, 20, 2)

    @pytest.mark.parametrize(("shots", "largest"), [(-1, 9), (1, 5)])
    def test_bad_settings_are_named(self, shots, largest):
        with pytest.raises(ValueError, match=r"prompts\.task\.(shots = -1|largest = 5)"):
            maximum.prompts(shots, largest, 0)


class TestJsonl:
    def test_all_keys(self, lines):
        path = lines(
            {"prompt": "p", "answer": "a", "difficulty": 0.25, "domain": "algebra", "level": 3},
            "",
            {"prompt": "q", "answer": "b", "difficulty": None},
        )
        assert read_prompts(path) == [
            Prompt(0, "p", "a", 0.25, {"domain": "algebra", "level": "3"}),
            Prompt(1, "q", "b"),
        ]

    def test_unicode_line_separators_do_not_end_a_line(self, lines):
        path = lines('{"prompt": "a\u2028b", "answer": "c"}')
        assert read_prompts(path)[0].text == "a\u2028b"

    def test_byte_order_mark_and_windows_line_ends(self, tmp_path):
        path = tmp_path / "data.jsonl"
        path.write_bytes(b'\xef\xbb\xbf{"prompt": "p", "answer": "a"}\r\n')
        assert read_prompts(path) == [Prompt(0, "p", "a")]

    def test_missing_file(self, tmp_path):
        with pytest.raises(ValueError, match=r"No file .*gone\.jsonl"):
            read_prompts(tmp_path / "gone.jsonl")

    @pytest.mark.parametrize("text", ["", "\n \n"])
    def test_empty_file(self, lines, text):
        with pytest.raises(ValueError, match=r"data\.jsonl is empty"):
            read_prompts(lines(text))

    def test_not_text(self, tmp_path):
        path = tmp_path / "data.jsonl"
        path.write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ValueError, match="is not UTF-8"):
            read_prompts(path)

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ('{"prompt": "p", "answer"', r"line 2: .* in '.*'; expected"),
            ("[1]", r"line 2: found '\[1\]'; expected an object"),
            ({"prompt": "p"}, r'line 2: no "answer" among its keys \(prompt\)'),
            ({}, r'line 2: no "prompt" among its keys \(none\)'),
            (
                {"prompt": "p", "answer": []},
                r'line 2: "answer" is \[\]; allowed is a non-empty string',
            ),
            ({"prompt": "", "answer": "4"}, r'line 2: "prompt" is ""'),
            ({"prompt": "p", "answer": "a", "difficulty": 1.5}, r'"difficulty" is 1\.5; allowed'),
            ({"prompt": "p", "answer": "a", "difficulty": True}, r'"difficulty" is true; allowed'),
            ('{"prompt": "p", "answer": "a", "difficulty": NaN}', r'"difficulty" is NaN; allowed'),
        ],
    )
    def test_bad_line_is_named(self, lines, line, message):
        with pytest.raises(ValueError, match=message):
            read_prompts(lines({"prompt": "fine", "answer": "1"}, line))

    def test_examples(self, lines):
        path = lines({"prompt": "p", "response": "r", "note": 1}, {"prompt": "q", "response": "s"})
        assert load_examples(path) == [("p", "r"), ("q", "s")]

    def test_examples_need_a_response(self, lines):
        with pytest.raises(ValueError, match=r'line 1: no "response" among its keys'):
            load_examples(lines({"prompt": "p", "answer": "a"}))
