"""Asks the model of a run: prompts that are typed or the run's, k responses, their rewards.

The model is loaded as the run loads it, and its weights come from a state. The run is only read.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from kimi_core.config import ClusterConfig, Config, EvaluationConfig
from kimi_core.reward.base import InfrastructureError
from kimi_core.reward.judging import verdicts_on
from kimi_core.rollout.texts import complete
from kimi_core.run.build import build
from kimi_core.run.config_file import load_config
from kimi_core.run.files import check_run
from kimi_core.run.folder import TOKENIZER, RunFolder
from kimi_core.run.states import SavedState
from kimi_core.run.trajectories import behind_bars
from kimi_core.types import Prompt, Segment


@dataclass(frozen=True)
class Weights:
    """Weights to ask, and what to call them."""

    name: str
    state: SavedState | None
    """None: those that the config names."""


class Chat:
    """The model of a run, as its states have it. Close it.

    Args:
        run: the folder of the run.
        at: the iteration whose state is asked; None: the newest.
        before: ask the policy that RL started from first.

    Raises:
        ValueError: there is no such run or state, or it is of another model.
    """

    def __init__(self, run: Path, *, at: int | None = None, before: bool = False) -> None:
        check_run(run)
        config = _to_ask(load_config(run / "config.toml"))
        self._weights = _weights(run, config, at=at, before=before)
        self._parts = build(config, tokenizer_file=run / TOKENIZER)
        self._config = config
        self._first = TemporaryDirectory()
        self._parts.loop.trainer.save(Path(self._first.name))  # Loading a state writes over them.
        self._loaded: Weights | None = None
        self._version = 0

    def prompt(self, prompt_id: int) -> Prompt:
        """The run's prompt with this id, a held-out one as well.

        Raises:
            ValueError: there is none.
        """
        for prompt in self._prompts():
            if prompt.id == prompt_id:
                return prompt
        raise ValueError(
            f"The run has no prompt {prompt_id}; the dashboard and trajectories/ have the ids"
        )

    def typed(self, text: str, answer: str | None = None) -> Prompt:
        """A prompt of this text; the answer is the run's if it has the same prompt."""
        if answer is None:
            known = next((one for one in self._prompts() if one.text == text), None)
            return known or Prompt(0, text, "")
        return Prompt(0, text, answer)

    def ask(self, prompt: Prompt, samples: int) -> Iterator[str]:
        """The responses of all weights as text for a terminal.

        Args:
            samples: responses of each; they are drawn with the run's seed and temperature.

        Raises:
            ValueError: the prompt has no tokens, unknown characters, or does not fit.
            RewardError: the reward function failed.
        """
        yield f"prompt\n{behind_bars(prompt.text)}"
        if prompt.answer:
            yield f"reference answer\n{behind_bars(prompt.answer)}"
        for weights in self._weights:
            self._load(weights)
            yield f"\n{weights.name}"
            yield from self._answers(prompt, samples)

    def close(self) -> None:
        """End the processes of reward function and engine."""
        self._parts.close()
        self._first.cleanup()

    def _prompts(self) -> Iterator[Prompt]:
        yield from self._parts.evaluator.prompts
        yield from self._parts.train_prompts

    def _load(self, weights: Weights) -> None:
        if weights is self._loaded:
            return
        trainer, state = self._parts.loop.trainer, weights.state
        if state is not None and state.record["fingerprint"] != trainer.fingerprint():
            raise ValueError(
                f"{state.folder} is of another model: put the model of the run back where its "
                "config.toml names it"
            )
        trainer.load(Path(self._first.name) if state is None else state.folder)
        self._version += 1  # An engine takes newer versions only.
        self._parts.loop.start(self._version)
        self._loaded = weights

    def _answers(self, prompt: Prompt, samples: int) -> Iterator[str]:
        parts, rollout = self._parts, self._config.rollout
        ids = parts.codec.encode_prompt(prompt)
        segments = complete(
            parts.loop.engine,
            [ids] * samples,
            replace(parts.loop.sampling, stream_tokens=0),
            max_tokens=rollout.max_response_tokens,
        )
        texts = [parts.codec.response_text(one.token_ids) for one in segments]
        rewards = self._rewards(prompt, texts)
        for number, (segment, text) in enumerate(zip(segments, texts, strict=True), 1):
            yield _headline(number, segment, rewards[number - 1])
            yield behind_bars(text)
        known = [reward for reward in rewards if isinstance(reward, float)]
        if known:
            length = sum(map(len, segments)) / len(segments)
            yield f"mean reward {sum(known) / len(known):.3f}, {length:.1f} tokens"

    def _rewards(self, prompt: Prompt, texts: Sequence[str]) -> list[float | str]:
        """The reward of each response, or why it has none."""
        if not prompt.answer:
            return ["no reward: give --answer"] * len(texts)
        settings = self._config.reward
        pairs = [(prompt, text) for text in texts]
        verdicts = verdicts_on(self._parts.reward, pairs, settings.workers, settings.timeout_s)
        return [
            f"no verdict: {one}" if isinstance(one, InfrastructureError) else float(one.value)
            for one in verdicts
        ]


def _to_ask(config: Config) -> Config:
    """The settings without what only a training needs."""
    trainer = config.trainer.model_copy(update={"ranks": 1})
    sft = config.sft.model_copy(update={"steps": 0})
    plain = {"trainer": trainer, "sft": sft, "evaluation": EvaluationConfig(), "tracker": ""}
    return config.model_copy(update={**plain, "cluster": ClusterConfig()})


def _weights(run: Path, config: Config, *, at: int | None, before: bool) -> list[Weights]:
    states, _ = RunFolder.states_in(run)
    kept = states.numbers()
    if not kept:
        raise ValueError(f"{run} has no state to ask: its first one is saved when RL starts")
    number = max(kept) if at is None else at
    found = [_state(run, number)]
    if before and 0 in kept:
        return [_state(run, 0), *found]
    if before and load_config(run / "config.toml").sft.data == "none":
        return [Weights(f"before: {config.model.name}", None), *found]
    if before:
        raise ValueError(
            f"{run} does not keep the state that RL started from; it has those after iteration "
            f"{', '.join(map(str, kept))}. Raise keep_states to keep all"
        )
    return found


def _state(run: Path, number: int) -> Weights:
    states, _ = RunFolder.states_in(run)
    state = states.numbered(number)
    if state is None:
        kept = ", ".join(map(str, states.numbers()))
        raise ValueError(
            f"{run} has no state after iteration {number}; it has those after {kept}. Raise "
            "keep_states to keep more"
        )
    return Weights(f"after iteration {number}" if number else "before RL", state)


def _headline(number: int, segment: Segment, reward: float | str) -> str:
    said = f"reward {reward:.4g}" if isinstance(reward, float) else reward
    return f"--- {number}: {said}, end {segment.end_reason or 'length'}, {len(segment)} tokens"


def chat(
    run: Path,
    prompts: Iterable[str | int],
    *,
    samples: int,
    answer: str | None = None,
    at: int | None = None,
    before: bool = False,
) -> Iterator[str]:
    """What ``kimi chat`` prints for prompts, each a text or the id of one of the run's.

    Raises: as ``Chat`` and its methods.
    """
    with closing(Chat(run, at=at, before=before)) as model:
        for one in prompts:
            prompt = model.prompt(one) if isinstance(one, int) else model.typed(one, answer)
            yield from model.ask(prompt, samples)
