"""Families of vision-language models, tiny and with random weights: exact with images, or refused.

The truth is each model's own forward pass with pixels. ``docs/vision.md`` has the table.
"""

import pytest
import transformers as hf
from vision_families import FAMILIES, built

from kimi_core.rollout.torch.engine import TorchEngine
from kimi_core.run.build import check_images
from kimi_core.trainer.policy import Policy
from kimi_core.weights.publish import module_to_read

REFUSED = {
    "AyaVision": "Cannot train|cannot read images",
    "Ovis2": "cannot read images",
    "PaliGemma": "cannot run|Cannot train|cannot read images",
    "Gemma 3": "cannot read images .*attend to each other",
}
"""Name → what the error says."""


def load(name: str):
    """The model with trainer and engine, and the check of both."""
    try:
        model, images = built(name)
    except (ValueError, AttributeError, KeyError) as error:
        if tuple(map(int, hf.__version__.split(".")[:2])) >= (5, 24):
            raise
        pytest.skip(f"this transformers cannot build it: {error}")
    policy = Policy(model, temperature=1.0, head_chunk=16, images=images)
    engine = TorchEngine(module_to_read(model), batch_rows=4, images=images)
    check_images(model, images, policy, engine)
    return policy


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in REFUSED])
def test_exact(name):
    assert load(name).layout == "end_to_end"


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name):
    with pytest.raises(ValueError, match=REFUSED[name]):
        load(name)
