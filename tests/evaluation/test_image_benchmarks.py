"""MathVista and MMMU: lines as they are published, with images in files and in Parquet."""

import json

import numpy as np
import pytest

from kimi_core import cli
from kimi_core.config import ModelConfig, RewardConfig
from kimi_core.evaluation.benchmarks import files_of, load_benchmark, reward_of
from kimi_core.models.images import image_of_pixels
from kimi_core.models.load import load_model
from kimi_core.types import IMAGE_MARK

pytest.importorskip("PIL", reason="pillow is not installed: kimi-core[vision]")
from vision_testing import SIZES, standardised  # It needs pillow.

PICTURES = [image_of_pixels(np.full((4, 5), 60 * number, np.uint8)) for number in range(3)]

FREE = {
    "pid": "1",
    "question": "When a spring does work on an object, how far is it pressed?",
    "image": "images/0.png",
    "choices": None,
    "unit": None,
    "precision": 1.0,
    "answer": "1.2",
    "question_type": "free_form",
    "answer_type": "float",
    "metadata": {"task": "textbook question answering", "skills": ["scientific reasoning"]},
    "query": "Hint: ...",
}
CHOICE = FREE | {
    "question": "Which bar is higher?",
    "image": "images/1.png",
    "choices": ["red", "blue"],
    "answer": "blue",
    "question_type": "multi_choice",
    "precision": None,
}
MMMU = {
    "id": "validation_Accounting_1",
    "question": "<image 1> Baxter Company has the data above. Which chart fits, given <image 2>?",
    "options": "['$6', 'none', '<image 1>']",
    "image_1": "images/0.png",
    "image_2": "images/1.png",
    "image_3": None,
    "answer": "B",
    "question_type": "multiple-choice",
    "subfield": "Managerial Accounting",
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for number, picture in enumerate(PICTURES):
        (tmp_path / "images" / f"{number}.png").write_bytes(picture.source)
    return tmp_path


def read(folder, name, *lines):
    path = folder / "test.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return load_benchmark(name, files_of(name, path))


def test_mathvista(folder):
    free, choice = read(folder, "mathvista", FREE, CHOICE)
    assert free.answer == "1.2" and "Round to 1 decimal" in free.text and "boxed" in free.text
    assert choice.answer == "B" and "B) blue" in choice.text
    assert free.tags == {"subject": "textbook question answering", "judged": "math"}
    assert [*free.images, *choice.images] == PICTURES[:2]


def test_each_is_judged_in_its_way(folder):
    pytest.importorskip("math_verify", reason="math-verify is not installed: kimi-core[math]")
    free, choice = read(folder, "mathvista", FREE, CHOICE)
    reward = reward_of("mathvista", RewardConfig())
    try:
        assert reward(free, "So \\boxed{1.20}") == 1.0 and reward(free, "\\boxed{1.3}") == 0.0
        assert reward(choice, "Answer: B") == 1.0 and reward(choice, "Answer: A") == 0.0
    finally:
        reward.close()


def test_mmmu_has_images_in_its_places(folder):
    (prompt,) = read(folder, "mmmu", MMMU)
    assert prompt.text.count(IMAGE_MARK) == 3 and prompt.text.startswith(f"{IMAGE_MARK} Baxter")
    assert list(prompt.images) == [PICTURES[0], PICTURES[1], PICTURES[0]]
    assert (prompt.answer, prompt.tags["subject"]) == ("B", "Managerial Accounting")
    (open_one,) = read(
        folder, "mmmu", MMMU | {"options": "[]", "answer": "7", "question": "How many?"}
    )
    assert open_one.tags["judged"] == "math" and list(open_one.images) == PICTURES[:2]


def test_parquet_as_it_is_downloaded(folder):
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed: kimi-core[data]")
    from pyarrow import parquet

    image = {"bytes": PICTURES[2].source, "path": None}
    rows = [CHOICE | {"decoded_image": image, "metadata": {"task": "figure question answering"}}]
    parquet.write_table(arrow.Table.from_pylist(rows), folder / "testmini.parquet")
    (prompt,) = load_benchmark("mathvista", files_of("mathvista", folder))
    assert list(prompt.images) == [PICTURES[2]] and prompt.answer == "B"


@pytest.mark.parametrize(
    ("name", "line", "said"),
    [
        ("mathvista", CHOICE | {"answer": "green"}, "none of 2 choices"),
        ("mathvista", FREE | {"image": "images/9.png"}, "No image"),
        ("mmmu", MMMU | {"options": "['a', "}, "line 1 is not in the format of mmmu"),
        ("mmmu", MMMU | {"question": "<image 7>?"}, "KeyError: 'image_7'"),
        ("mmmu", MMMU | {"answer": "E"}, "none of 3 options"),
    ],
)
def test_bad_lines_are_named(folder, name, line, said):
    with pytest.raises(ValueError, match=said):
        read(folder, name, line)


def test_a_model_that_reads_images_is_asked(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    sizes = SIZES.model_copy(update={"context": 512})
    alphabet = "".join(map(chr, range(32, 127))) + "\n"
    model, tokenizer = load_model(ModelConfig(scratch=sizes, device="cpu"), alphabet=alphabet)
    model.save_pretrained("model")
    tokenizer.save_pretrained("model")
    standardised().save(folder / "model")
    (folder / "test.jsonl").write_text(
        json.dumps(CHOICE) + "\n" + json.dumps(CHOICE | {"pid": "2"})
    )
    asked = ["evaluate", "--benchmark", "mathvista", "--data", "test.jsonl", "--samples", "2"]
    settings = ["model.name=model", "model.device=cpu", "prompts.chat=false", "reward.workers=1"]
    assert cli.main([*asked, *settings, "rollout.max_response_tokens=6"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["problems"], found["samples"]) == (2, 2) and "maj@2" in found
