"""Every setting of a run: typed, frozen, described. An unknown key is an error.

A run is a TOML file of at most 50 lines. Each section of the file is one class, here or in another
file of this folder, and a key that is left out keeps the default written there.
``run/config_file.py`` reads and writes the files.
"""

from typing import Any, Literal

from pydantic import Field, model_validator

from kimi_core.config.cluster import ClusterConfig as ClusterConfig
from kimi_core.config.evaluation import EvaluationConfig as EvaluationConfig
from kimi_core.config.evaluation import EvaluationSetConfig as EvaluationSetConfig
from kimi_core.config.evaluation import TrajectoriesConfig as TrajectoriesConfig
from kimi_core.config.section import Section as Section
from kimi_core.config.stages import CurateConfig as CurateConfig
from kimi_core.config.stages import DpoConfig as DpoConfig
from kimi_core.config.stages import Long2ShortConfig as Long2ShortConfig
from kimi_core.config.stages import ShortestConfig as ShortestConfig
from kimi_core.config.stages import WarmupConfig as WarmupConfig
from kimi_core.config.training import AblationConfig as AblationConfig
from kimi_core.config.training import LoraConfig as LoraConfig
from kimi_core.config.training import ScheduleConfig as ScheduleConfig
from kimi_core.config.training import SftScheduleConfig as SftScheduleConfig
from kimi_core.config.training import TrainerConfig as TrainerConfig


class ScratchConfig(Section):
    layers: int = Field(3, ge=1)
    """Decoder layers."""
    width: int = Field(96, ge=8)
    """Hidden size."""
    heads: int = Field(4, ge=1)
    """Attention heads; `width` must be a multiple of twice this number."""
    context: int = Field(128, ge=8)
    """Longest prompt plus response, in tokens."""
    rope_theta: float = Field(10_000.0, gt=1)
    """Base of the rotary position embedding. Long contexts need a large one: the report takes
    1,000,000 (its part on long-context activation)."""
    vision_layers: int = Field(0, ge=0)
    """Layers of a vision tower, which makes 16 positions of an image. 0: text only."""
    vocabulary: int | None = Field(None, ge=258)
    """Most tokens of a byte-level BPE, trained on prompts, answers and SFT data: prose takes fewer
    tokens so. Unset: one token per character that they have, for tasks on letters and digits."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "ScratchConfig":
        if self.width % (2 * self.heads):
            raise ValueError(
                f"model.scratch.width = {self.width} is not a multiple of 2 x heads = "
                f"{2 * self.heads}: each head needs an even width"
            )
        return self


class ModelConfig(Section):
    name: str = "scratch"
    """A folder in Hugging Face format, a hub id, `smollm2-135m`, or `scratch`: a small Llama with
    random weights, which `[sft]` teaches first. It knows the characters of the run's data."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of weights and arithmetic. `auto`: float32 on a CPU, bfloat16 on a GPU."""
    device: str = "auto"
    """`cpu`, `cuda` or `cuda:1`. `auto` takes a GPU if there is one."""
    scratch: ScratchConfig = ScratchConfig()
    """Size of a `scratch` model; other models bring their own."""


class TaskConfig(Section):
    shots: int = Field(1, ge=0)
    """Worked examples before each problem of `addition` and `maximum`."""
    largest: int = Field(40, ge=2)
    """Largest number in a problem of `addition` and `maximum`."""
    count: int = Field(1000, ge=2)
    """Number of prompts of `retrieve`."""
    numbers: int = Field(32, ge=1, le=20_000)
    """Numbers to add in a prompt of `retrieve`."""
    length: int = Field(3500, ge=4)
    """Characters of a prompt of `retrieve`. A scratch model has a token for each."""


class PromptsConfig(Section):
    source: str = "multiply"
    """`multiply` (one digit times three), `addition` or `maximum` (few-shot), `retrieve` (numbers
    spread over a long text), `programs` (expressions from examples), `vision` (text and images),
    `humaneval`, a JSONL, CSV, Parquet or Arrow file with `prompt` (or `messages`) and `answer`, a
    folder of `datasets`, `hub:OWNER/NAME` or `hub:OWNER/NAME:SUBSET`, or `file.py:function`, which
    returns a list of `Prompt`."""
    fields: dict[str, str] = {}
    """Columns with other names, as `{prompt = "question", answer = "solution"}`. What comes before
    the last `####` of an answer is then left out. GSM8K's columns are known without this."""
    template: str = ""
    """A prompt with `{column}` where a column's text goes, such as `Question: {question}`. Empty:
    the column `prompt` alone."""
    split: str = "train"
    """Part of a `datasets` folder, or of a data set from the hub, that is read."""
    held_out: int = Field(500, ge=1)
    """Prompts kept out of training for evaluation. Prompts with the same `problem` tag (the same
    operands, say) stay on one side."""
    split_seed: int = 0
    """Decides which prompts are held out. It is separate from `seed`, so that runs with different
    seeds share one test set."""
    chat: bool = False
    """Turn a prompt that is text into a user message, which the model's chat template renders.
    Prompts that are `messages` are always rendered. This and `system` hold for `[sft]`, too."""
    system: str = ""
    """System message, put before the messages of every prompt that has none. Empty: none."""
    task: TaskConfig = TaskConfig()
    """Settings of single built-in tasks."""


class CurriculumConfig(Section):
    prioritized: bool = True
    """Draw a prompt with a probability proportional to 1 − its success rate (section 2.3.4). Off:
    draw uniformly."""
    floor: float = Field(0.05, gt=0, le=1)
    """Least weight of a prompt, so that a solved one still comes now and then."""
    hard_after: int | None = Field(None, ge=0)
    """From this iteration on, draw only prompts of at least `hard_difficulty` (Figure 9). Unset:
    never."""
    hard_difficulty: float = Field(0.5, ge=0, le=1)
    """Least difficulty of a hard prompt: 1 − success rate, as the source measured it or, without
    that, as the run has so far."""


class SftConfig(Section):
    data: str = "none"
    """`none`; `multiply` (the mixed answers that `think.toml` starts from); `multiply_lengths`
    (right answers of four lengths); `retrieve` (worked answers to texts that grow, with guesses at
    the end); `programs` (right programs and lookup tables); `vision` (reading, then answers); a
    file, folder or data set as for `prompts.source` with `prompt` and `response`, or `messages`; or
    `file.py:function`, which gets the training prompts and returns (prompt, response) pairs."""
    fields: dict[str, str] = {}
    """As `prompts.fields`, such as `{prompt = "question", response = "solution"}`. The prompt is
    written by `prompts.template`."""
    examples: int | None = Field(None, ge=1)
    """Number of examples to use, drawn at random. Unset: all of a file, or one per training
    prompt; for `retrieve`, one for each place in each step's batch."""
    steps: int = Field(1000, ge=0)
    """Optimizer steps; 0 skips the phase."""
    batch_size: int = Field(48, ge=1)
    """Examples per step, packed end to end."""
    shuffle: bool = True
    """Take the examples in random order. False: in the order of the data, such as short ones
    first."""
    learning_rate: float = Field(3e-3, gt=0, le=1)
    """Peak learning rate."""
    schedule: SftScheduleConfig = SftScheduleConfig()
    """How the learning rate changes over the steps: by default it rises over 5 % of them, and a
    cosine then lowers it to a tenth."""
    save_every: int = Field(200, ge=1)
    """Steps between saved states of SFT. `--resume` repeats those after the last one."""


class VLLMConfig(Section):
    timeout_s: float = Field(300.0, gt=0)
    """Longest wait for vLLM's next tokens or for new weights, in seconds. vLLM's processes are
    replaced after that."""
    args: dict[str, Any] = {}
    """Passed on to vLLM's `AsyncEngineArgs`: `tensor_parallel_size`, `max_model_len`,
    `kv_cache_memory_bytes` (1 GiB on a CPU unless set) and others."""


class RolloutConfig(Section):
    engine: Literal["torch", "vllm"] = "torch"
    """`torch` samples with the trainer's parameters in this process. `vllm` samples in vLLM's
    processes, in the environment that `python/install_vllm.sh` makes."""
    vllm: VLLMConfig = VLLMConfig()
    """Settings of the `vllm` engine."""
    prompts_per_iteration: int = Field(32, ge=1)
    """New prompts per iteration. Unfinished trajectories are extended as well, and first."""
    samples_per_prompt: int = Field(8, ge=2)
    """k: responses sampled for each prompt. The baseline is their mean, so at least 2."""
    max_response_tokens: int = Field(96, ge=1)
    """Total length limit of a response, in tokens. Reaching it ends the response."""
    token_budget: int | None = Field(None, ge=1)
    """Output tokens that a trajectory may add in one iteration (section 2.6.2). It then
    waits in the buffer for the next iteration. Unset: up to `max_response_tokens` at once."""
    temperature: float = Field(1.0, gt=0)
    """Temperature of sampling. Log-probs and the loss use the same temperature."""
    stop: list[str] = []
    """Strings that end a response, in addition to the model's end tokens, as soon as its text
    contains one, whatever its tokens are. The text ends before the string."""
    repeat_window: int = Field(0, ge=0)
    """Length of the repeated block, in tokens; 0 turns detection off."""
    repeat_count: int = Field(3, ge=2)
    """A response ends when one block has occurred this many times."""
    stream_tokens: int = Field(64, ge=0)
    """Tokens of a growing response between two segments. A segment survives a kill of the process.
    0: one segment, when the response has ended or spent its budget."""
    batch_rows: int = Field(1024, ge=1)
    """Most trajectories decoded together, by each worker. Bounds the memory of the key-value
    cache."""
    workers: int = Field(1, ge=1)
    """Processes of this host that sample together, each with an engine of `torch` on the CPU and
    the weights in shared memory. 1: the run's process samples, and no process is started. With
    `vllm`: its instances, each of as many GPUs as `tensor_parallel_size` says."""
    worker_timeout_s: float = Field(300.0, gt=0)
    """Longest time without a decode step of a worker that has work, in seconds. The worker is
    replaced after that, and others take its work over."""


class SandboxConfig(Section):
    url: str = ""
    """Address of a sandbox service (`kimi sandbox serve`). Its bearer token is read from the
    environment variable KIMI_SANDBOX_TOKEN. Empty: a pool of sandboxes on this host."""
    slots: int | None = Field(None, ge=1)
    """Programs that the pool runs at the same time. Unset: one per core."""
    time_s: float = Field(5.0, gt=0)
    """CPU seconds that a program may use on one test. Twice as much may pass on the clock."""
    memory_mb: int = Field(512, ge=16)
    """Memory that a program may use on one test, in MB."""
    allow_weak: bool = False
    """Run programs although this host lacks a protection of the sandbox."""


class MathConfig(Section):
    extraction: list[Literal["boxed", "hashes", "answer", "last_line"]] = [
        "boxed",
        "hashes",
        "answer",
        "last_line",
    ]
    """Where to look for the final answer, in this order: in the last `\\boxed{}`, after the last
    `####`, after the last `Answer:`, in the last line. The first place that exists counts."""
    unevaluated: bool = False
    """Accept an answer that only restates a computation, such as `17+25` for 42 or an integral for
    its value."""
    cpu_s: int = Field(10, ge=1)
    """CPU seconds that a comparison may take. After that there is no verdict."""


class JudgeConfig(Section):
    url: str = ""
    """Address of an OpenAI-compatible server, such as `http://10.0.0.7:8000/v1`."""
    model: str = ""
    """The judge, by the name that the server gives it."""
    key_variable: str = "KIMI_JUDGE_KEY"
    """Environment variable that holds the server's key, if it wants one."""
    template: str = ""
    """Text file with `{question}`, `{reference}` and `{response}`; empty: the built-in one."""
    max_tokens: int = Field(1024, ge=1)
    """Length limit of the judge's text, in tokens."""
    timeout_s: float = Field(120.0, gt=0)
    """Seconds for one request."""
    retries: int = Field(4, ge=0)
    """Repetitions of a request that failed on the way, with 429 or with 5xx."""


class WeightedFunction(Section):
    function: str
    """As `reward.function`."""
    weight: float = 1.0
    """What its result is multiplied by."""
    name: str = ""
    """Under which metrics show it; empty: the function's name."""


class ValueConfig(Section):
    model: str = ""
    """The folder `classic` that `kimi reward --save` writes. It reads the images of a prompt if its
    model does."""


class RewardConfig(Section):
    function: str = "match"
    """`match` (the answer as text after the last `#`, or the whole response), `math` (equivalence
    of final answers), `code` (1 if the program in the response passes the prompt's tests,
    docs/code_rewards.md), `judge` (a model behind a server), `value` (a classic reward model), or
    `file.py:function`, called as `function(prompt, response_text)` and returning a number or a
    `Score`."""
    functions: list[WeightedFunction] = []
    """Several functions, whose weighted sum is the reward. `function` is then not used."""
    judge: JudgeConfig = JudgeConfig()
    """Settings of `judge`."""
    value: ValueConfig = ValueConfig()
    """Settings of `value`."""
    math: MathConfig = MathConfig()
    """Settings of `math`."""
    sandbox: SandboxConfig = SandboxConfig()
    """Where `code` runs programs."""
    length_weight: float = Field(0.0, ge=0)
    """Weight of the length reward (section 2.3.3), below 2; 0 turns it off."""
    length_warmup: int = Field(0, ge=0)
    """Iterations before the length reward is switched on."""
    repeat_penalty: float = Field(0.0, ge=0)
    """Subtracted from the reward of a response that was stopped for repeating itself."""
    workers: int = Field(1, ge=1)
    """Responses judged at the same time. A function of yours runs in as many processes."""
    timeout_s: float = Field(600.0, gt=0)
    """Seconds that one call of a function may take. After that its response has no verdict."""

    @model_validator(mode="after")
    def _a_right_answer_stays_worth_more(self) -> "RewardConfig":
        if self.length_weight >= 2:
            raise ValueError(
                f"reward.length_weight = {self.length_weight}: from 2 on a wrong short answer can "
                "be worth more than a right long one; give a weight of at least 0 and below 2"
            )
        return self


class Config(Section):
    name: str = Field("think", pattern=r"^[\w.-]+$")
    """Name of the run; its folder is `runs/NAME`."""
    runs: str = "runs"
    """Folder that holds the run folders."""
    seed: int = Field(0, ge=0)
    """Seed of everything random in the run."""
    iterations: int = Field(60, ge=1)
    """RL iterations."""
    samples: int | None = Field(None, ge=1)
    """Stop once this many responses were trained. Unset: stop when `iterations` are done."""
    save_every: int = Field(1, ge=1)
    """Iterations between saved states. Above 1, a crash repeats those after the last one."""
    keep_states: int = Field(2, ge=1)
    """Saved states that stay. If one is damaged, `--resume` goes on from the one before."""
    resume: Literal["exact", "keep"] | None = None
    """What `--resume` does with a rollout that was cut off. `exact` samples it a second time: the
    run ends with the bits of a run that nothing stopped. `keep` goes on from the last stored token
    of each response: nothing is sampled twice, and last bits may differ. Unset: `exact` with the
    engine `torch`, `keep` with `vllm`, whose results differ in the last bits anyway."""
    grace_s: float = Field(20.0, ge=0)
    """Seconds that a run has after SIGTERM to finish the iteration and save it."""
    tracker: str = ""
    """Another place for the numbers of the run: `wandb`, `trackio`, `mlflow`, or
    `file.py:function` (docs/training.md). Empty: none."""
    model: ModelConfig = ModelConfig()
    prompts: PromptsConfig = PromptsConfig()
    curriculum: CurriculumConfig = CurriculumConfig()
    sft: SftConfig = SftConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    trainer: TrainerConfig = TrainerConfig()
    cluster: ClusterConfig = ClusterConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    trajectories: TrajectoriesConfig = TrajectoriesConfig()
    curate: CurateConfig = CurateConfig()
    warmup: WarmupConfig = WarmupConfig()
    long2short: Long2ShortConfig = Long2ShortConfig()
