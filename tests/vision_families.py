"""Families of vision-language models, tiny and with random weights, and processors for them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from kimi_core.models.processors import PLACE
from kimi_core.models.vision import Images

WIDTH, VOCABULARY, IMAGE = 32, 64, 63
TEXT = dict(
    vocab_size=VOCABULARY,
    hidden_size=WIDTH,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
TOWER = dict(
    hidden_size=WIDTH,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=32,
    patch_size=8,
)


class Made:
    """A processor of square pictures whose input has one of the usual shapes."""

    def __init__(self, places: int, shaped: Callable[[torch.Tensor], dict[str, torch.Tensor]]):
        self._places, self._shaped = places, shaped

    def __call__(self, picture: Any):
        levels = np.array(picture.resize((32, 32)), np.float32)
        pixels = torch.from_numpy(levels).permute(2, 0, 1)[None] / 64 - 2
        return [PLACE] * self._places, self._shaped(pixels)

    def settings(self) -> str:
        return "made up"

    def save(self, folder) -> None: ...


def plain(pixels):
    return {"pixel_values": pixels}


def tiled(pixels):
    return {"pixel_values": pixels[:, None]}


def sized(pixels):
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[32, 32]])}


class Cut:
    """A processor of pictures of any shape, in patches of 8 pixels in blocks of 2 x 2, as those of
    Qwen-VL cut them: each flat, for ``frames`` moments; 0: as it is."""

    SIDE = 8

    def __init__(self, frames: int) -> None:
        self._frames = frames

    def __call__(self, picture: Any):
        height, width = (max(16, size // 32 * 16) for size in picture.size[::-1])
        levels = np.array(picture.resize((width, height)), np.float32)
        rows, columns = height // self.SIDE, width // self.SIDE
        blocks = torch.from_numpy(levels).permute(2, 0, 1) / 64 - 2
        blocks = blocks.unflatten(2, (columns // 2, 2, self.SIDE))
        blocks = blocks.unflatten(1, (rows // 2, 2, self.SIDE))
        patches = blocks.permute(1, 4, 2, 5, 0, 3, 6).reshape(-1, 3, 1, self.SIDE, self.SIDE)
        flat = patches.expand(-1, -1, self._frames, -1, -1).flatten(1)
        pixels = flat if self._frames else patches[:, :, 0]
        grid = torch.tensor([[1, rows, columns]])
        return [PLACE] * (rows * columns // 4), {"pixel_values": pixels, "image_grid_thw": grid}

    def settings(self) -> str:
        return "made up"

    def save(self, folder) -> None: ...


def tiles(pixels):
    """The whole and four parts of a picture of twice the side."""
    parts = [pixels, pixels.flip(2), pixels.flip(3), pixels.roll(8, 2), pixels.roll(8, 3)]
    return {"pixel_values": torch.cat(parts)[None], "image_sizes": torch.tensor([[64, 64]])}


def moon(pixels):
    n = 32 // 8
    cut = pixels[0].unflatten(2, (n, 8)).unflatten(1, (n, 8)).permute(1, 3, 0, 2, 4)
    return {
        "pixel_values": cut.reshape(n * n, 3, 8, 8),
        "image_grid_thw": torch.tensor([[1, n, n]]),
    }


def text(kind: str, **more):
    return {"model_type": kind} | TEXT | more


def tower(kind: str, **more):
    return {"model_type": kind} | TOWER | more


QWEN_TOWER = dict(
    depth=2, hidden_size=WIDTH, intermediate_size=48, num_heads=4, patch_size=8,
    spatial_merge_size=2, temporal_patch_size=2, out_hidden_size=WIDTH,
)  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}

FAMILIES: dict[str, tuple[str, dict[str, Any], Made | Cut]] = {
    "LLaVA, SigLIP": (
        "llava",
        dict(
            vision_config=tower("siglip_vision_model"),
            text_config=text("llama"),
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
        ),
        Made(16, plain),
    ),
    "LLaVA, CLIP": (
        "llava",
        dict(vision_config=tower("clip_vision_model"), text_config=text("llama")),
        Made(16, plain),
    ),
    "LLaVA-NeXT": (
        "llava_next",
        dict(
            vision_config=tower("clip_vision_model", patch_size=16),
            text_config=text("llama"),
            image_grid_pinpoints=[[64, 64]],
        ),
        Made(24, tiles),
    ),
    "LLaVA-OneVision": (
        "llava_onevision",
        dict(
            vision_config=tower("siglip_vision_model", patch_size=16),
            text_config=text("qwen2"),
            image_grid_pinpoints=[[64, 64]],
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
        ),
        Made(24, tiles),
    ),
    "Idefics3": (
        "idefics3",
        dict(vision_config=tower("idefics3_vision"), text_config=text("llama"), scale_factor=2),
        Made(4, tiled),
    ),
    "SmolVLM": (
        "smolvlm",
        dict(vision_config=tower("smolvlm_vision"), text_config=text("llama"), scale_factor=2),
        Made(4, tiled),
    ),
    "InternVL": (
        "internvl",
        dict(
            vision_config=tower("internvl_vision", image_size=[32, 32], patch_size=[8, 8]),
            text_config=text("qwen2"),
            downsample_ratio=0.5,
        ),
        Made(4, plain),
    ),
    "Mistral3": (
        "mistral3",
        dict(
            vision_config=tower("pixtral", head_dim=8),
            text_config=text("mistral", sliding_window=None),
            spatial_merge_size=2,
            vision_feature_layer=-1,
        ),
        Made(4, sized),
    ),
    "Kimi_K25": (
        "kimi_k25",
        dict(
            vision_config={
                k: v for k, v in TOWER.items() if k != "image_size"
            } | dict(model_type="kimi_k25_vision", pos_emb_height=8, pos_emb_width=8),
            text_config=text("llama"),
            projection_hidden_size=WIDTH,
        ),
        Made(4, moon),
    ),
    "AyaVision": (
        "aya_vision",
        dict(
            vision_config=tower("siglip_vision_model"),
            text_config=text("cohere2", sliding_window=64),
            vision_feature_layer=-1,
        ),
        Made(4, plain),
    ),
    "Qwen2-VL": (
        "qwen2_vl",
        dict(
            vision_config=dict(
                depth=2, embed_dim=WIDTH, hidden_size=WIDTH, mlp_ratio=2, num_heads=4, patch_size=8
            ),
            text_config=text("qwen2_vl_text", rope_parameters=MROPE),
        ),
        Cut(2),
    ),
    "Qwen2.5-VL": (
        "qwen2_5_vl",
        dict(
            vision_config=QWEN_TOWER | dict(window_size=32, fullatt_block_indexes=[1]),
            text_config=text("qwen2_5_vl_text", rope_parameters=MROPE),
        ),
        Cut(2),
    ),
    "Qwen3-VL": (
        "qwen3_vl",
        dict(
            vision_config=QWEN_TOWER
            | dict(deepstack_visual_indexes=[0, 1], num_position_embeddings=16),
            text_config=text("qwen3_vl_text", rope_parameters=MROPE),
        ),
        Cut(2),
    ),
    "GLM-4.1V": (
        "glm4v",
        dict(
            vision_config=QWEN_TOWER | dict(image_size=32),
            text_config=text("glm4v_text", rope_parameters=MROPE),
        ),
        Cut(2),
    ),
    "PaddleOCR-VL": (
        "paddleocr_vl",
        dict(
            vision_config=tower("paddleocr_vl_vision"),
            text_config=text("paddleocr_vl_text", rope_parameters=MROPE),
        ),
        Cut(0),
    ),
    "Ovis2": (
        "ovis2",
        dict(
            vision_config=TOWER
            | dict(hidden_stride=2, vocab_size=VOCABULARY, num_visual_indicator_tokens=5),
            text_config=text("qwen2"),
            visual_indicator_token_ids=[58, 59, 60, 61, 62],
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
        ),
        Made(4, plain),
    ),
    "PaliGemma": (
        "paligemma",
        dict(
            vision_config=tower("siglip_vision_model", projection_dim=WIDTH),
            text_config=text("gemma"),
        ),
        Made(16, plain),
    ),
    "Gemma 3": (
        "gemma3",
        dict(
            vision_config=tower("siglip_vision_model"),
            text_config=text("gemma3_text", sliding_window=64),
            mm_tokens_per_image=4,
        ),
        Made(4, plain),
    ),
}  # fmt: skip
"""Name → model type, settings, processor."""


def built(name: str, **more: int):
    """The model and an empty table of images; ``more`` goes into its config."""
    kind, settings, processor = FAMILIES[name]
    known = {"image_token_id": IMAGE, "image_token_index": IMAGE, "tie_word_embeddings": False}
    config = AutoConfig.for_model(kind, **settings, **known, **more)
    config.image_token_id = IMAGE
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model, Images(lambda: processor)
