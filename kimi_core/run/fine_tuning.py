"""The SFT phase of a run, with states from which a killed one continues bit for bit."""

from time import perf_counter

from rich.console import Console

from kimi_core.config import Config
from kimi_core.prompts.messages import example_in_chat
from kimi_core.prompts.overlap import overlaps
from kimi_core.run.build import Parts
from kimi_core.run.folder import RunFolder
from kimi_core.run.report import clock
from kimi_core.run.stop import Stop
from kimi_core.trainer.fitting import Save
from kimi_core.trainer.sft import SftPhase
from kimi_core.types import Prompt


def fine_tune(
    parts: Parts,
    config: Config,
    console: Console,
    folder: RunFolder | None = None,
    stop: Stop | None = None,
) -> float:
    """Say where the data overlap, then carry out the SFT phase, if the config has one.

    Args:
        folder: where states of SFT are saved; the phase continues from the newest one that is
            there, which any number of ranks may have saved. None: nothing is saved.
        stop: looked at after each step.

    Returns the seconds that it took, in all processes.

    Raises:
        ValueError: the data is unknown, missing, malformed, or not that of the state.
        TrainingDiverged: a loss is not finite.
        Stopped: a signal came; the last step is saved.
        OSError: as ``States.save``.
    """
    started, steps = perf_counter(), config.sft.steps
    say_overlaps(parts, console)
    if not parts.examples:
        return perf_counter() - started
    if parts.images is not None:
        asked = (prompt for prompt, _ in parts.examples)
        parts.images.add(one for one in asked if isinstance(one, Prompt))
    examples = parts.codec.encode_examples(
        [(example_in_chat(prompt, config.prompts), answer) for prompt, answer in parts.examples]
    )
    parts.examples.clear()  # As text they are not needed any more.
    fingerprint = parts.loop.trainer.fingerprint()
    resume = None
    if folder and folder.sft_states.latest():
        saved = folder.load_state(fingerprint, folder.sft_states)
        folder.compare(saved)
        resume = saved.number, saved.folder
        started -= saved.record["sft_s"]
        say(console, f"{saved.remark}\nsft goes on after step {saved.number}".strip())

    begun, before = perf_counter(), resume[0] if resume else 0

    def report(step: int, loss: float) -> None:
        if step % max(1, steps // 10) == 0:
            left_s = (perf_counter() - begun) / (step - before) * (steps - step)
            say(console, f"sft {step}/{steps}  loss {loss:.3f}  eta {clock(left_s)}")

    def after_step(step: int, save: Save) -> None:
        if folder is None or step == steps:
            return
        if step % config.sft.save_every == 0 or (stop and stop.is_set()):
            record = folder.record(fingerprint) | {"sft_s": perf_counter() - started}
            folder.sft_states.save(step, [save], record)
            if stop:
                stop.leave(f"step {step} of {steps} of SFT")

    SftPhase(parts.loop.trainer, config.sft, config.trainer, report, after_step, resume).fit(
        examples, config.seed
    )
    return perf_counter() - started


def say_overlaps(parts: Parts, console: Console) -> None:
    """Say where the data overlap."""
    for sentence in overlaps(parts.train_prompts, parts.evaluator.prompts, parts.examples):
        say(console, f"warning: {sentence}")
    for name, one in parts.sets.items():
        for sentence in overlaps(parts.train_prompts, one.prompts, parts.examples):
            said = sentence.replace("held-out prompt", f"{name} prompt")
            say(console, f"warning: evaluation.sets.{name}: {said}")


def say(console: Console, line: str) -> None:
    """Print a line as it is."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)
