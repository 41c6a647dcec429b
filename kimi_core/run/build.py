"""From a config to the parts of a run, loaded and wired. Nothing is trained or written here."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kimi_core.buffer import RolloutBuffer
from kimi_core.config import Config, RolloutConfig
from kimi_core.evaluation.held_out import Evaluator
from kimi_core.loop import Loop
from kimi_core.models.codec import Codec
from kimi_core.models.load import check_weights, context_of, load_model
from kimi_core.models.placement import check_gpus, freeze_below, limit_threads
from kimi_core.prompts.curriculum import Curriculum
from kimi_core.prompts.jsonl import TextExample, load_examples
from kimi_core.prompts.load import load_prompts, split
from kimi_core.prompts.many import ById
from kimi_core.prompts.tokens import PromptTokens
from kimi_core.reward.combined import Reward
from kimi_core.reward.groups import GroupScorer
from kimi_core.reward.load import close_reward, load_reward, try_reward
from kimi_core.rollout.engine import Engine
from kimi_core.rollout.load import load_engine, tensor_parallel
from kimi_core.rollout.phase import buffer_size, sampling_for
from kimi_core.run import state
from kimi_core.run.launch import start_ranks
from kimi_core.tasks import multiply, programs, retrieve
from kimi_core.trainer.policy import Policy
from kimi_core.trainer.ranks import Ranks
from kimi_core.trainer.trainer import Trainer
from kimi_core.types import Prompt
from kimi_core.weights.publish import ArenaPublisher, InPlace, Publisher


@dataclass(frozen=True)
class Parts:
    """What a config describes, built and wired."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    codec: Codec
    train_prompts: Sequence[Prompt]
    reward: Reward
    publisher: Publisher
    evaluator: Evaluator
    loop: Loop
    new_buffer: Callable[[Path], RolloutBuffer]
    """Makes an empty buffer of the size that the run needs."""

    def close(self) -> None:
        """End the processes of reward function, engine and trainer, and free what they shared."""
        close_reward(self.reward)
        self.loop.close()
        self.publisher.close()
        self.loop.trainer.ranks.close()


def build(config: Config) -> Parts:
    """Load and wire everything.

    Raises:
        ValueError: a setting or a file cannot work, or a prompt does not fit into the context.
    """
    everything = load_prompts(config.prompts)
    train_prompts, held_out = split(everything, config.prompts.held_out, config.prompts.split_seed)
    reward = load_reward(config.reward)
    try_reward(reward, held_out, train_prompts)
    model, tokenizer = model_to_train(config)
    codec = Codec(tokenizer, config.rollout.stop, model)
    response = config.rollout.max_response_tokens
    encode = PromptTokens(codec, everything, context=context_of(model), response=response)
    encode.check()
    encode.keep(held_out)
    longest = encode.longest + response
    trainer, engine, publisher = _trainer(model, config, longest)
    new_buffer = _buffer_maker(encode.longest, config.rollout)
    loop = Loop(
        config=config,
        prompts=ById(train_prompts),
        encode=encode,
        curriculum=Curriculum(train_prompts, config.curriculum),
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
        prompts=held_out,
        encode=encode,
        response_text=codec.response_text,
        reward=reward,
        rollout=config.rollout,
        stop_token_ids=codec.stop_token_ids,
        stop_strings=codec.stop_strings,
        workers=config.reward.workers,
        timeout_s=config.reward.timeout_s,
        keep_responses=not state.is_exact(config),
    )
    return Parts(
        model, tokenizer, codec, train_prompts, reward, publisher, evaluator, loop, new_buffer
    )


def _buffer_maker(longest_prompt: int, rollout: RolloutConfig) -> Callable[[Path], RolloutBuffer]:
    tokens, trajectories = buffer_size(longest_prompt, rollout)
    return partial(RolloutBuffer.create, capacity_tokens=tokens, max_trajectories=trajectories)


def _trainer(
    model: PreTrainedModel, config: Config, longest: int
) -> tuple[Trainer, Engine, Publisher]:
    """The trainer with all its ranks, the engine, and what takes the weights to it.

    The engine is made before the trainer shards the model, because it checks what it reads.
    """
    policy = policy_of(model, config, longest)
    ranks = start_ranks(config, longest)
    try:
        publisher = publisher_of(model, config.rollout, ranks)
        engine, _ = load_engine(model, config.rollout, longest, publisher)
        return Trainer(policy, config.trainer, publisher, ranks), engine, publisher
    except BaseException:
        ranks.close()
        raise


def model_to_train(config: Config) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model as every rank of a trainer loads it, and its tokenizer.

    Raises:
        ValueError: it cannot be loaded, its weights are not finite, or there are too few GPUs.
    """
    model, tokenizer = load_model(config.model, alphabet=alphabet(config), seed=config.seed)
    check_weights(model)
    check_gpus(model.device, config.trainer.ranks)
    limit_threads(model, config.trainer.ranks)
    freeze_below(model, config.trainer.trainable_layers)
    return model, tokenizer


def policy_of(model: PreTrainedModel, config: Config, longest: int) -> Policy:
    """The policy that a trainer updates; ``longest`` as for ``Policy``. Raises: as ``Policy``."""
    return Policy(
        model,
        temperature=config.rollout.temperature,
        head_chunk=config.trainer.head_chunk,
        longest=longest,
    )


def publisher_of(model: PreTrainedModel, rollout: RolloutConfig, ranks: Ranks) -> Publisher:
    """Takes the trainer's weights to the engine; ``model`` is not sharded yet."""
    if rollout.engine == "torch" and ranks.size == 1:
        return InPlace()
    size = tensor_parallel(rollout)
    return ArenaPublisher(model.config, model.dtype, tp_size=size, ranks=ranks)


def sft_examples(config: Config, train_prompts: Sequence[Prompt]) -> list[TextExample]:
    """The examples that ``sft.data`` names, as text.

    Raises:
        ValueError: the data is unknown, missing or malformed.
    """
    pairs: list[TextExample]
    if config.sft.data in ("multiply", "multiply_lengths"):
        shares = multiply.MIXED if config.sft.data == "multiply" else multiply.LENGTHS
        pairs = list(multiply.examples(train_prompts, shares, seed=config.seed))
    elif config.sft.data == "retrieve":
        pairs = list(_retrieve_examples(config))
    elif config.sft.data == "programs":
        pairs = list(programs.examples(train_prompts, programs.MIXED, seed=config.seed))
    elif config.sft.data.endswith(".jsonl"):
        pairs = load_examples(config.sft.data)
    else:
        raise ValueError(
            f"sft.data = {config.sft.data!r}; allowed are none, multiply, multiply_lengths, "
            "retrieve, programs, or a file that ends in .jsonl"
        )
    if config.sft.examples is not None:
        count = min(config.sft.examples, len(pairs))
        chosen = random.Random(config.seed).sample(range(len(pairs)), count)
        pairs = [pairs[index] for index in (chosen if config.sft.shuffle else sorted(chosen))]
    return pairs


def _retrieve_examples(config: Config) -> list[tuple[str, str]]:
    """One example for each step and place in the batch: no text comes twice."""
    task, sft = config.prompts.task, config.sft
    count = sft.examples or sft.steps * sft.batch_size
    return retrieve.examples(count, task.numbers, task.length, retrieve.MIXED, seed=config.seed)


def alphabet(config: Config) -> str:
    """The characters that a model made from scratch must read and write."""
    if config.prompts.source == "programs":
        return programs.ALPHABET
    if config.prompts.source == "retrieve":
        return retrieve.alphabet(config.prompts.task.numbers)
    if config.model.name == "scratch" and config.prompts.source != "multiply":
        raise ValueError(
            "model.name = 'scratch' knows the characters of prompts.source = 'multiply', "
            f"'retrieve' and 'programs' only, not of {config.prompts.source!r}: name a pretrained "
            "model in model.name"
        )
    return multiply.ALPHABET
