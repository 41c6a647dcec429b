"""A whole run: load, fine-tune, then RL iterations with metrics, states and evaluations.

1. The parts are built from the config. SFT runs if the config asks for it.
2. The state of iteration 0 is saved and evaluated.
3. Each iteration is recorded and reported, and then its state is saved.

Ctrl-C lets the running iteration finish and saves it. ``resume`` continues from the last saved
state, with the tokens that were sampled since.
"""

import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from threading import Event, current_thread, main_thread
from time import perf_counter
from typing import Any

from rich.console import Console

from kimi_core.config import Config
from kimi_core.loop import Loop
from kimi_core.metrics import EvaluationMetrics
from kimi_core.prompts.jsonl import TextExample
from kimi_core.prompts.messages import in_chat
from kimi_core.prompts.overlap import overlaps
from kimi_core.run import state
from kimi_core.run.build import Parts, build, sft_examples
from kimi_core.run.folder import RunFolder, holds_state
from kimi_core.run.report import Report, cut_off_s
from kimi_core.run.trajectories import TrajectoryFiles, records_of
from kimi_core.trainer.sft import SftPhase

EVALUATION_SEED = 1_000_003
"""Added to the run's seed for the sampled half of an evaluation."""


def train(config: Config, *, resume: bool = False, console: Console | None = None) -> Path:
    """Carry out the run that ``config`` describes and return its folder.

    Args:
        resume: continue the run in that folder, or start it if there is none yet.

    Raises:
        ValueError: the config or a file that it names cannot work. Raised before training.
        RewardError, RewardOutage, TrainingDiverged, LogprobMismatch, EngineFailed, RankFailed,
            OSError: training had to stop. The last saved state is intact, and ``resume`` continues
            from it.
    """
    console = console or Console()
    parts = build(config)
    path = Path(config.runs) / config.name
    if resume and not holds_state(path):
        console.print(f"no run to resume in {path}: starting it", highlight=False, soft_wrap=True)
        resume = False
    with (
        RunFolder.resume(path, config) if resume else RunFolder.create(path, config) as folder,
        closing(parts),
    ):
        cut_off = cut_off_s(folder.path)  # Before the buffer changes.
        if resume:
            sft_s, remark = state.restore(parts.loop, folder)
            console.print(remark, highlight=False, soft_wrap=True)
            say_overlaps(parts, config, console)
        else:
            parts.loop.buffer = state.start(folder.buffer, parts.new_buffer)
            started = perf_counter()
            fine_tune(parts, config, console)
            sft_s = perf_counter() - started
            parts.loop.start()
            state.save(parts.loop, folder, sft_s)
        with Report(
            folder.path,
            total_iterations=config.iterations,
            start_iteration=parts.loop.iteration,
            sft_s=sft_s,
            cut_off_s=cut_off,
            changed=folder.changed,
            console=console,
        ) as report:
            _reinforce(parts, config, folder, report, sft_s)
        folder.save_checkpoint(parts.loop.trainer, parts.tokenizer)
    return folder.path


def fine_tune(parts: Parts, config: Config, console: Console) -> None:
    """Say where the data overlap, then carry out the SFT phase, if the config has one.

    Raises:
        ValueError: the data is unknown, missing or malformed.
        TrainingDiverged: a loss is not finite.
    """
    pairs = say_overlaps(parts, config, console)
    if not pairs:
        return
    examples = [
        parts.codec.encode_example(in_chat(prompt, config.prompts), response)
        for prompt, response in pairs
    ]
    every = max(1, config.sft.steps // 10)

    def report(step: int, loss: float) -> None:
        if step % every == 0:
            console.print(f"sft {step}/{config.sft.steps}  loss {loss:.3f}", highlight=False)

    SftPhase(parts.loop.trainer, config.sft, config.trainer, report).fit(examples, config.seed)


def say_overlaps(parts: Parts, config: Config, console: Console) -> list[TextExample]:
    """Say where the data overlap; return the examples of SFT, none if it is off."""
    is_on = config.sft.data != "none" and config.sft.steps > 0
    pairs = sft_examples(config, parts.train_prompts) if is_on else []
    for sentence in overlaps(parts.train_prompts, parts.evaluator.prompts, pairs):
        console.print(f"warning: {sentence}", highlight=False, soft_wrap=True)
    return pairs


def fine_tune_alone(config: Config) -> Path:
    """Carry out the SFT phase of ``config``, evaluate it, and return the checkpoint's folder.

    Raises: as ``train``.
    """
    console = Console()
    with (
        closing(build(config)) as parts,
        RunFolder.create(Path(config.runs) / config.name, config) as folder,
    ):
        with Report(folder.path, total_iterations=0, console=console) as report:
            fine_tune(parts, config, console)
            parts.loop.start()
            evaluate(parts, config, report)
        return folder.save_checkpoint(parts.loop.trainer, parts.tokenizer)


def evaluate_alone(config: Config, *, limit: int | None = None) -> EvaluationMetrics:
    """Evaluate the model of ``config`` on its first ``limit`` held-out prompts; None: on all."""
    alone = config.trainer.model_copy(update={"ranks": 1})  # Nothing is trained.
    config = config.model_copy(update={"trainer": alone})
    with closing(build(config)) as parts:
        parts.loop.start()
        seed = config.seed + EVALUATION_SEED
        return parts.evaluator.evaluate(iteration=0, seed=seed, limit=limit)


def _reinforce(
    parts: Parts, config: Config, folder: RunFolder, report: Report, sft_s: float
) -> None:
    loop, limit = parts.loop, config.evaluation.prompts
    files = TrajectoryFiles(folder.path, config.trajectories, start_iteration=loop.iteration)
    _catch_up(parts, config, report, files)
    with _stop_on_interrupt() as stop:
        while not (stop.is_set() or _is_done(loop, config)):
            metrics = loop.iterate()
            records = records_of(
                loop.latest, loop.iteration, loop.prompts, parts.codec.response_text
            )
            files.write(loop.iteration, records)
            report.iteration(metrics)
            last = stop.is_set() or _is_done(loop, config)
            if last or loop.iteration % config.save_every == 0:
                state.save(loop, folder, sft_s)
            if last or loop.iteration % config.evaluation.every == 0:
                evaluate(parts, config, report, limit=None if last else limit)
                files.write_samples(loop.iteration, records)


def _catch_up(parts: Parts, config: Config, report: Report, files: TrajectoryFiles) -> None:
    """The evaluation that is due before the first iteration, or was due when the run was killed."""
    done = parts.loop.iteration
    if any(evaluation.iteration == done for evaluation in report.evaluations):
        return
    last = done > 0 and _is_done(parts.loop, config)
    if last or done % config.evaluation.every == 0:
        limit = None if last or done == 0 else config.evaluation.prompts
        evaluate(parts, config, report, limit=limit)
        if records := files.read(done):
            files.write_samples(done, records)


def _is_done(loop: Loop, config: Config) -> bool:
    enough = config.samples is not None and loop.samples_trained >= config.samples
    return enough or loop.iteration >= config.iterations


def evaluate(parts: Parts, config: Config, report: Report, *, limit: int | None = None) -> None:
    """Report the accuracy on the first ``limit`` held-out prompts; None: on all of them."""
    seed = config.seed + EVALUATION_SEED
    iteration = parts.loop.iteration
    report.evaluation(parts.evaluator.evaluate(iteration=iteration, seed=seed, limit=limit))


@contextmanager
def _stop_on_interrupt() -> Iterator[Event]:
    """Let the first Ctrl-C set the event; a second one interrupts at once."""
    stop = Event()
    if current_thread() is not main_thread():
        yield stop  # Only the main thread may handle signals.
        return

    def request_stop(*_: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, request_stop)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)
