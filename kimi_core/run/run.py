"""A whole run: load, fine-tune, then RL iterations with metrics, states and evaluations.

1. The parts are built from the config. SFT runs if the config asks for it.
2. The state of iteration 0 is saved and evaluated.
3. Each iteration is recorded and reported, and then its state is saved.

A rank of the trainer that is lost ends the phase, which is done again from the last state with new
ranks. Ctrl-C and SIGTERM let the running iteration finish and save it. ``resume`` continues from
the last saved state; ``run/state.py`` says what becomes of the tokens that were sampled since.
"""

from contextlib import closing
from pathlib import Path

from rich.console import Console

from kimi_core.config import Config
from kimi_core.evaluation.progress import Progress
from kimi_core.evaluation.sets import evaluate as evaluate_sets
from kimi_core.loop import Loop
from kimi_core.metrics import EvaluationMetrics, to_record
from kimi_core.run import identity, state
from kimi_core.run.best import forget_later, is_stuck, keep_best, read_best
from kimi_core.run.build import Parts, build, check_vllm
from kimi_core.run.collapse import watch
from kimi_core.run.config_file import plain_settings
from kimi_core.run.disk import disk_faults_named
from kimi_core.run.fine_tuning import fine_tune, say, say_overlaps
from kimi_core.run.folder import TOKENIZER, RunFolder, holds_state, refuse_early
from kimi_core.run.given import NOTHING, Given
from kimi_core.run.go_back import go_back
from kimi_core.run.header import header, next_steps
from kimi_core.run.prompt_lines import PromptLines
from kimi_core.run.report import Report, clock, cut_off_s
from kimi_core.run.stop import Stop, stop_on_signals
from kimi_core.run.trajectories import TrajectoryFiles, records_of
from kimi_core.trainer.ranks import RankFailed

EVALUATION = "evaluation.jsonl"
"""What an evaluation has so far."""

EVALUATION_SEED = 1_000_003
"""Added to the run's seed for the sampled half of an evaluation."""

ATTEMPTS = 3
"""Times that ranks may be lost with no new state in between, until the run ends."""

SAY_FROM_S = 10.0
"""An evaluation is announced if it takes longer, or if nothing is known of its time."""


def train(
    config: Config,
    *,
    resume: bool = False,
    accept_changes: bool = False,
    back_to: int | None = None,
    console: Console | None = None,
    given: Given = NOTHING,
) -> Path:
    """Carry out the run that ``config`` describes and return its folder.

    Args:
        given: what a Python program hands over in place of names in the config.
        resume: continue the run in that folder, or start it if there is none yet.
        back_to: continue it from the state of that iteration; what came after it is set aside.
        accept_changes: continue it also if prompts or files that it reads have changed.

    Raises:
        ValueError: the config or a file that it names cannot work. Raised before training.
        RewardError, RewardOutage, TrainingDiverged, LogprobMismatch, EngineFailed, OSError:
            training had to stop. The last saved state is intact, and ``resume`` continues from it.
        RankFailed: a rank of the trainer could not start, or ranks were lost ``ATTEMPTS`` times
            with no new state in between. When one is lost, all start again.
        Stopped: Ctrl-C or SIGTERM ended the run; its state was saved.
    """
    console = console or Console()
    saved, failures = None, 0
    while True:
        resume = _goes_on(config, resume, console)
        with (
            disk_faults_named(Path(config.runs) / config.name),
            closing(_built(config, resume, given)) as parts,
            _open(config, resume, accept=accept_changes) as folder,
            stop_on_signals(config.grace_s) as stop,
        ):
            try:
                _carry_out(parts, config, folder, stop, console, back_to)
                break
            except RankFailed as error:
                latest = folder.sft_states.latest(), folder.states.latest()
                failures = failures + 1 if latest == saved else 1
                if stop.is_set() or failures == ATTEMPTS:
                    raise
                saved = latest
                say(console, f"{error.what}\nAll ranks start again, from the last saved state")
        resume, back_to = True, None
    for line in next_steps(config, folder.path):
        say(console, line)
    return folder.path


def _carry_out(
    parts: Parts,
    config: Config,
    folder: RunFolder,
    stop: Stop,
    console: Console,
    back_to: int | None,
) -> None:
    """The run from its last state to its checkpoint. Args and raises: as ``train``."""
    identity.write_down(folder, config, parts)
    for line in header(config, parts, folder.path):
        say(console, line)
    if back_to is not None:
        say(console, go_back(folder, back_to))
    cut_off = cut_off_s(folder.path)  # Before the buffer changes.
    if folder.states.latest():
        sft_s, remark = state.restore(parts.loop, folder)
        say(console, remark)
        say_overlaps(parts, console)
        parts.examples.clear()
    else:
        parts.loop.buffer = state.start(folder.buffer, parts.new_buffer)
        sft_s = fine_tune(parts, config, console, folder, stop)
        parts.loop.start()
        state.save(parts.loop, folder, sft_s)
    folder.sft_states.remove()
    check_vllm(parts)
    _say_changes(folder, console)
    if said := forget_later(folder.path, parts.loop.iteration):
        say(console, said)
    with Report(
        folder.path,
        total_iterations=config.iterations,
        start_iteration=parts.loop.iteration,
        sft_s=sft_s,
        cut_off_s=cut_off,
        settings=plain_settings(config),
        tracker=config.tracker,
        changed=folder.changed,
        console=console,
    ) as report:
        _reinforce(parts, config, folder, report, sft_s, stop)
    folder.save_checkpoint(parts.loop.trainer, parts.tokenizer, parts.images)
    if not _is_over(parts.loop, config, report):
        stop.leave(f"{parts.loop.iteration} of {config.iterations}")


def _goes_on(config: Config, resume: bool, console: Console) -> bool:
    """Whether the run continues one: ``resume`` starts it where there is none.

    Raises:
        ValueError: the folder is taken, or settings differ that may not.
    """
    path = Path(config.runs) / config.name
    if resume and not holds_state(path):
        say(console, f"no run to resume in {path}: starting it")
        resume = False
    refuse_early(path, config, resume=resume)
    return resume


def _built(config: Config, resume: bool, given: Given = NOTHING) -> Parts:
    saved = Path(config.runs) / config.name / TOKENIZER
    return build(config, given, tokenizer_file=saved if resume else None)


def _open(config: Config, resume: bool, *, accept: bool) -> RunFolder:
    path = Path(config.runs) / config.name
    folder = RunFolder.resume(path, config) if resume else RunFolder.create(path, config)
    folder.accept_changes = accept
    return folder


def _say_changes(folder: RunFolder, console: Console) -> None:
    for name, (before, now) in folder.changed.items():
        say(console, f"changed since the last state: {name}: {before} before, {now} now")
    if folder.changed.keys() & folder.environment.keys():
        say(console, "the last bits may therefore differ from those of an unbroken run")


def fine_tune_alone(config: Config, *, resume: bool = False, accept_changes: bool = False) -> Path:
    """Carry out the SFT phase of ``config``, evaluate it, and return the checkpoint's folder.

    Args and raises: as ``train``.
    """
    console = Console()
    resume = _goes_on(config, resume, console)
    with (
        disk_faults_named(Path(config.runs) / config.name),
        closing(_built(config, resume)) as parts,
        _open(config, resume, accept=accept_changes) as folder,
        stop_on_signals(config.grace_s) as stop,
    ):
        identity.write_down(folder, config, parts)
        sft_alone = config.model_copy(update={"iterations": 0})
        for line in header(sft_alone, parts, folder.path):
            say(console, line)
        fine_tune(parts, config, console, folder, stop)
        _say_changes(folder, console)
        with Report(folder.path, total_iterations=0, console=console) as report:
            parts.loop.start()
            check_vllm(parts)
            evaluate(parts, config, folder, report)
        checkpoint = folder.save_checkpoint(parts.loop.trainer, parts.tokenizer, parts.images)
        folder.sft_states.remove()
        return checkpoint


def evaluate_alone(config: Config, *, limit: int | None = None) -> EvaluationMetrics:
    """Evaluate the model of ``config`` on its first ``limit`` held-out prompts; None: on all."""
    trainer = config.trainer.model_copy(update={"ranks": 1})  # Nothing is trained.
    sft = config.sft.model_copy(update={"steps": 0})
    config = config.model_copy(update={"trainer": trainer, "sft": sft})
    with closing(build(config)) as parts:
        parts.loop.start()
        check_vllm(parts)
        seed = config.seed + EVALUATION_SEED
        with parts.loop.turns.engine():
            return evaluate_sets(parts.evaluator, parts.sets, iteration=0, seed=seed, limit=limit)


def _reinforce(
    parts: Parts, config: Config, folder: RunFolder, report: Report, sft_s: float, stop: Stop
) -> None:
    loop = parts.loop
    loop.on_rollout = lambda rollout: state.note_rollout(loop, rollout, folder.buffer)
    files = TrajectoryFiles(
        folder.path, config.trajectories, start_iteration=loop.iteration, images=parts.images
    )
    rates = PromptLines(folder.path, start_iteration=loop.iteration)
    watch(report, folder, config)
    folder.states.prune()  # As the process that saved the last one may not have done.
    if not stop.is_set():
        _catch_up(parts, config, folder, report, files)
    while not (stop.is_set() or _is_over(loop, config, report)):
        metrics = loop.iterate()
        records = records_of(loop.latest, loop.iteration, loop.prompts, parts.codec.response_text)
        files.write(loop.iteration, records)
        rates.write(loop.iteration, loop.latest.groups, loop.curriculum)
        last = _is_done(loop, config)
        is_due = last or loop.iteration % config.evaluation.every == 0
        if is_due:
            files.write_samples(loop.iteration, records)
            report.samples(loop.iteration)
        report.iteration(metrics)
        watch(report, folder, config)
        may_decide = is_due and config.evaluation.best
        if last or stop.is_set() or may_decide or loop.iteration % config.save_every == 0:
            state.save(loop, folder, sft_s)
        if last or (is_due and not stop.is_set()):  # A resumed run catches up on it.
            limit = None if last else config.evaluation.prompts
            evaluate(parts, config, folder, report, limit=limit)
            _keep_best(parts, config, folder, report)
    folder.states.prune()  # The last evaluation may have freed one.
    if is_stuck(report.evaluations, config.evaluation):
        patience = config.evaluation.patience
        say(report.console, f"no better evaluation in {patience}: {read_best(folder.path)} stays")


def _catch_up(
    parts: Parts, config: Config, folder: RunFolder, report: Report, files: TrajectoryFiles
) -> None:
    """The evaluation that is due before the first iteration, or was due when the run was killed."""
    done = parts.loop.iteration
    last = done > 0 and _is_done(parts.loop, config)
    is_there = any(evaluation.iteration == done for evaluation in report.evaluations)
    if is_there or not (last or done % config.evaluation.every == 0):
        (folder.path / EVALUATION).unlink(missing_ok=True)
        _keep_best(parts, config, folder, report)
        return
    limit = None if last or done == 0 else config.evaluation.prompts
    if records := files.read(done):
        files.write_samples(done, records)
        report.samples(done)
    evaluate(parts, config, folder, report, limit=limit)
    _keep_best(parts, config, folder, report)


def _keep_best(parts: Parts, config: Config, folder: RunFolder, report: Report) -> None:
    """Keep the present policy if it was evaluated and is the best one."""
    evaluated = [one for one in report.evaluations if one.iteration == parts.loop.iteration]
    if config.evaluation.best and evaluated:
        keep_best(parts, config.evaluation, folder, evaluated[-1])


def _is_over(loop: Loop, config: Config, report: Report) -> bool:
    return _is_done(loop, config) or is_stuck(report.evaluations, config.evaluation)


def _is_done(loop: Loop, config: Config) -> bool:
    enough = config.samples is not None and loop.samples_trained >= config.samples
    return enough or loop.iteration >= config.iterations


def evaluate(
    parts: Parts, config: Config, folder: RunFolder, report: Report, *, limit: int | None = None
) -> None:
    """Report the accuracy on the first ``limit`` held-out prompts (None: on all of them) and on
    the other evaluation sets.

    What an earlier process has of this evaluation, with these weights, is kept.
    """
    seed = config.seed + EVALUATION_SEED
    iteration = parts.loop.iteration
    trained = to_record(report.iterations[-1]) if report.iterations else {}
    about = {
        "iteration": iteration,
        "seed": seed,
        "limit": limit,
        "samples": config.evaluation.samples_of(),
        "data": folder.data,
        "trained": {key: trained[key] for key in ("loss", "grad_norm") if key in trained},
    }
    count = len(parts.evaluator.prompts[:limit])
    everything = count + sum(len(one.prompts) for one in parts.sets.values())
    expected_s = report.evaluation_s(count)
    if expected_s is None or expected_s >= SAY_FROM_S:
        takes = "" if expected_s is None else f", about {clock(expected_s)}"
        say(report.console, f"evaluating {everything} prompts{takes}")
    with (
        closing(Progress(folder.path / EVALUATION, about)) as progress,
        parts.loop.turns.engine(),
    ):
        found = evaluate_sets(
            parts.evaluator,
            parts.sets,
            iteration=iteration,
            seed=seed,
            limit=limit,
            progress=progress,
        )
        folder.states.wait()
        report.evaluation(found)
        progress.remove()
    watch(report, folder, config)
