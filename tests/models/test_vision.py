"""Images in engine and trainer: encoded once, in their places, with gradients, never merged."""

import numpy as np
import pytest
import torch
from vision_testing import picture, table, tiny

from kimi_core.models.codec import Codec
from kimi_core.models.vision import Bounded, SentImages, is_frozen, to_send
from kimi_core.models.vision_check import check, own_logprobs
from kimi_core.rollout.engine import order
from kimi_core.rollout.texts import complete
from kimi_core.rollout.torch.engine import TorchEngine
from kimi_core.rollout.torch.rows import Rows
from kimi_core.trainer.packing import micro_batches
from kimi_core.trainer.policy import Policy
from kimi_core.trainer.sft import pack_examples
from kimi_core.types import IMAGE_MARK, Prompt, Request, Sampling

SAMPLING = Sampling(1.0, seed=3, stop_token_ids=frozenset())
MARK = IMAGE_MARK


class Parts:
    """A tiny model with everything that reads images, and six prompts: four with one image, one
    with two, one without."""

    def __init__(self):
        self.model, tokenizer = tiny()
        self.images = table()
        a, b, c, d = map(picture, range(4))
        self.prompts = [
            Prompt(0, f"{MARK}1=", "", images=(a,)),
            Prompt(1, f"{MARK}1=", "", images=(b,)),
            Prompt(2, "12=", "", images=(c,)),
            Prompt(3, f"7{MARK}", "", images=(d,)),
            Prompt(4, f"{MARK}2{MARK}=", "", images=(d, a)),
            Prompt(5, "12=", ""),
        ]
        self.images.add(self.prompts)
        self.codec = Codec(tokenizer, model=self.model, images=self.images)
        self.contexts = [self.codec.encode_prompt(prompt) for prompt in self.prompts]
        self.engine = TorchEngine(self.model, batch_rows=16, images=self.images)
        self.policy = Policy(self.model, temperature=1.0, head_chunk=16, images=self.images)


@pytest.fixture(scope="module")
def parts():
    return Parts()


def counted(model):
    """Hook on the vision tower; the list gets the number of images of each pass."""
    passes: list[int] = []
    tower = model.base_model.vision_tower
    handle = tower.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    return passes, handle


def test_images_that_were_sent_are_the_same_images(parts):
    sent = SentImages()
    sent.take({number: to_send(parts.images, number) for number in range(len(parts.images))})
    for number in range(len(parts.images)):
        assert sent.places(number) == parts.images.places(number) == 16
        for name, value in parts.images.pixels(number).items():
            assert torch.equal(sent.pixels(number)[name], value)
    engine = TorchEngine(parts.model, batch_rows=16, images=sent)
    requests = [Request(i, ids, len(ids), 4, 4) for i, ids in enumerate(parts.contexts)]
    tokens = []
    for one in (engine, parts.engine):
        waiting = sorted(requests, key=order)
        steps = one.steps(waiting, Rows(16, 4, SAMPLING))
        tokens.append([segment.token_ids.tolist() for step in steps for segment in step])
    assert tokens[0] == tokens[1] != []


class TestTokens:
    def test_an_image_is_a_run_of_its_number(self, parts):
        one, _, in_front, behind, two, text = (ids.tolist() for ids in parts.contexts)
        assert one == [-1] * 16 + text[:1] + text[-1:]
        assert in_front == [-3] * 16 + text
        assert behind[1:] == [-4] * 16
        assert two[:16] + two[17:33] == [-4] * 16 + [-1] * 16
        assert min(text) >= 0

    def test_marks_and_images_must_be_equally_many(self, parts):
        prompt = Prompt(9, f"{MARK}{MARK}1=", "", images=(picture(0),))
        with pytest.raises(ValueError, match="Prompt 9 has 1 images and 2 marks"):
            parts.codec.encode_prompt(prompt)

    def test_a_mark_without_an_image_is_text(self, parts):
        with pytest.raises(ValueError, match="cannot be tokenized"):
            parts.codec.encode_prompt(Prompt(9, MARK, ""))

    def test_an_image_that_was_never_added(self, parts):
        with pytest.raises(ValueError, match="is not in the run's table"):
            parts.codec.encode_prompt(Prompt(9, "1=", "", images=(picture(77),)))

    def test_a_model_that_reads_text_only(self, parts):
        codec = Codec(parts.codec._tokenizer)
        with pytest.raises(ValueError, match="has images, and the model reads text only"):
            codec.encode_prompt(parts.prompts[0])

    def test_the_fingerprint_names_images_and_order(self, parts):
        def of(*seeds):
            images = table()
            images.add([Prompt(0, "", "", images=tuple(map(picture, seeds)))])
            return images.fingerprint()

        assert of(1, 2) == of(1, 2) != of(2, 1)
        assert of(1, 2, 1) == of(1, 2)


class TestAgreement:
    def test_engine_and_trainer_agree_with_the_models_own_forward_pass(self, parts):
        stop = frozenset([parts.model.config.image_token_id])
        sampling = Sampling(1.0, seed=3, stop_token_ids=stop)
        answers = complete(parts.engine, parts.contexts, sampling, max_tokens=6)
        whole = [np.append(c, a.token_ids) for c, a in zip(parts.contexts, answers, strict=True)]
        trained = parts.policy.on_sequences(whole)
        assert sum(map(len, answers)) > 12
        for ids, answer, (_, ours) in zip(whole, answers, trained, strict=True):
            theirs = own_logprobs(parts.model, parts.images, ids)
            known = ~np.isnan(ours)
            assert np.abs(ours - theirs)[known].max() < 1e-5
            assert np.abs(answer.logprobs - theirs[-len(answer) :]).max() < 1e-5

    def test_prompts_that_differ_only_in_the_image_are_not_merged(self, parts):
        first, second = complete(parts.engine, parts.contexts[:2], SAMPLING, max_tokens=1)
        alone, _ = (
            complete(parts.engine, [c], SAMPLING, max_tokens=1)[0] for c in parts.contexts[:2]
        )
        assert abs(alone.logprobs[0] - first.logprobs[0]) < 1e-5
        greedy = Sampling(0, seed=0, stop_token_ids=frozenset())
        answers = complete(parts.engine, parts.contexts[:2], greedy, max_tokens=1)
        logprobs = [answer.logprobs[0] for answer in answers]
        assert abs(logprobs[0] - logprobs[1]) > 1e-3
        assert second.trajectory_id == 1

    def test_budget_cut_and_unbroken_responses_have_the_same_tokens(self, parts):
        whole = complete(parts.engine, parts.contexts, SAMPLING, max_tokens=12)
        grown = [list(context) for context in parts.contexts]
        logprobs = [[] for _ in grown]
        for done in (0, 5, 10):
            requests = [
                Request(i, np.array(ids, np.int32), len(c), 5, 12 - done)
                for i, (ids, c) in enumerate(zip(grown, parts.contexts, strict=True))
            ]
            for some in parts.engine.generate(requests, SAMPLING):
                for one in some:
                    grown[one.trajectory_id] += one.token_ids.tolist()
                    logprobs[one.trajectory_id] += one.logprobs.tolist()
        for context, answer, ids, cut in zip(parts.contexts, whole, grown, logprobs, strict=True):
            assert ids[len(context) :] == answer.token_ids.tolist()
            assert np.abs(np.array(cut) - answer.logprobs).max() < 1e-5


class TestFeatures:
    def test_each_image_is_encoded_once_a_call_and_once_a_micro_batch(self, parts):
        passes, handle = counted(parts.model)
        try:
            parts.engine.serve(1)
            complete(parts.engine, parts.contexts * 3, SAMPLING, max_tokens=2)
            assert sum(passes) == 4
            passes.clear()
            batch = pack_examples([(c, np.array([5, 6], np.int32)) for c in parts.contexts * 3])
            for micro in laid(parts.policy, batch, share=True):
                parts.policy.logprobs(micro)
            assert sum(passes) == 4
        finally:
            handle.remove()

    def test_gradients_reach_the_tower_alike_with_shared_and_repeated_prompts(self, parts):
        found = []
        batch = pack_examples(
            [(c, np.array([5, 6 + n], np.int32)) for n in range(3) for c in parts.contexts]
        )
        for share in (True, False):
            parts.model.zero_grad()
            for micro in laid(parts.policy, batch, share=share):
                parts.policy.logprobs(micro).sum().backward()
            found.append(
                parts.model.base_model.vision_tower.embeddings.patch_embedding.weight.grad.clone()
            )
        assert found[0].abs().max() > 0
        assert (found[0] - found[1]).norm() < 1e-4 * found[0].norm()
        parts.model.zero_grad()

    def test_a_frozen_tower_encodes_each_image_once_in_all(self):
        parts = Parts()
        parts.model.requires_grad_(False)
        parts.model.get_decoder().layers.requires_grad_(True)
        assert is_frozen(parts.model)
        policy = Policy(parts.model, temperature=1.0, head_chunk=16, images=parts.images)
        passes, handle = counted(parts.model)
        for version in (1, 2):
            parts.engine.serve(version)
            complete(parts.engine, parts.contexts, SAMPLING, max_tokens=1)
        assert sum(passes) == 4
        passes.clear()
        for _ in range(2):
            policy.on_sequences([np.append(ids, np.int32(5)) for ids in parts.contexts])
        assert sum(passes) == 4
        handle.remove()

    def test_new_weights_of_the_tower_are_used(self, parts):
        before = complete(parts.engine, parts.contexts, SAMPLING, max_tokens=1)
        with torch.no_grad():
            parts.model.base_model.multi_modal_projector.linear_2.weight.mul_(-1)
        parts.engine.serve(parts.engine.policy_version + 1)
        after = complete(parts.engine, parts.contexts, SAMPLING, max_tokens=1)
        with torch.no_grad():
            parts.model.base_model.multi_modal_projector.linear_2.weight.mul_(-1)
        parts.engine.serve(parts.engine.policy_version + 1)
        again = complete(parts.engine, parts.contexts, SAMPLING, max_tokens=1)
        assert abs(before[0].logprobs[0] - after[0].logprobs[0]) > 1e-4
        assert abs(before[0].logprobs[0] - again[0].logprobs[0]) < 1e-5

    def test_a_negative_id_that_names_no_image_is_refused(self, parts):
        ids = np.array([-50, 3], np.int32)
        with pytest.raises(ValueError, match=r"token ids -50 to 3 .* with images from -4"):
            parts.engine.generate([Request(0, ids, 2, 1, 1)], SAMPLING)

    def test_part_of_an_image_is_refused(self, parts):
        ids = torch.tensor([[-1] * 15 + [3]])
        with pytest.raises(ValueError, match="gives 16 features for an image that has 15 places"):
            parts.images.inputs(parts.model, ids, torch.arange(16)[None])


def laid(policy, batch, *, share):
    return micro_batches(
        batch,
        batch.mask > 0,
        range(len(batch)),
        max_tokens=10_000,
        layout=policy.layout,
        share_prompts=share,
    )


def test_bounded_keeps_what_was_used_last():
    kept = Bounded(limit=2 * 4 * 10)
    for key in (0, 1):
        kept.put(key, torch.zeros(10))
    assert kept.get(0) is not None
    kept.put(2, torch.zeros(10))
    assert [kept.get(key) is not None for key in range(3)] == [True, False, True]


def test_text_goes_in_as_ids(parts):
    ids, positions = torch.tensor([[3, 4]]), torch.tensor([[0, 1]])
    inputs = parts.images.inputs(parts.model, ids, positions)
    assert inputs.arguments() == {"input_ids": ids, "position_ids": positions}


def test_another_engine_that_reads_images_in_its_own_way_is_told_apart():
    model, _ = tiny()
    images = table()

    def too_likely(contexts):
        for ids in contexts:
            own = own_logprobs(model, images, np.append(ids, 5))
            unknown = np.full(len(ids) - 1, np.nan)
            yield np.append(ids, 5), np.append(unknown, own[-1:] + 0.01)

    with pytest.raises(ValueError, match=r"^vLLM cannot read images .*own\. Use another engine$"):
        check(model, images, too_likely, "vLLM", "Use another engine")
