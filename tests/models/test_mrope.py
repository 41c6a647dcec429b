"""M-RoPE positions and deepstack: as the model itself has them, wherever tokens lie."""

import numpy as np
import pytest
import torch
from vision_families import IMAGE, built

from kimi_core.models.images import image_of_pixels
from kimi_core.models.inputs import in_space, span_of
from kimi_core.models.vision_check import own_logprobs
from kimi_core.rollout.texts import complete
from kimi_core.rollout.torch import engine as torch_engine
from kimi_core.rollout.torch.engine import TorchEngine
from kimi_core.trainer.packing import micro_batches
from kimi_core.trainer.policy import Policy
from kimi_core.trainer.sft import pack_examples
from kimi_core.types import Prompt, Request, Sampling

NAMES = ("Qwen2.5-VL", "Qwen3-VL")
SIZES = ((64, 64), (64, 128), (96, 32), (64, 64))
"""Height and width of four images, of 4, 8, 3 and 4 places."""

SAMPLING = Sampling(1.0, seed=3, stop_token_ids=frozenset([IMAGE]))


class Parts:
    """A tiny model with everything that reads images, and prompts with none, one, and two."""

    def __init__(self, name: str) -> None:
        self.model, self.images = built(name)
        rng = np.random.default_rng(0)
        made = [
            image_of_pixels(rng.integers(256, size=(*size, 3), dtype=np.uint8)) for size in SIZES
        ]
        self.images.add([Prompt(0, "", "", images=tuple(made))])
        square, wide, high, other = map(self.images.ids, made)
        contexts = [
            [*wide, 5, 6, 7],
            [4, *high, 5, *wide, *square, 6],
            [4, 5, *square, 6],
            [4, 5, *other, 6],
            [7, 8, 9],
        ]
        self.contexts = [np.array(one, np.int32) for one in contexts]
        self.engine = TorchEngine(self.model, batch_rows=16, images=self.images)
        self.policy = Policy(self.model, temperature=1.0, head_chunk=16, images=self.images)

    def responses(self, tokens: int = 8) -> list[np.ndarray]:
        answers = complete(self.engine, self.contexts, SAMPLING, max_tokens=tokens)
        return [np.append(c, a.token_ids) for c, a in zip(self.contexts, answers, strict=True)]


@pytest.fixture(scope="module", params=NAMES)
def parts(request):
    return Parts(request.param)


def apart(ids: np.ndarray) -> bool:
    """Whether text separates all images, without which the model's own positions go wrong."""
    image = ids < 0
    return not np.any(image[1:] & image[:-1] & (ids[1:] != ids[:-1]))


class TestPositions:
    def test_are_those_of_the_model_itself_wherever_a_sequence_lies(self, parts):
        spans = {n: parts.images._span(parts.model, n) for n in range(len(SIZES))}
        whole = [ids for ids in parts.contexts if apart(ids)]
        row = np.concatenate([*whole, np.zeros(4, np.int32)])
        plain = np.concatenate([*(np.arange(len(ids)) for ids in whole), np.arange(4)])
        found = in_space(torch.tensor(row[None]), torch.tensor(plain[None]), spans)[:, 0].numpy()
        assert np.array_equal(found[0], plain)
        column = 0
        for ids in whole:
            own = self._own(parts, ids)
            assert np.array_equal(found[1:, column : column + len(ids)], own)
            column += len(ids)
        assert np.array_equal(found[1:, column:], np.tile(np.arange(4), (3, 1)))

    def _own(self, parts, ids: np.ndarray) -> np.ndarray:
        numbers = list(dict.fromkeys((-1 - ids[ids < 0]).tolist()))
        if not numbers:
            return np.tile(np.arange(len(ids)), (3, 1))
        grids = torch.cat([parts.images.pixels(n)["image_grid_thw"] for n in numbers])
        ids = torch.tensor(np.where(ids < 0, IMAGE, ids)[None].astype(np.int64))
        positions, _ = parts.model.base_model.get_rope_index(
            input_ids=ids, mm_token_type_ids=(ids == IMAGE).long(), image_grid_thw=grids
        )
        return positions[:, 0].numpy()

    def test_an_image_advances_by_its_larger_side(self, parts):
        grids = {(4, 4): (4, -2), (4, 8): (8, -4), (6, 2): (3, 0)}
        for (height, width), (places, shift) in grids.items():
            span = span_of(parts.model, places, torch.tensor([[1, height, width]]))
            assert span.shift == shift and span.offsets.shape == (3, places)


class TestAgreement:
    def test_engine_and_trainer_agree_with_the_models_own_forward_pass(self, parts):
        answers = complete(parts.engine, parts.contexts, SAMPLING, max_tokens=8)
        whole = [np.append(c, a.token_ids) for c, a in zip(parts.contexts, answers, strict=True)]
        assert sum(map(len, answers)) > 20
        for ids, answer, (_, ours) in zip(
            whole, answers, parts.policy.on_sequences(whole), strict=True
        ):
            assert np.abs(answer.logprobs - ours[-len(answer) :]).max() < 1e-5
            if apart(ids):
                theirs = own_logprobs(parts.model, parts.images, ids)
                assert np.abs(ours - theirs).max() < 1e-5

    def test_prompts_that_differ_only_in_the_image_are_not_merged(self, parts):
        one, other = parts.contexts[2:4]
        assert np.array_equal(one[one >= 0], other[other >= 0])
        greedy = Sampling(0, seed=0, stop_token_ids=frozenset())
        first, second = complete(parts.engine, [one, other], greedy, max_tokens=1)
        assert abs(first.logprobs[0] - second.logprobs[0]) > 1e-4

    @pytest.mark.parametrize("chunk", [4096, 5])
    def test_budget_cut_responses_and_cut_prefills_have_the_same_tokens(
        self, parts, monkeypatch, chunk
    ):
        whole = parts.responses(9)
        monkeypatch.setattr(torch_engine, "PREFILL_TOKENS", chunk)
        grown = [list(context) for context in parts.contexts]
        open_ = set(range(len(grown)))
        for done in (0, 4, 8):
            requests = [
                Request(i, np.array(grown[i], np.int32), len(parts.contexts[i]), 4, 9 - done)
                for i in sorted(open_)
            ]
            for some in parts.engine.generate(requests, SAMPLING):
                for one in some:
                    grown[one.trajectory_id] += one.token_ids.tolist()
                    if one.end_reason:
                        open_.discard(one.trajectory_id)
        assert grown == [ids.tolist() for ids in whole]

    @pytest.mark.parametrize("masks", [0, 512])
    def test_shared_prompts_have_the_log_probs_and_gradients_of_repeated_ones(self, parts, masks):
        responses = [np.array([5 + n, 9, 6], np.int32) for n in range(3)]
        batch = pack_examples([(c, one) for c in parts.contexts for one in responses])
        weight = parts.model.base_model.visual.patch_embed.proj.weight
        found = []
        for share in (True, False):
            parts.model.zero_grad()
            logprobs = np.zeros(len(batch.token_ids))
            for micro in micro_batches(
                batch,
                batch.mask > 0,
                range(len(batch)),
                max_tokens=10_000,
                layout=parts.policy.layout,
                share_prompts=share,
                masks_up_to=masks,
            ):
                own = parts.policy.logprobs(micro)
                own.sum().backward()
                logprobs[micro.source_t.numpy()] = own.detach().double().numpy()
            found.append((logprobs, weight.grad.clone()))
        (shared, gradient), (repeated, expected) = found
        assert np.abs(shared - repeated).max() < 1e-5
        assert expected.abs().max() > 0
        assert (gradient - expected).norm() < 1e-4 * expected.norm()
        parts.model.zero_grad()


def test_a_model_that_numbers_images_in_another_way_is_refused(parts):
    images = built(NAMES[0])[1]
    images.add([Prompt(0, "", "", images=(image_of_pixels(np.zeros((64, 64), np.uint8)),))])
    pixels = dict(images.pixels(0))
    images._pixels.put(0, {"pixel_values": pixels["pixel_values"]})
    ids = torch.tensor([[-1] * 4 + [3]])
    with pytest.raises(ValueError, match="numbers the places of images in a way that is not known"):
        images.shift(parts.model, ids[0].numpy())
