"""Settings of the stages around RL: curation, warm-up and long2short (sections 2.1, 2.2, 2.4)."""

from pydantic import Field, model_validator

from kimi_core.config.section import Section


class CurateConfig(Section):
    samples: int = Field(10, ge=1)
    """Answers to each prompt. Its difficulty is 1 − the share of right ones."""
    temperature: float = Field(1.2, gt=0)
    """Temperature of answers and guesses; the report takes a high one."""
    lowest_difficulty: float = Field(0.1, ge=0, le=1)
    """A prompt of less is trivial, and dropped."""
    highest_difficulty: float = Field(0.9, ge=0, le=1)
    """A prompt of more is hopeless, and dropped."""
    guesses: int = Field(8, ge=0)
    """Answers without a chain of thought. A prompt is dropped as easy to hack if one is right. 0
    turns this off."""
    guess_prompt: str = "{prompt}\n\nGive only the final answer, at once, without explanation."
    """How a guess is asked for. A conversation's last message takes the place of `{prompt}`."""
    guess_tokens: int = Field(16, ge=1)
    """Length limit of a guess, so short that no chain of thought fits."""
    similarity: float = Field(0.7, gt=0, le=1)
    """Least Jaccard similarity (character 5-grams) of near-duplicates, of which the first stays."""
    evaluation_sets: list[str] = []
    """Evaluation sets: `prompts.source`, or `gsm8k:test.jsonl` and so on. A prompt is dropped that
    is a near-duplicate of one of theirs, or has one inside."""
    shared_words: int = Field(8, ge=1)
    """Words of a run. What has all numbers and half of the runs of a prompt has it inside."""
    most_per_discipline: int | None = Field(None, ge=1)
    """Prompts that are kept of each discipline, spread over its difficulties. Unset: all."""

    @model_validator(mode="after")
    def _a_guess_asks_the_prompt(self) -> "CurateConfig":
        if "{prompt}" not in self.guess_prompt:
            raise ValueError(
                f"curate.guess_prompt = {self.guess_prompt!r} lacks {{prompt}}, where a prompt goes"
            )
        if self.lowest_difficulty > self.highest_difficulty:
            raise ValueError(
                f"curate.lowest_difficulty = {self.lowest_difficulty} is above "
                f"curate.highest_difficulty = {self.highest_difficulty}: nothing lies between"
            )
        return self


class WarmupConfig(Section):
    samples: int = Field(8, ge=1)
    """Answers to each prompt, among which right ones are looked for."""
    temperature: float = Field(1.0, gt=0)
    ask: str = (
        "{prompt}\n\nMake a plan first. Then work step by step. Check each step, say so if you "
        "were wrong, and try another way where one fails."
    )
    """How the model is asked, as `curate.guess_prompt`. The examples have the prompt alone."""
    keep: int = Field(1, ge=1)
    """Right answers that are kept of a prompt: those with the most behaviours, then the longest."""
    least_tokens: int = Field(0, ge=0)
    """Shorter answers are not kept."""


class ShortestConfig(Section):
    steps: int = Field(100, ge=0)
    """Optimizer steps of SFT on the shortest right answers."""
    batch_size: int = Field(48, ge=1)
    """Examples per step."""
    learning_rate: float = Field(3e-4, gt=0, le=1)
    """Peak learning rate; the schedule is the default one of `sft`."""


class DpoConfig(Section):
    steps: int = Field(100, ge=0)
    """Optimizer steps of DPO."""
    batch_size: int = Field(32, ge=1)
    """Pairs per step."""
    learning_rate: float = Field(1e-5, gt=0, le=1)
    """Peak learning rate; the schedule is the default one of `sft`."""
    beta: float = Field(0.1, gt=0)
    """β: strength of the pull towards the starting policy."""


class ShortRlConfig(Section):
    iterations: int = Field(20, ge=1)
    """Iterations of the second RL phase."""
    length_weight: float = Field(0.3, gt=0, lt=2)
    """Weight of the length reward from the first iteration on."""
    max_response_tokens: int | None = Field(None, ge=1)
    """Length limit of a response. Unset: the shortest right answers of 95 % of the sampled prompts
    that have one fit into it."""


class Long2ShortConfig(Section):
    short: list[str] = []
    """Folders of the models that the long one is merged with. Empty: the model that its RL
    started from."""
    weights: list[float] = []
    """Weights of the merged models, the long one first; only their ratios matter. Empty: all the
    same."""
    prompts: int = Field(640, ge=1)
    """Training prompts that are sampled for SFT and DPO; fewer if there are fewer."""
    samples: int = Field(8, ge=2)
    """Responses to each of them; the report takes 8."""
    sft: ShortestConfig = ShortestConfig()
    """SFT on the shortest right answer to each prompt."""
    dpo: DpoConfig = DpoConfig()
    """DPO with the shortest right answer chosen and longer ones rejected."""
    rl: ShortRlConfig = ShortRlConfig()
    """RL with the length reward and a smaller maximum length."""
