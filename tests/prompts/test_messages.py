"""Prompts and examples as conversations, from files and functions, with a system message."""

import json

import pytest
from PIL import Image as Pillow

from kimi_core.config import PromptsConfig
from kimi_core.prompts.jsonl import Place, load_examples, prompt_of, read_prompts
from kimi_core.prompts.load import load_prompts
from kimi_core.prompts.many import facts_of
from kimi_core.prompts.messages import chat_prompts, fields_of, in_chat, question
from kimi_core.types import IMAGE_MARK, Prompt

USER, SYSTEM = {"role": "user", "content": "1+1?"}, {"role": "system", "content": "Be brief."}
ANSWER = {"role": "assistant", "content": "2"}
MORE = {"role": "user", "content": "And 2+2?"}
CHAT = PromptsConfig(chat=True)
BRIEF = PromptsConfig(chat=True, system="Be brief.")


@pytest.fixture
def lines(tmp_path):
    def write(*records):
        path = tmp_path / "data.jsonl"
        path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
        return path

    return write


class TestPrompts:
    @pytest.mark.parametrize("key", ["messages", "prompt"])
    @pytest.mark.parametrize(
        ("messages", "text"),
        [
            ([USER], "1+1?"),
            ([SYSTEM, USER], "1+1?"),
            ([USER, ANSWER, MORE], "user: 1+1?\n\nassistant: 2\n\nuser: And 2+2?"),
            ([{**USER, "name": "Ann"}], "1+1?"),
        ],
    )
    def test_of_a_file(self, lines, key, messages, text):
        (prompt,) = read_prompts(lines({key: messages, "answer": "2", "domain": "sums"}))
        assert list(prompt.messages) == messages
        assert (prompt.text, prompt.answer, prompt.tags) == (text, "2", {"domain": "sums"})

    def test_text_and_messages_may_stand_in_one_file(self, lines):
        first, second = read_prompts(
            lines({"prompt": "1+1=", "answer": "2"}, {"messages": [USER], "answer": "2"})
        )
        assert not first.messages and first.text == "1+1="
        assert list(second.messages) == [USER]

    def test_messages_count_where_a_line_has_a_prompt_as_well(self, lines):
        (prompt,) = read_prompts(lines({"prompt": "1+1?", "messages": [USER], "answer": "2"}))
        assert list(prompt.messages) == [USER]

    @pytest.mark.parametrize(
        ("messages", "message"),
        [
            ([], r"line 1: found \[\]; messages are a list"),
            (["1+1?"], r'line 1: a message is "1\+1\?"; allowed are'),
            ([{"role": "user"}], r'line 1: a message is {"role": "user"}; allowed are'),
            ([{"content": "1+1?"}], "line 1: a message is .*; allowed are"),
            ([{"role": "", "content": "1+1?"}], "line 1: a message is .*; allowed are"),
            ([{"role": "user", "content": ["1+1?"]}], "a part of a message is"),
            ([USER, ANSWER], "line 1: the last message is the assistant's; .* end with the user's"),
        ],
    )
    def test_malformed_messages_are_named(self, lines, messages, message):
        with pytest.raises(ValueError, match=message):
            read_prompts(lines({"messages": messages, "answer": "2"}))

    def test_of_a_function(self, tmp_path):
        (tmp_path / "mine.py").write_text(
            "from kimi_core.types import Prompt\n"
            "def make():\n"
            f"    return [Prompt(0, '', '2', messages=[{USER}]), Prompt(1, 'q', '2')]\n"
            "def bad():\n"
            f"    return [Prompt(4, '', '2', messages=[{ANSWER}])]\n"
        )
        first, second = load_prompts(PromptsConfig(source="mine.py:make"), base_folder=tmp_path)
        assert (first.text, list(first.messages)) == ("1+1?", [USER])
        assert second == Prompt(1, "q", "2")
        with pytest.raises(ValueError, match=r"mine\.py:bad, prompt 4: the last message"):
            load_prompts(PromptsConfig(source="mine.py:bad"), base_folder=tmp_path)


class TestExamples:
    @pytest.mark.parametrize(
        ("record", "expected"),
        [
            ({"messages": [USER, ANSWER]}, ((USER,), "2")),
            ({"messages": [SYSTEM, USER, ANSWER]}, ((SYSTEM, USER), "2")),
            ({"messages": [USER], "response": "2"}, ((USER,), "2")),
            ({"prompt": [USER], "response": "2"}, ((USER,), "2")),
            ({"prompt": "1+1?", "messages": [USER, ANSWER]}, ((USER,), "2")),
            ({"prompt": "1+1=", "response": "2"}, ("1+1=", "2")),
        ],
    )
    def test_of_a_file(self, lines, record, expected):
        assert load_examples(lines(record)) == [expected]

    @pytest.mark.parametrize(
        ("record", "message"),
        [
            ({"messages": [USER]}, 'no "response" among its keys'),
            ({"messages": [ANSWER]}, r"found \[\]; messages are a list"),
            ({"messages": [USER, {"role": "assistant"}]}, '"response" is null'),
        ],
    )
    def test_malformed_ones_are_named(self, lines, record, message):
        with pytest.raises(ValueError, match=message):
            load_examples(lines(record))


class TestSettings:
    def test_text_becomes_a_user_message(self):
        assert in_chat("1+1?", PromptsConfig()) == "1+1?"
        assert list(in_chat("1+1?", CHAT)) == [USER]
        assert list(in_chat("1+1?", BRIEF)) == [SYSTEM, USER]

    def test_the_system_message_comes_first_and_once(self):
        assert list(in_chat([USER, ANSWER, MORE], BRIEF)) == [SYSTEM, USER, ANSWER, MORE]
        own = {"role": "system", "content": "Think."}
        assert list(in_chat([own, USER], BRIEF)) == [own, USER]
        assert list(in_chat([USER], PromptsConfig(system="Be brief."))) == [SYSTEM, USER]

    def test_a_system_message_needs_a_conversation(self):
        with pytest.raises(ValueError, match=r"prompts\.system = 'Be brief.*prompts\.chat = true"):
            in_chat("1+1=", PromptsConfig(system="Be brief."))

    def test_built_in_prompts_keep_all_else(self):
        prompts = [Prompt(3, "1+1?", "2", 0.5, {"problem": "1+1"})]
        (found,) = chat_prompts(prompts, BRIEF)
        assert list(found.messages) == [SYSTEM, USER]
        assert (found.id, found.text, found.answer, found.difficulty, found.tags) == (
            *(3, "1+1?", "2", 0.5),
            {"problem": "1+1"},
        )
        assert chat_prompts(prompts, PromptsConfig()) == prompts

    def test_a_conversation_of_the_system_alone_has_a_question(self):
        assert question([SYSTEM]) == "system: Be brief."


class TestImages:
    """Images of a line, in a list or as parts of messages."""

    @pytest.fixture
    def red(self, tmp_path):
        Pillow.new("RGB", (2, 2), "red").save(tmp_path / "red.png")
        Pillow.new("RGB", (2, 2), "blue").save(tmp_path / "blue.png")
        return tmp_path

    def read(self, folder, record):
        (folder / "data.jsonl").write_text(json.dumps({"answer": "a"} | record) + "\n")
        return read_prompts(folder / "data.jsonl")[0]

    def test_parts_become_marks(self, red):
        named = {"type": "image_url", "image_url": {"url": "blue.png"}}
        parts = [{"type": "text", "text": "Is "}, {"type": "image", "image": "red.png"}]
        content = [*parts, {"type": "text", "text": " "}, named, {"type": "text", "text": "?"}]
        found = self.read(red, {"messages": [{"role": "user", "content": content}]})
        assert found.messages[0]["content"] == f"Is {IMAGE_MARK} {IMAGE_MARK}?"
        assert [image.source.name for image in found.images] == ["red.png", "blue.png"]

    def test_places_are_filled_from_the_list(self, red):
        content = [{"type": "image"}, {"type": "text", "text": "?"}]
        record = {"messages": [{"role": "user", "content": content}], "images": ["red.png"]}
        assert len(self.read(red, record).images) == 1
        with pytest.raises(ValueError, match="2 images have 1 places"):
            self.read(red, record | {"images": ["red.png", "blue.png"]})

    def test_both_ways_at_once_are_refused(self, red):
        content = [{"type": "image", "image": "red.png"}]
        record = {"messages": [{"role": "user", "content": content}], "images": ["blue.png"]}
        with pytest.raises(ValueError, match="name all of them in one place"):
            self.read(red, record)

    def test_the_same_question_on_two_images_is_two_problems(self, red):
        names = ("red.png", "blue.png")
        one, other = (self.read(red, {"prompt": "?", "images": [name]}) for name in names)
        facts = facts_of([one, other])
        assert len(set(facts.problems.tolist())) == len(set(facts.checksums.tolist())) == 2

    def test_what_datasets_holds_of_an_image(self, red):
        row = {"prompt": "?", "answer": "a", "images": {"bytes": (red / "red.png").read_bytes()}}
        found = prompt_of(row, 0, Place("hub:x/y", 1, "row"))
        assert found.images == self.read(red, {"prompt": "?", "images": ["red.png"]}).images

    def test_fields_of_a_prompt_name_its_images(self, red):
        found = self.read(red, {"prompt": "?", "images": ["red.png"]})
        assert fields_of(found)["images"] == [str(red / "red.png")]
