"""``images/``: what people see of the images of a run's prompts."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from vision_testing import picture, table

from kimi_core.config import TrajectoriesConfig
from kimi_core.dashboard.pictures import picture as shown
from kimi_core.models.images import checked, preview
from kimi_core.run.previews import sampled_previews
from kimi_core.run.tensorboard import TensorBoard
from kimi_core.run.trajectories import TrajectoryFiles, TrajectoryRecord
from kimi_core.types import Prompt

RECORD = TrajectoryRecord(
    iteration=1,
    trajectory_id=0,
    group_id=0,
    prompt_id=0,
    prompt="1=",
    answer="1",
    response="1",
    end_reason="stop",
    versions=[(0, 1)],
)


def files(folder: Path, *pictures, **settings) -> TrajectoryFiles:
    images = table()
    images.add([Prompt(0, "", "", images=pictures)])
    return TrajectoryFiles(folder, TrajectoriesConfig(**settings), images=images)


def encoded(kind: str, size: tuple[int, int], **more) -> bytes:
    levels = np.random.default_rng(0).integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Pillow.fromarray(levels).save(stream, kind, **more)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("kind", "size", "expected"),
    [
        ("PNG", (32, 32), (32, 32)),
        ("JPEG", (1500, 750), (512, 256)),
        ("WEBP", (3, 2000), (1, 512)),  # Never thinner than a pixel.
    ],
)
def test_a_preview_is_a_small_png_of_the_pixels_alone(tmp_path, kind, size, expected):
    secret = b"a colour profile, or what calls itself one"
    content = encoded(kind, size, icc_profile=secret)
    with Pillow.open(io.BytesIO(content)) as given:
        assert given.info["icc_profile"] == secret
    made = preview(checked(content + b"<script>"))
    assert b"script" not in made
    with Pillow.open(io.BytesIO(made)) as found:
        assert "icc_profile" not in found.info
        assert (found.format, found.mode, found.size) == ("PNG", "RGB", expected)
    (tmp_path / "images").mkdir()
    digest = checked(content).digest
    (tmp_path / "images" / f"{digest}.png").write_bytes(made)
    assert shown(tmp_path, digest) == made


def test_a_preview_of_a_small_image_has_its_pixels(tmp_path):
    one = picture(1)
    with Pillow.open(io.BytesIO(preview(one))) as found, Pillow.open(io.BytesIO(one.source)) as own:
        assert np.array_equal(np.asarray(found), np.asarray(own))


def test_each_image_of_the_records_that_are_written_has_one(tmp_path):
    a, b, c = map(picture, range(3))
    made = files(tmp_path, a, b, c, every=2)
    made.write(1, [replace(RECORD, images=[c.digest])])
    assert not (tmp_path / "images").exists()
    made.write(2, [replace(RECORD, images=[a.digest]), replace(RECORD, images=[a.digest])])
    made.write_samples(3, [replace(RECORD, images=[b.digest, "0" * 64])])
    there = {path.name for path in (tmp_path / "images").iterdir()}
    assert there == {f"{a.digest}.png", f"{b.digest}.png"}


def test_a_run_without_images_makes_no_folder(tmp_path):
    TrajectoryFiles(tmp_path, TrajectoriesConfig()).write(1, [RECORD])
    files(tmp_path).write_samples(1, [RECORD])
    assert not (tmp_path / "images").exists()


def test_a_file_that_changed_has_no_preview_and_stops_nothing(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(picture(1).source)
    made = files(tmp_path, checked(path))
    digest = checked(path).digest
    path.write_bytes(picture(2).source)
    made.write(1, [replace(RECORD, images=[digest])])
    assert list((tmp_path / "images").iterdir()) == []


def test_samples_and_tensorboard_show_them(tmp_path):
    a, b = map(picture, range(2))
    hostile = f"1\nimage images/{'e' * 64}.png\n--- 9: reward 1"
    records = [
        replace(RECORD, response=hostile),
        replace(RECORD, images=[a.digest, b.digest]),
    ]
    files(tmp_path, a, b).write_samples(4, records)
    text = (tmp_path / "samples" / "000004.txt").read_text()
    lines = f"image images/{a.digest}.png\nimage images/{b.digest}.png\n"
    assert f"prompt\n  | 1=\n{lines}response\n" in text
    expected = [(2, 1, f"images/{a.digest}.png"), (2, 2, f"images/{b.digest}.png")]
    assert list(sampled_previews(text)) == expected
    (tmp_path / "images" / f"{b.digest}.png").write_bytes(b"")  # As a power cut leaves it.
    TensorBoard(tmp_path, [], [], {}, done=4).close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["images"] == ["samples/2-1"]
    (event,) = events.Images("samples/2-1")
    assert (event.step, event.width, event.height) == (4, 32, 32)
