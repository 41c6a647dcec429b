"""Whole runs on prompts with images."""

import base64
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import vision_families
import vision_testing
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import TINY
from transformers import Qwen2VLImageProcessorPil

from kimi_core.metrics import read_metrics
from kimi_core.models import scratch
from kimi_core.models.vision_load import load_images
from kimi_core.run.build import build
from kimi_core.run.config_file import load_config
from kimi_core.run.dry_run import describe
from kimi_core.run.previews import sampled_previews
from kimi_core.run.run import fine_tune_alone, train

SETTINGS = [
    "model.name=model",
    "prompts.source=pictures.jsonl",
    "sft.data=sft.jsonl",
    "sft.steps=3",
    "sft.batch_size=8",
    "rollout.token_budget=5",
    "rollout.prompts_per_iteration=6",
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny.toml").write_text(TINY)
    vision_testing.write_data(tmp_path)
    vision_testing.save_model(tmp_path / "model")
    return tmp_path


def config(*settings: str):
    return load_config("tiny.toml", [*SETTINGS, *settings])


class TestRun:
    def test_trains_the_tower_and_records_the_images(self, folder):
        run = train(config("iterations=3", "trainer.learning_rate=1e-3"))
        iterations, evaluations = read_metrics(run / "metrics.jsonl")
        assert len(iterations) == 3
        assert max(one.logprob_gap_mean for one in iterations) < 1e-5
        assert sum(one.trajectories_unfinished for one in iterations) > 0
        assert evaluations[-1].n == 4
        before = load_file(folder / "model" / "model.safetensors")
        after = load_file(run / "checkpoint" / "model.safetensors")
        moved = {name for name in before if not np.array_equal(before[name], after[name])}
        assert any("vision_tower" in name for name in moved)
        assert any("multi_modal_projector" in name for name in moved)
        lines = (run / "trajectories" / "000002.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        for one in records:
            negative = {token for token in one["prompt_ids"] if token < 0}
            assert len(negative) == len(set(one["images"]))
        digests = {digest for one in records for digest in one["images"]}
        assert digests and digests <= {path.stem for path in (run / "images").iterdir()}
        samples = (run / "samples" / "000003.txt").read_text()
        for _, _, path in sampled_previews(samples):
            assert (run / path).is_file()
        assert "\nimage images/" in samples
        board = EventAccumulator(str(run / "tensorboard")).Reload()
        assert board.Tags()["images"]

    def test_a_checkpoint_brings_its_processor(self, folder):
        checkpoint = fine_tune_alone(config())
        again = config(f"model.name={checkpoint}", "name=again", "sft.steps=0")
        assert read_metrics(train(again) / "metrics.jsonl")[0]

    def test_the_time_is_said_to_be_without_images(self, folder):
        [line] = [one for one in describe(config("iterations=9000")).splitlines() if "Time" in one]
        assert line.endswith("without rewards and the reading of images.")

    def test_an_image_that_changed_between_two_calls_is_not_resumed(self, folder):
        train(config())
        (folder / "0.png").write_bytes((folder / "1.png").read_bytes())
        with pytest.raises(ValueError, match=r"prompts have changed|Changed since"):
            train(config("iterations=3"), resume=True)

    def test_dry_run_counts_what_is_kept_of_images(self, folder):
        [line] = [one for one in describe(config()).splitlines() if "#   images" in one]
        parts = build(config())
        numbers = range(len(vision_testing.COLOURS))
        pixels = sum(parts.images.pixels(n)["pixel_values"].nbytes for n in numbers)
        features = sum(parts.images.places(n) for n in numbers) * 16 * 4
        parts.close()
        assert float(line.split()[-1]) == pytest.approx((pixels + features) / 1e6, abs=0.05)

    def test_a_text_model_refuses_images(self, text_model):
        with pytest.raises(ValueError, match="has images, and the model reads text only"):
            build(load_config("tiny.toml", ["prompts.source=pictures.jsonl", "model.name=text"]))

    @pytest.mark.parametrize("axis", ["tensor_parallel", "context_parallel"])
    def test_ranks_that_divide_a_row_or_a_layer_are_refused(self, folder, axis):
        model, _ = vision_testing.tiny()
        with pytest.raises(ValueError, match=rf"reads images, which .*trainer\.{axis} = 2"):
            load_images(model, config("trainer.ranks=2", f"trainer.{axis}=2"))

    @pytest.mark.slow
    def test_two_ranks_train_what_one_trains(self, folder):
        """Only rank 0 reads images; the other is sent pixels, in SFT and in RL."""
        settings = ["iterations=2", "trainer.learning_rate=1e-3", "trainer.weight_decay=0.1"]
        one = train(config(*settings))
        two = train(config(*settings, "name=two", "trainer.ranks=2"))
        expected, found = (read_metrics(run / "metrics.jsonl")[0] for run in (one, two))
        for mine, theirs in zip(expected, found, strict=True):
            assert theirs.loss == pytest.approx(mine.loss, rel=1e-4, abs=1e-6)
            assert theirs.grad_norm == pytest.approx(mine.grad_norm, rel=1e-4, abs=1e-6)
            assert theirs.logprob_gap_mean < 1e-5
        files = [load_file(run / "checkpoint" / "model.safetensors") for run in (one, two)]
        assert files[0].keys() == files[1].keys()
        for name, value in files[0].items():
            if "vision_tower" in name and "k_proj.bias" in name:
                continue  # It shifts all scores alike, so its gradient is rounding.
            np.testing.assert_allclose(files[1][name], value, atol=1e-4, err_msg=name)

    @pytest.mark.nightly
    def test_images_of_examples_alone_are_checked_before_ranks_divide_the_model(self, folder):
        Path("words.jsonl").write_text(
            "".join(json.dumps({"prompt": f"{n}=", "answer": "1"}) + "\n" for n in range(24))
        )
        checkpoint = fine_tune_alone(config("prompts.source=words.jsonl", "trainer.ranks=2"))
        assert (checkpoint / "standardised_images.json").is_file()


def test_a_model_with_m_rope_and_deepstack_trains_and_its_checkpoint_goes_on(folder):
    model, _ = vision_families.built("Qwen3-VL", vision_start_token_id=61, vision_end_token_id=62)
    model.save_pretrained("qwen")
    scratch.character_tokenizer(vision_testing.ALPHABET).save_pretrained("qwen")
    sizes = {"patch_size": 8, "merge_size": 2, "min_pixels": 16 * 16, "max_pixels": 48 * 48}
    Qwen2VLImageProcessorPil(**sizes).save_pretrained("qwen")
    reward = "def reward(prompt, response):\n    return float(sum(map(ord, response)) % 2)\n"
    Path("reward.py").write_text(reward)
    settings = ["model.name=qwen", "sft.data=none", "reward.function=reward.py:reward"]
    run = train(config(*settings, "iterations=3", "trainer.learning_rate=1e-3"))
    iterations, _ = read_metrics(run / "metrics.jsonl")
    assert 0 < np.nanmax([one.logprob_gap_mean for one in iterations]) < 1e-5
    assert sum(one.trajectories_unfinished for one in iterations) > 0
    before, after = (
        load_file(at / "model.safetensors") for at in (folder / "qwen", run / "checkpoint")
    )
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert any("visual.patch_embed" in name for name in moved)
    assert any("deepstack" in name for name in moved)
    lines = "".join(path.read_text() for path in (run / "trajectories").iterdir()).splitlines()
    ids = next(one["prompt_ids"] for one in map(json.loads, lines) if one["images"])
    # 40 x 24 pixels become 32 x 32, cut into 4 x 4 patches, of which 2 x 2 make a place.
    assert ids[:6] == [61, *[ids[1]] * 4, 62] and ids[1] < 0
    more = config(*settings, "name=more", f"model.name={run / 'checkpoint'}")
    assert read_metrics(train(more) / "metrics.jsonl")[0]


@pytest.fixture
def text_model(folder):
    from kimi_core.models.load import load_model

    sizes = vision_testing.SIZES.model_copy(update={"vision_layers": 0})
    given = load_config(None).model.model_copy(update={"scratch": sizes, "device": "cpu"})
    model, tokenizer = load_model(given, alphabet=vision_testing.ALPHABET)
    model.save_pretrained("text")
    tokenizer.save_pretrained("text")


def line(**fields) -> str:
    return json.dumps({"prompt": "1=", "answer": "1"} | fields) + "\n"


def uri(name: str) -> str:
    return "data:image/png;base64," + base64.b64encode(Path(name).read_bytes()).decode()


class TestBadLines:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"images": "0.png"}, 'images are "0.png"; allowed are'),
            ({"images": ["0.png", "missing.png"]}, r"No image .*missing\.png"),
            ({"images": ["pictures.jsonl"]}, "is not an image that can be read"),
            ({"prompt": "\ufffc\ufffc1=", "images": ["0.png"]}, "1 images have 2 places"),
            ({"prompt": "", "images": []}, '"prompt" is ""; allowed is a non-empty string'),
        ],
    )
    def test_the_line_is_named_before_anything_is_trained(self, folder, fields, message):
        bad = line(images=["0.png"]) + line(**fields)
        Path("pictures.jsonl").write_text(bad)
        with pytest.raises(ValueError, match=f"pictures.jsonl, line 2: .*{message}"):
            train(config())
        assert not Path("runs").exists()


@pytest.mark.nightly
def test_a_run_on_text_loads_no_vision_model():
    source = (
        "import sys\n"
        "from kimi_core.run.build import build\n"
        "from kimi_core.run.config_file import load_config\n"
        "settings = ['model.device=cpu', 'model.scratch.layers=1', 'prompts.held_out=4']\n"
        "build(load_config(None, settings)).close()\n"
        "names = ('models.llava', 'models.clip', 'processing_auto')\n"
        "print([name for name in sys.modules if any(one in name for one in names)])\n"
    )
    command = [sys.executable, "-c", source]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
