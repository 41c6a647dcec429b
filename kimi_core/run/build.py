"""From a config to the parts of a run, loaded and wired. Nothing is trained or written here."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kimi_core.buffer import RolloutBuffer
from kimi_core.cluster.handshake import address_of, read_token
from kimi_core.config import Config, RolloutConfig
from kimi_core.evaluation.held_out import Evaluator
from kimi_core.evaluation.sets import EvaluationSet
from kimi_core.loop import Loop
from kimi_core.models.codec import Codec
from kimi_core.models.load import check_weights, config_of, context_of, load_model
from kimi_core.models.lora import check_lora, choose_trained, plain_module
from kimi_core.models.placement import check_gpus, limit_threads
from kimi_core.models.scratch import scratch_llama
from kimi_core.models.vision import Images
from kimi_core.models.vision_check import check
from kimi_core.models.vision_load import load_images
from kimi_core.prompts.curriculum import Curriculum
from kimi_core.prompts.jsonl import TextExample
from kimi_core.prompts.many import ById
from kimi_core.prompts.tokens import PromptTokens
from kimi_core.reward.combined import Reward
from kimi_core.reward.groups import GroupScorer
from kimi_core.reward.load import close_reward, load_reward, try_reward
from kimi_core.rollout.engine import Engine
from kimi_core.rollout.load import load_engine, reads_trainer, tensor_parallel
from kimi_core.rollout.phase import buffer_size, sampling_for
from kimi_core.rollout.texts import complete
from kimi_core.rollout.torch.engine import TorchEngine
from kimi_core.rollout.vllm.engine import VLLMEngine
from kimi_core.rollout.vllm.server import check_options
from kimi_core.run import state
from kimi_core.run.data import Data, load_data, scratch_tokenizer
from kimi_core.run.given import NOTHING, Given
from kimi_core.run.launch import start_ranks
from kimi_core.run.trackers import load_tracker
from kimi_core.trainer.objectives import load_objective
from kimi_core.trainer.parallel import check_axes
from kimi_core.trainer.policy import Policy
from kimi_core.trainer.ranks import Ranks
from kimi_core.trainer.trainer import Trainer
from kimi_core.types import Prompt, Sampling
from kimi_core.weights.publish import (
    ArenaPublisher,
    CopyInto,
    InPlace,
    Publisher,
    module_to_read,
)


@dataclass(frozen=True)
class Parts:
    """What a config describes, built and wired."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    codec: Codec
    train_prompts: Sequence[Prompt]
    examples: list[TextExample]
    """Those of SFT, which empties the list when it begins."""
    given: Given
    reward: Reward
    publisher: Publisher
    evaluator: Evaluator
    """Of the held-out prompts."""
    sets: dict[str, Evaluator]
    """Of the other evaluation sets, by name."""
    loop: Loop
    new_buffer: Callable[[Path], RolloutBuffer]
    """Makes an empty buffer of the size that the run needs."""
    images: Images | None
    """The images of prompts and SFT examples; None: the model reads text only."""

    def close(self) -> None:
        """End the processes of reward function, engine and trainer, and free what they shared."""
        close_reward(self.reward)
        for one in self.sets.values():
            if one.reward is not self.reward:
                close_reward(one.reward)
        self.loop.close()
        self.publisher.close()
        self.loop.trainer.ranks.close()


def build(config: Config, given: Given = NOTHING, *, tokenizer_file: Path | None = None) -> Parts:
    """Load and wire everything. What can be refused without the model is refused before it loads.

    Args:
        given: what a Python program hands over in place of names in the config.
        tokenizer_file: the tokenizer of a scratch model's run, if that is continued.

    Raises:
        ValueError: a setting or a file cannot work, or a prompt does not fit into the context.
    """
    data = load_data(config, given)
    check_settings(config)
    if config.rollout.engine == "vllm":
        check_options(config.rollout.vllm.args)
    reward = given.reward or load_reward(config.reward)
    judged = [one.prompts for one in data.sets.values() if not one.benchmark]
    try_reward(reward, data.held_out, data.train, *judged)
    scratch = scratch_tokenizer(config, data, tokenizer_file)
    model, tokenizer = model_to_train(config, scratch)
    images = load_images(model, config, data.asked)
    codec = Codec(tokenizer, config.rollout.stop, model, images)
    context, response = context_of(model), config.rollout.max_response_tokens
    encode = PromptTokens(codec, data.prompts, context=context, response=response)
    encode.check()
    encode.keep(data.held_out)
    encoders = _encoders(data, codec, context, response)
    longest = response + max(one.longest for one in (encode, *encoders.values()))
    trainer, engine, publisher = _trainer(model, config, longest, images, codec, data.examples)
    new_buffer = _buffer_maker(encode.longest, config.rollout)
    loop = Loop(
        config=config,
        prompts=ById(data.train),
        encode=encode,
        curriculum=Curriculum(data.train, config.curriculum),
        engine=engine,
        sampling=sampling_for(
            config.rollout, codec.stop_token_ids, codec.stop_strings, seed=config.seed
        ),
        buffer=state.nameless(new_buffer),
        scorer=GroupScorer(config, reward, codec.response_text),
        trainer=trainer,
    )
    evaluator = Evaluator(
        engine=engine,
        prompts=data.held_out,
        encode=encode,
        response_text=codec.response_text,
        reward=reward,
        rollout=config.rollout,
        stop_token_ids=codec.stop_token_ids,
        stop_strings=codec.stop_strings,
        workers=config.reward.workers,
        timeout_s=config.reward.timeout_s,
        keep_responses=not state.is_exact(config),
        samples=config.evaluation.samples,
    )
    sets = _evaluators(evaluator, data.sets, encoders, config)
    prompts, examples = data.train, data.examples
    built = (reward, publisher, evaluator, sets, loop, new_buffer, images)
    return Parts(model, tokenizer, codec, prompts, examples, given, *built)


def check_settings(config: Config) -> None:
    """Refuse what the settings alone show. Raises ValueError."""
    load_objective(config.trainer)
    check_lora(config)
    if config.tracker:
        load_tracker(config.tracker)
    if config.cluster.listen:  # The token of workers that Ray starts is made for each run.
        address_of(config.cluster.listen)
        read_token(config.cluster.token_file)


def _encoders(
    data: Data, codec: Codec, context: int | None, response: int
) -> dict[str, PromptTokens]:
    """Name of each other evaluation set → what gives its prompts' tokens.

    Raises:
        ValueError: a prompt cannot be tokenized, or does not fit into the context.
    """
    encoders = {}
    for name, one in data.sets.items():
        try:
            encode = PromptTokens(codec, one.prompts, context=context, response=response)
            encode.check()
        except ValueError as error:
            raise ValueError(f"evaluation.sets.{name}: {error}") from error
        encoders[name] = encode
    return encoders


def _evaluators(
    held_out: Evaluator,
    sets: Mapping[str, EvaluationSet],
    encoders: Mapping[str, PromptTokens],
    config: Config,
) -> dict[str, Evaluator]:
    return {
        name: replace(
            held_out,
            name=name,
            prompts=one.prompts,
            encode=encoders[name],
            reward=one.reward(config) or held_out.reward,
            samples=config.evaluation.sets[name].samples,
        )
        for name, one in sets.items()
    }


def check_images(model: PreTrainedModel, images: Images, policy: Policy, engine: Engine) -> None:
    """Compare trainer and engine with the model's own forward pass, on two made-up images.

    Args:
        images: the table that the engine reads, to which the two are added.

    Raises:
        ValueError: one of them reads images in another way.
    """
    with policy.reading(images):
        check(model, images, policy.on_sequences, "The trainer")
    check(model, images, partial(_sampled, engine), "The embedded engine")


def check_vllm(parts: Parts) -> None:
    """Compare vLLM with the model's own forward pass, once the weights are published.

    Nothing is compared without images, with another engine, or if ranks have divided the model.

    Raises:
        ValueError: vLLM reads images in another way.
        EngineFailed: as ``Engine.generate``.
    """
    loop = parts.loop
    if isinstance(loop.engine, VLLMEngine) and parts.images and loop.trainer.ranks.size == 1:
        with loop.turns.engine():
            given = partial(_sampled, loop.engine)
            check(parts.model, parts.images, given, "vLLM", "Set rollout.engine = 'torch'")


def _sampled(
    engine: Engine, contexts: Sequence[np.ndarray]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Contexts with two tokens behind them, and the log-probs of these, as ``check`` wants them."""
    sampling = Sampling(1.0, seed=0, stop_token_ids=frozenset())
    answers = complete(engine, contexts, sampling, max_tokens=2)
    for ids, one in zip(contexts, answers, strict=True):
        unknown = np.full(len(ids) - 1, np.nan)
        yield np.append(ids, one.token_ids), np.append(unknown, one.logprobs)


def _buffer_maker(longest_prompt: int, rollout: RolloutConfig) -> Callable[[Path], RolloutBuffer]:
    tokens, trajectories = buffer_size(longest_prompt, rollout)
    return partial(RolloutBuffer.create, capacity_tokens=tokens, max_trajectories=trajectories)


def _trainer(
    model: PreTrainedModel,
    config: Config,
    longest: int,
    images: Images | None,
    codec: Codec,
    examples: Sequence[TextExample],
) -> tuple[Trainer, Engine, Publisher]:
    """The trainer with all its ranks, the engine, and what takes the weights to it.

    The engine is made before the trainer shards the model, because it checks what it reads.

    Args:
        examples: of SFT; their images are not in the table yet.
    """
    policy = policy_of(model, config, longest, images)
    ranks = start_ranks(config, policy)
    try:
        has_adapters = config.trainer.lora.rank > 0
        read = plain_module(model) if has_adapters else model
        publisher = publisher_of(read, config, ranks)
        if has_adapters and isinstance(publisher, InPlace):
            publisher = CopyInto(read)
        exact = config.resume != "keep"
        engine, _ = load_engine(
            read,
            config.rollout,
            longest,
            publisher,
            exact=exact,
            images=images,
            cluster=config.cluster,
            codec=codec,
        )
        begins_later = any(isinstance(one, Prompt) and one.images for one, _ in examples)
        if images is not None and (images or begins_later):
            # Made-up images in the run's table would come before those of the examples.
            table = images or images.another()
            here = engine
            if not images or isinstance(publisher, ArenaPublisher):  # Nothing is published yet.
                here = TorchEngine(module_to_read(read), batch_rows=4, images=table)
            check_images(model, table, policy, here)
        return Trainer(policy, config.trainer, publisher, ranks), engine, publisher
    except BaseException:
        ranks.close()
        raise


def model_to_train(
    config: Config, scratch: PreTrainedTokenizerFast | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model as rank 0 of a trainer loads it, and its tokenizer.

    Args:
        scratch: the tokenizer of a model from scratch; None for any other model.

    Raises:
        ValueError: it cannot be loaded, its weights are not finite, there are too few GPUs, or the
            axes of the trainer's ranks do not divide it.
    """
    tokenizer: PreTrainedTokenizerBase
    divided = config.trainer.tensor_parallel * config.trainer.context_parallel > 1
    if scratch is None and divided and (architecture := config_of(config.model)):
        check_axes(architecture, config.trainer)
    if scratch is not None:
        model, tokenizer = scratch_llama(config.model, scratch, config.seed), scratch
        check_axes(model.config, config.trainer)
    else:
        model, tokenizer = load_model(config.model)
    check_weights(model)
    check_gpus(model.device, config.trainer.ranks)
    limit_threads(model, config.trainer.ranks)
    choose_trained(model, config.trainer, config.seed)
    return model, tokenizer


def policy_of(
    model: PreTrainedModel, config: Config, longest: int, images: Images | None = None
) -> Policy:
    """The policy that a trainer updates; ``longest`` as for ``Policy``. Raises: as ``Policy``."""
    return Policy(
        model,
        temperature=config.rollout.temperature,
        head_chunk=config.trainer.head_chunk,
        longest=longest,
        images=images,
    )


def publisher_of(model: PreTrainedModel, config: Config, ranks: Ranks) -> Publisher:
    """Takes the trainer's weights to the engine; ``model`` is not sharded yet."""
    if reads_trainer(config.rollout, config.cluster) and ranks.size == 1:
        return InPlace()
    size = tensor_parallel(config.rollout)
    return ArenaPublisher(model.config, model.dtype, tp_size=size, ranks=ranks)
