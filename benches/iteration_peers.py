"""The peers of ``bench_iteration``: a plain loop, TRL's trainer, and the bare matrix products.

A peer loads the start of the run for itself, freezes the same layers and calls the same reward
function. It reports the lengths of the responses that it sampled and trained.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)

from kimi_core.config import Config
from kimi_core.models.codec import Codec
from kimi_core.models.load import load_model
from kimi_core.models.placement import freeze_below
from kimi_core.reward.load import load_reward
from kimi_core.types import Prompt


@dataclass(frozen=True)
class Task:
    """A config, and the prompts of each iteration."""

    config: Config
    turns: list[list[Prompt]]

    @property
    def responses(self) -> int:
        """Responses of an iteration."""
        return len(self.turns[0]) * self.config.rollout.samples_per_prompt

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Codec]:
        """Load the start of the run, with its frozen layers."""
        model, tokenizer = load_model(self.config.model)
        freeze_below(model, self.config.trainer.trainable_layers)
        return model, tokenizer, Codec(tokenizer, self.config.rollout.stop, model)


class Plain:
    """``generate``, then padded forward and backward passes, as one writes them by hand.

    The reference log-probs come from the logits that ``generate`` sampled from. The loss is ours,
    mirror descent. Each update has its share of the groups, and the optimizer is new in each
    iteration.
    """

    def __init__(self, task: Task) -> None:
        self.config, self.reward = task.config, load_reward(task.config.reward)
        self.model, tokenizer, self.codec = task.load()
        self.pad = tokenizer.pad_token_id or 0
        self.stops = torch.tensor(sorted(self.codec.stop_token_ids))
        self.trained = [p for p in self.model.parameters() if p.requires_grad]

    def iterate(self, prompts: Sequence[Prompt]) -> list[int]:
        trainer, samples = self.config.trainer, self.config.rollout.samples_per_prompt
        asked = [prompt for prompt in prompts for _ in range(samples)]
        ids, kept, reference = self.sample(asked)
        counted = kept[:, -reference.shape[1] :]
        responses = zip(asked, ids[:, -reference.shape[1] :], counted, strict=True)
        rewards = torch.tensor(
            [self.reward(one, self.codec.response_text(row[mask])) for one, row, mask in responses]
        ).view(-1, samples)
        advantages = (rewards - rewards.mean(1, keepdim=True)).flatten()
        optimizer = torch.optim.AdamW(self.trained, trainer.learning_rate, weight_decay=0.0)
        groups = torch.arange(len(asked)).view(-1, samples)[torch.randperm(len(prompts))]
        for share in groups.chunk(trainer.updates_per_iteration):
            for rows in share.flatten().split(trainer.tokens_per_micro_batch // ids.shape[1]):
                width = int(counted[rows].sum(1).max())
                end = ids.shape[1] - reference.shape[1] + width
                logprobs = self.logprobs(ids[rows, :end], kept[rows, :end], width)
                mask = counted[rows, :width]
                ratios = ((logprobs - reference[rows, :width]) * mask).sum(1)
                gains = advantages[rows] * (logprobs * mask).sum(1)
                ((trainer.tau / 2 * ratios**2 - gains).sum() / share.numel()).backward()
            torch.nn.utils.clip_grad_norm_(self.trained, trainer.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
        return counted.sum(1).tolist()

    def sample(self, asked: Sequence[Prompt]) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids and which are no padding, ``[n, l]``; log-probs of the last m, ``[n, m]``."""
        rollout = self.config.rollout
        encoded = [torch.from_numpy(self.codec.encode_prompt(one)).long() for one in asked]
        ids = _left_padded(encoded, self.pad)
        shown = _left_padded([torch.ones_like(row) for row in encoded], 0)
        config = GenerationConfig(
            do_sample=True,
            temperature=rollout.temperature,
            top_k=0,
            max_new_tokens=rollout.max_response_tokens,
            eos_token_id=self.stops.tolist(),
            pad_token_id=self.pad,
            output_logits=True,
            return_dict_in_generate=True,
        )
        out = self.model.generate(ids, attention_mask=shown, generation_config=config)
        answers = out.sequences[:, ids.shape[1] :]
        reference = _picked(torch.stack(out.logits, 1) / rollout.temperature, answers)
        ends = torch.isin(answers, self.stops)
        kept = torch.cat([shown > 0, ends.cumsum(1) - ends.long() == 0], 1)
        return out.sequences, kept, reference

    def logprobs(self, ids: Tensor, kept: Tensor, last: int) -> Tensor:
        """Log-probs of the ``last`` tokens of each row, ``[n, last]``."""
        out = self.model(
            input_ids=ids,
            attention_mask=kept.long(),
            position_ids=(kept.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=last + 1,
        )
        logits = out.logits[:, :-1] / self.config.rollout.temperature
        return _picked(logits, ids[:, -last:])


def _left_padded(rows: Sequence[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(
        rows, batch_first=True, padding_value=value, padding_side="left"
    )


def _picked(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]


class Turns(TrainerCallback):
    """Calls ``begin`` before and ``end`` after each iteration of ``updates`` optimizer steps."""

    def __init__(
        self, updates: int, begin: Callable[[int], None], end: Callable[[int], None]
    ) -> None:
        self.updates, self.begin, self.end = updates, begin, end

    def on_step_begin(self, args, state, control, **_: Any) -> None:
        if state.global_step % self.updates == 0:
            self.begin(state.global_step // self.updates)

    def on_step_end(self, args, state, control, **_: Any) -> None:
        if state.global_step % self.updates == 0:
            self.end(state.global_step // self.updates - 1)


class Trl:
    """TRL's GRPOTrainer with what is fastest on a CPU: activations are kept, nothing is logged.

    Args:
        rows: responses in a micro-batch.
        folder: TRL wants a folder for its output and writes nothing there.
    """

    def __init__(self, task: Task, rows: int, folder: Path) -> None:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        rollout, trainer = task.config.rollout, task.config.trainer
        self.updates = trainer.updates_per_iteration
        self.lengths: list[int] = []
        model, tokenizer, self.codec = task.load()
        self.reward = load_reward(task.config.reward)
        prompts = [prompt for turn in task.turns for prompt in turn]
        for prompt in prompts:  # TRL tokenizes the text.
            assert tokenizer(prompt.text)["input_ids"] == self.codec.encode_prompt(prompt).tolist()
        self.prompts = {prompt.id: prompt for prompt in prompts}
        # TRL ends a response with any of these.
        model.generation_config.eos_token_id = sorted(self.codec.stop_token_ids)
        share = task.responses // self.updates
        config = GRPOConfig(
            output_dir=str(folder),
            max_steps=self.updates * len(task.turns),
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=share // rows,
            generation_batch_size=task.responses,
            num_generations=rollout.samples_per_prompt,
            max_completion_length=rollout.max_response_tokens,
            temperature=rollout.temperature,
            learning_rate=trainer.learning_rate,
            lr_scheduler_type="constant",
            max_grad_norm=trainer.grad_clip,
            shuffle_dataset=False,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        self.trainer = GRPOTrainer(
            model,
            self._rewards,
            config,
            Dataset.from_list([{"prompt": one.text, "number": one.id} for one in prompts]),
            processing_class=tokenizer,
        )

    def run(self, begin: Callable[[int], None], end: Callable[[int], None]) -> None:
        """Carry out all iterations, and call ``begin`` and ``end`` around each of them."""
        self.trainer.add_callback(Turns(self.updates, begin, end))
        self.trainer.train()

    def _rewards(self, completion_ids: list[list[int]], number: list[int], **_: Any) -> list[float]:
        self.lengths = [len(ids) for ids in completion_ids]
        return [
            self.reward(self.prompts[key], self.codec.response_text(ids))
            for key, ids in zip(number, completion_ids, strict=True)
        ]


class Gemms:
    """The bare matrix products of the weights: what no loop can do without.

    Each distinct prompt is multiplied once in the rollout and once in training, each response token
    once in a decode step of all responses that are so long, and once in training. Trained weights
    and the ones above them are multiplied in the backward pass, too.
    """

    def __init__(self, task: Task) -> None:
        self.config = task.config
        self.model, _, self.codec = task.load()
        self.head = self.model.get_output_embeddings()
        self.body = [
            module
            for module in self.model.modules()
            if isinstance(module, torch.nn.Linear) and module is not self.head
        ]

    def iterate(self, prompts: Sequence[Prompt], lengths: Sequence[int]) -> Sequence[int]:
        """Multiply for one iteration with responses of these ``lengths``, and return them."""
        answers = torch.tensor(lengths)
        prompt_tokens = sum(len(self.codec.encode_prompt(prompt)) for prompt in prompts)
        with torch.inference_mode():
            self._multiply(prompt_tokens, len(prompts))
            for step in range(1, int(answers.max())):
                rows = int((answers > step).sum())
                self._multiply(rows, rows)
        micro_batch = self.config.trainer.tokens_per_micro_batch
        tokens = prompt_tokens + int(answers.sum())
        for start in range(0, tokens, micro_batch):
            count = min(micro_batch, tokens - start)
            self._multiply(count, round(count * int(answers.sum()) / tokens))
        self.model.zero_grad()
        return lengths

    def _multiply(self, body_rows: int, head_rows: int) -> None:
        """Multiply every matrix, forward, and backward too unless in inference mode."""
        for linear in [*self.body, self.head]:
            rows = head_rows if linear is self.head else body_rows
            trains = linear.weight.requires_grad or linear is self.head
            backward = trains and not torch.is_inference_mode_enabled()
            out = linear(torch.ones(rows, linear.in_features, requires_grad=backward))
            if backward:
                out.backward(out.detach())
