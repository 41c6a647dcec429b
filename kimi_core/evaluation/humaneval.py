"""pass@1 on HumanEval, of a model or, as a check of the scorer, of given solutions.

A model's response is its most likely continuation of each prompt (greedy), cut as
``extract_program`` says. Problems without a verdict are counted apart and are in no rate.
"""

import time
from collections.abc import Sequence
from typing import Any, Literal

from kimi_core.config import Config
from kimi_core.models.codec import Codec
from kimi_core.models.load import load_model
from kimi_core.models.placement import limit_threads
from kimi_core.prompts.messages import chat_prompts
from kimi_core.reward.code.reward import CodeReward
from kimi_core.reward.judging import judge_all
from kimi_core.rollout import texts
from kimi_core.rollout.phase import sampling_for
from kimi_core.rollout.torch.engine import TorchEngine
from kimi_core.tasks import humaneval
from kimi_core.types import Prompt

Solutions = Literal["canonical", "empty"]


def evaluate(
    config: Config,
    reward: CodeReward,
    *,
    solutions: Solutions | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Score the first ``limit`` problems and return the counts, as JSON.

    Args:
        config: ``reward.workers``, ``model`` and ``rollout`` are read; the latter two not if
            ``solutions`` names some.
        reward: judges, and counts its verdicts; a new one.
        solutions: what to score in place of a model's responses.

    Raises:
        ValueError: no package, no model, or prompts that do not fit into its context.
        RewardOutage: most verdicts could not be reached.
    """
    prompts = chat_prompts(humaneval.prompts()[:limit], config.prompts)
    started = time.perf_counter()
    if solutions is None:
        responses = complete(config, prompts)
    else:
        responses = [prompt.answer if solutions == "canonical" else "" for prompt in prompts]
    sampled = time.perf_counter()
    pairs = list(zip(prompts, responses, strict=True))
    scores = judge_all(reward, pairs, workers=config.reward.workers, outage_from=2)
    scored = [score.value for score in scores if score is not None]
    return {
        "task": "humaneval",
        "solutions": solutions or config.model.name,
        "n": len(prompts),
        "passed": int(sum(scored)),
        "unscored": scores.count(None),
        "pass_at_1": sum(scored) / len(scored) if scored else None,
        "verdicts": {str(status): count for status, count in sorted(reward.counts.items())},
        "sampling_s": sampled - started,
        "scoring_s": time.perf_counter() - sampled,
    }


def complete(config: Config, prompts: Sequence[Prompt]) -> list[str]:
    """The most likely continuation of each prompt, up to ``rollout.max_response_tokens``."""
    model, tokenizer = load_model(config.model)
    limit_threads(model)
    codec = Codec(tokenizer, config.rollout.stop, model)
    engine = TorchEngine(model, batch_rows=config.rollout.batch_rows)
    most = config.rollout.max_response_tokens
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    contexts = [codec.encode_prompt(prompt) for prompt in prompts]
    for prompt, ids in zip(prompts, contexts, strict=True):
        if context is not None and len(ids) + most > context:
            raise ValueError(
                f"{prompt.tags['problem']} has {len(ids)} tokens; with rollout.max_response_tokens "
                f"= {most} that is more than the model's context of {context}: lower the limit"
            )
    sampling = sampling_for(
        config.rollout, codec.stop_token_ids, codec.stop_strings, seed=config.seed, greedy=True
    )
    answers = texts.complete(engine, contexts, sampling, max_tokens=most)
    return [codec.response_text(answer.token_ids) for answer in answers]
