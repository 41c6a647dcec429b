"""Run folders of any size, written in a moment: what the dashboard reads, without a training."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from kimi_core.metrics import EvaluationMetrics, IterationMetrics, to_record
from kimi_core.models.scratch import character_tokenizer
from kimi_core.run.config_file import dump_toml, load_config
from kimi_core.run.trajectories import TOKEN_FIELDS, TrajectoryRecord

ALPHABET = "0123456789+*=>;,.?# abcdefghijklmnopqrstuvwxyz\n"


def make_run(
    path: Path,
    *,
    iterations: int = 2,
    groups: int = 2,
    samples: int = 3,
    tokens: int = 20,
    texts: Sequence[str] = (),
    images: Sequence[str] = (),
    seed: int = 0,
) -> Path:
    """A run folder with ``iterations`` × ``groups`` × ``samples`` responses of ``tokens`` tokens.

    Args:
        texts: the responses' texts, one for each; default: random letters. Those that are very long
            or not valid Unicode have no tokens.
        images: what every record names as the images of its prompt.
    """
    path.mkdir(parents=True)
    rng = random.Random(seed)
    tokenizer = character_tokenizer(ALPHABET + "".join(filter(_has_tokens, texts)))
    (path / "tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str())
    settings = [f"name={path.name}", f"iterations={iterations}"]
    (path / "config.toml").write_text(dump_toml(load_config(None, settings)))
    lines = [_evaluation(0, 0.4)]
    lines += [_iteration(n, groups * samples, tokens, rng) for n in range(1, iterations + 1)]
    lines.append(_evaluation(iterations, 0.9))
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "trajectories").mkdir()
    made = ["".join(rng.choice(ALPHABET) for _ in range(tokens)) for _ in range(8)]
    ends = [(text, _token_part(tokenizer, text, rng)) for text in texts or made]
    with (path / "prompts.jsonl").open("w") as prompts:
        for n in range(1, iterations + 1):
            _write_iteration(path, n, (groups, samples), ends, list(images), rng)
            for group in range(groups):
                prompts.write(json.dumps(_prompt_line(n, group, samples, rng)) + "\n")
    return path


def _write_iteration(
    path: Path,
    iteration: int,
    shape: tuple[int, int],
    ends: list[tuple[str, str]],
    images: list[str],
    rng: random.Random,
) -> None:
    groups, samples = shape
    with (path / "trajectories" / f"{iteration:06d}.jsonl").open("w") as file:
        for row in range(groups * samples):
            number = (iteration - 1) * groups * samples + row
            text, end = ends[number % len(ends)]
            right = float(rng.random() < 0.6)
            old = len(text) // 4 if iteration > 1 else 0
            record = TrajectoryRecord(
                iteration=iteration,
                trajectory_id=number,
                group_id=number // samples,
                prompt_id=number // samples % 1000,
                prompt=f"What is {row // samples} + {iteration}?",
                answer=str(row // samples + iteration),
                response=text,
                images=images,
                end_reason="stop",
                versions=[(iteration - 2, old)] * bool(old) + [(iteration - 1, len(text) - old)],
                correctness=right,
                length_reward=-0.1 * rng.random(),
                penalty=0.0,
                reward=right,
                advantage=right - 0.6,
            )
            head = {k: v for k, v in vars(record).items() if k not in TOKEN_FIELDS}
            file.write(json.dumps(head, separators=(",", ":"))[:-1] + end + "}\n")


def _has_tokens(text: str) -> bool:
    return len(text) < 10_000 and not any(0xD800 <= ord(char) < 0xE000 for char in text)


def _token_part(tokenizer: PreTrainedTokenizerFast, text: str, rng: random.Random) -> str:
    """The end of a record, made once for a text, because it is most of the line."""
    if not _has_tokens(text):
        return ""
    logprobs = [float(f"{-rng.expovariate(2):.6g}") for _ in text]
    values = {
        "prompt_ids": tokenizer("what is it?").input_ids,
        "token_ids": tokenizer(text).input_ids,
        "engine_logprobs": logprobs,
        "trainer_logprobs": [float(f"{x + rng.gauss(0, 1e-3):.6g}") for x in logprobs],
    }
    return "," + json.dumps(values, separators=(",", ":"))[1:-1]


def _iteration(number: int, responses: int, tokens: int, rng: random.Random) -> dict:
    noise = rng.random() / 20
    metrics = IterationMetrics(
        iteration=number,
        policy_version=number - 1,
        wall_s=10.0,
        cpu_s=9.0,
        rollout_s=6.0,
        train_s=4.0,
        reward_mean=0.5 + noise,
        accuracy_sampled=0.5 + noise,
        length_mean=float(tokens),
        tokens_sampled=responses * tokens,
        tokens_per_s=responses * tokens / 6.0,
        decode_steps=tokens,
        trajectories_finished=responses,
        trajectories_unfinished=0,
        repeat_stops=0,
        samples_trained=responses,
        samples_trained_total=number * responses,
        tokens_stale_share=0.2,
        max_staleness=1,
        logprob_gap_mean=1e-4,
        logprob_gap_max=1e-2,
        reference_recomputed=False,
        loss=0.1,
        grad_norm=1.0,
        entropy=0.5,
        zero_advantage_share=0.1,
    )
    return {"kind": "iteration"} | to_record(metrics)


def _evaluation(iteration: int, accuracy: float) -> dict:
    metrics = EvaluationMetrics(
        iteration=iteration,
        policy_version=iteration,
        accuracy_greedy=accuracy,
        accuracy_sampled=accuracy,
        length_mean=20.0,
        n=100,
        seed=0,
    )
    return {"kind": "evaluation"} | to_record(metrics)


def _prompt_line(iteration: int, group: int, samples: int, rng: random.Random) -> dict:
    rate = round(rng.random(), 3)
    return {
        "iteration": iteration,
        "prompt_id": (iteration * 7 + group) % 1000,
        "prompt": f"What is {group} + {iteration}?",
        "responses": samples,
        "correctness": rate,
        "success_rate": rate,
        "weight": 1 - rate,
        "difficulty": 1 - rate,
    }
