"""Every setting of a run: typed, frozen, described. An unknown key is an error.

A run is a TOML file of at most 50 lines plus dotted overrides from the command line::

    config = load_config("configs/think.toml", ["trainer.learning_rate=3e-4", "seed=1"])

Each section of the file is one class below; a key left out keeps the default written here.
"""

import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


class Section(BaseModel):
    """Frozen, no unknown keys, and the text under a field is its description."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ModelConfig(Section):
    name: str = "scratch"
    """A folder in Hugging Face format, a hub id, `smollm2-135m`, or `scratch`: a small Llama with
    random weights and one token a character, which `[sft]` teaches first."""
    layers: int = Field(3, ge=1)
    """Layers of a `scratch` model."""
    width: int = Field(96, ge=8)
    """Hidden size of a `scratch` model."""
    heads: int = Field(4, ge=1)
    """Attention heads of a `scratch` model; they divide `width`."""
    context: int = Field(128, ge=8)
    """Longest prompt plus response of a `scratch` model, tokens. Others bring their own."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of weights and arithmetic. `auto`: float32 on a CPU, bfloat16 on a GPU."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`; `auto` takes a GPU where there is one."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "ModelConfig":
        if self.width % (2 * self.heads):
            raise ValueError(
                f"model.width = {self.width} is not a multiple of 2 x heads = {2 * self.heads}: "
                "each head needs an even width"
            )
        return self


class PromptsConfig(Section):
    source: str = "multiply"
    """`multiply` (one digit times three), `addition` or `maximum` (few-shot), `programs` (Python
    expressions from examples), `humaneval`, a JSONL file whose lines hold `prompt` and `answer`, or
    `file.py:function` returning a list of `Prompt`."""
    held_out: int = Field(500, ge=1)
    """Prompts kept out of training for evaluation, split off by `split_seed`. Prompts with the
    same `problem` tag (the same operands, say) stay on one side."""
    split_seed: int = 0
    """Fixes which prompts are held out; apart from `seed`, so that seeds share one test."""
    shots: int = Field(1, ge=0)
    """Worked examples in front of each `addition` or `maximum` problem."""
    largest: int = Field(40, ge=2)
    """Largest operand of an `addition` or `maximum` problem."""


class CurriculumConfig(Section):
    prioritized: bool = True
    """Draw a prompt in proportion to 1 − its success rate (section 2.3.4); off: uniformly."""
    floor: float = Field(0.05, gt=0, le=1)
    """Least weight of a prompt, so that a solved one is still seen now and then."""
    prior_weight: float = Field(2.0, gt=0)
    """Samples' worth of the run's overall success rate mixed into each prompt's own."""
    hard_after: int | None = Field(None, ge=0)
    """From this iteration on, only prompts at least `hard_difficulty` hard (Figure 9)."""
    hard_difficulty: float = Field(0.5, ge=0, le=1)
    """What counts as hard: 1 − success rate measured by the source or, failing that, so far."""


class SftConfig(Section):
    data: str = "none"
    """`none`; `multiply` (the mixed answers that `think.toml` starts from); `multiply_lengths`
    (right answers at four lengths); `programs` (right programs and lookup tables); or a JSONL
    file whose lines hold `prompt` and `response`."""
    examples: int | None = Field(None, ge=1)
    """Use only so many, drawn at random. Unset: all, or one for each training prompt."""
    steps: int = Field(1000, ge=0)
    """Optimizer steps; 0 skips the phase."""
    batch_size: int = Field(48, ge=1)
    """Examples a step, packed end to end."""
    learning_rate: float = Field(3e-3, gt=0)
    """Peak, reached after 5 % of the steps and decayed to a tenth by a cosine."""


class VLLMConfig(Section):
    timeout_s: float = Field(300.0, gt=0)
    """Longest wait for vLLM's next tokens or for new weights to be served, seconds; then its
    processes are replaced."""
    start_timeout_s: float = Field(600.0, ge=1)
    """Longest wait for vLLM to start, seconds."""
    args: dict[str, Any] = {}
    """Passed through to vLLM's `AsyncEngineArgs`: `tensor_parallel_size`, `max_model_len`,
    `kv_cache_memory_bytes` (on a CPU 1 GiB unless set) and so on."""


class RolloutConfig(Section):
    engine: Literal["torch", "vllm"] = "torch"
    """`torch` samples with the trainer's own model in this process; `vllm` in processes of its own,
    in the environment that `python/install_vllm.sh` makes."""
    vllm: VLLMConfig = VLLMConfig()
    """Of the `vllm` engine; unused by the other."""
    prompts_per_iteration: int = Field(32, ge=1)
    """New prompts an iteration; unfinished trajectories come on top, and first."""
    samples_per_prompt: int = Field(8, ge=2)
    """k: responses sampled for each prompt. The baseline is their mean, so at least 2."""
    max_response_tokens: int = Field(96, ge=1)
    """Total length limit of a response; reaching it ends the response."""
    token_budget: int | None = Field(None, ge=1)
    """Output tokens a trajectory may add in one iteration (section 2.6.2); then it waits in the
    buffer and goes on in the next one. Unset: up to `max_response_tokens` at once."""
    temperature: float = Field(1.0, gt=0)
    """Of sampling; log-probs and the loss are under this temperature."""
    stop: list[str] = []
    """Strings that end a response besides the end-of-text token; each must be one token."""
    repeat_window: int = Field(0, ge=0)
    """Stop a response in which the same so many tokens in a row ... 0: never."""
    repeat_count: int = Field(3, ge=2)
    """... stand so many times."""
    stream_tokens: int = Field(64, ge=0)
    """A response under way is made durable every so many tokens, so a kill loses fewer of each.
    0: only when it has ended or spent its budget."""
    batch_rows: int = Field(1024, ge=1)
    """Trajectories decoded side by side at most; bounds the memory of the key-value cache."""


class SandboxConfig(Section):
    url: str = ""
    """Of a sandbox service (`python -m kimi_core.sandbox serve`), whose bearer token is read from
    the environment variable KIMI_SANDBOX_TOKEN. Empty: a pool of sandboxes in this process."""
    slots: int | None = Field(None, ge=1)
    """Programs that the pool runs at a time. Unset: one a core."""
    time_s: float = Field(5.0, gt=0)
    """CPU seconds that a program may use on one test; twice as many may pass on the clock."""
    memory_mb: int = Field(512, ge=16)
    """That a program may use on one test."""
    allow_weak: bool = False
    """Score although a protection of the sandbox is missing on this host."""


class MathConfig(Section):
    extraction: list[Literal["boxed", "hashes", "answer", "last_line"]] = [
        "boxed",
        "hashes",
        "answer",
        "last_line",
    ]
    """Where the final answer is looked for: the last `\\boxed{}`, the line after the last `####`,
    after the last `Answer:`, the last line. The first in this order that a response has counts."""
    cpu_s: int = Field(10, ge=1)
    """CPU-seconds that a comparison may take; then there is no verdict."""
    memory_mb: int = Field(1024, ge=256)
    """Address space of a comparison; one that takes more than half of it gets no verdict."""


class RewardConfig(Section):
    function: str = "match"
    """`match` (the answer as text after the last `#`, or the whole response), `math` (equivalence
    of final answers), `code` (1 if the program in the response passes the prompt's tests,
    docs/code_rewards.md), or `file.py:function`, called as `function(prompt, response_text)` and
    returning a number."""
    math: MathConfig = MathConfig()
    sandbox: SandboxConfig = SandboxConfig()
    """Where `code` runs programs."""
    length_weight: float = Field(0.0, ge=0)
    """Weight w of the length reward (section 2.3.3), less than 2."""
    length_warmup: int = Field(0, ge=0)
    """Iterations without the length reward before it is switched on."""
    repeat_penalty: float = Field(0.0, ge=0)
    """Taken off the reward of a response that was stopped for repeating itself."""
    workers: int = Field(1, ge=1)
    """Responses judged side by side, each in a thread. Above 1 a function of yours must be
    thread-safe."""

    @model_validator(mode="after")
    def _a_right_answer_stays_worth_more(self) -> "RewardConfig":
        if self.length_weight >= 2:
            raise ValueError(
                f"reward.length_weight = {self.length_weight}: from 2 on a wrong short answer can "
                "be worth more than a right long one; give a weight of at least 0 and below 2"
            )
        return self


class TrainerConfig(Section):
    objective: str = "omd"
    """`omd` is the report's mirror descent; `reinforce`, `grpo` and `rest` are there to compare
    with. `file.py:function` names one of yours; `trainer/objectives.py` has the signature."""
    tau: float = 0.01
    """τ > 0: strength of the pull towards the policy that sampled (section 2.3.2)."""
    baseline: Literal["mean", "log_partition"] = "mean"
    """Estimate of τ log Z: the group's mean reward, as the report does in practice, or
    τ log mean exp(r/τ)."""
    normalize: Literal["none", "length", "sqrt_length"] = "none"
    """Divide each response's summed log-probs by its length, its root, or (the report) nothing."""
    learning_rate: float = Field(1e-4, gt=0)
    """Of AdamW; constant."""
    updates_per_iteration: int = Field(2, ge=1)
    """Optimizer steps an iteration, each on its share of the responses."""
    weight_decay: float = Field(0.0, ge=0)
    """Of AdamW."""
    grad_clip: float = Field(1.0, gt=0)
    """Largest norm of the gradient."""
    max_staleness: int | None = Field(None, ge=0)
    """Tokens sampled more than so many versions ago stay out of the loss. Unset: all count."""
    release: Literal["response", "group"] = "response"
    """Train a response in the iteration in which it ends, or when its whole group has ended.
    The same thing without a token budget."""
    tokens_per_micro_batch: int = Field(16384, ge=1)
    """Tokens, padding included, in one forward and backward pass."""
    head_chunk: int = Field(1024, ge=1)
    """Rows of logits that exist at once."""
    trainable_layers: int | None = Field(None, ge=1)
    """Train only the top so many layers and the final norm; unset: everything."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    logprob_gap_limit: float = Field(0.05, gt=0)
    """Largest mean |Δ log-prob| between engine and trainer on fresh tokens, in nats. Above it the
    reference is recomputed by the trainer; three iterations running stop the run."""

    @model_validator(mode="after")
    def _tau_is_positive(self) -> "TrainerConfig":
        if not self.tau > 0:
            raise ValueError(
                f"trainer.tau = {self.tau}: the regulariser must be greater than 0 "
                "(0.01 is a good start)"
            )
        return self


class EvaluationConfig(Section):
    every: int = Field(10, ge=1)
    """Iterations between evaluations; one stands at the start and one at the end besides."""
    prompts: int | None = Field(None, ge=1)
    """Held-out prompts used by those in between; the first and the last use all. Unset: all."""


class TrajectoriesConfig(Section):
    every: int = Field(1, ge=0)
    """Iterations between two files in `trajectories/`; 1 writes one per iteration, 0 none."""
    tokens: bool = True
    """Write token ids and log-probs. Off: texts and rewards only, a sixth of the size or less."""


class Config(Section):
    name: str = Field("think", pattern=r"^[\w.-]+$")
    """Of the run; its folder is `runs/NAME`."""
    runs: str = "runs"
    """The folder that run folders are made in."""
    seed: int = Field(0, ge=0)
    """Of everything random in the run."""
    iterations: int = Field(60, ge=1)
    """RL iterations."""
    samples: int | None = Field(None, ge=1)
    """Stop once so many responses have been trained; unset: when `iterations` are done."""
    save_every: int = Field(1, ge=1)
    """Iterations between saved states; above 1, a crash repeats those after the last one."""
    model: ModelConfig = ModelConfig()
    prompts: PromptsConfig = PromptsConfig()
    curriculum: CurriculumConfig = CurriculumConfig()
    sft: SftConfig = SftConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    trainer: TrainerConfig = TrainerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    trajectories: TrajectoriesConfig = TrajectoriesConfig()


def load_config(path: str | Path | None, overrides: list[str] | None = None) -> Config:
    """Read a TOML file (or the defaults) and apply ``section.key=value`` overrides in order.

    Values are TOML literals; what does not parse as one is taken as a string.

    Raises:
        ValueError: the file is missing or not TOML, an override has no ``=``, or a key or value is
            not allowed; the message names each of them with what was given.
    """
    raw: dict[str, Any] = {}
    if path is not None:
        try:
            raw = tomllib.loads(Path(path).read_text())
        except FileNotFoundError:
            raise ValueError(f"No config file {path}; configs/ holds those that ship") from None
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{path} is not valid TOML: {error}") from None
    for override in overrides or []:
        _apply_override(raw, override)
    try:
        return Config(**raw)
    except ValidationError as error:
        raise ValueError(_explain(error)) from None


def _apply_override(raw: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise ValueError(
            f"Cannot read {override!r}: an override is section.key=value, as in seed=1"
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, key = dotted.split(".")
    for section in sections:
        raw = raw.setdefault(section, {})
        if not isinstance(raw, dict):
            raise ValueError(f"Cannot set {dotted}: {section} is a value, not a section")
    raw[key] = value


def _explain(error: ValidationError) -> str:
    lines = []
    for fault in error.errors():
        where = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            known = ", ".join(_fields_of(fault["loc"][:-1]))
            lines.append(f"Unknown key {where} = {fault['input']!r}; allowed here: {known}")
        elif fault["type"] == "value_error":
            lines.append(fault["msg"].removeprefix("Value error, "))
        else:
            lines.append(f"{where} = {fault['input']!r}: {fault['msg']}")
    return "\n".join(lines)


def _fields_of(sections: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = Config
    for section in sections:
        model = model.model_fields[str(section)].annotation  # type: ignore[assignment]
    return list(model.model_fields)
