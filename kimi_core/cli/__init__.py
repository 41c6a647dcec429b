"""The ``kimi`` command.

Its exit status is 0 if all went well, 1 if a run had to stop, 2 for bad input, 130 for Ctrl-C and
143 for SIGTERM. Errors that a user can act on are printed in one line, without a traceback.
"""

import difflib
import sys
from collections.abc import Callable, Sequence

from kimi_core.cli import data, runs, start, viewing
from kimi_core.cli.completion import completion
from kimi_core.cli.parser import fail
from kimi_core.run.output import keep_output

COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "new": (start.new, "begin a task of yours: a folder with three files that run at once"),
    "config": (start.config, "list every setting with its default"),
    "train": (runs.train, "train a model by reinforcement learning"),
    "sft": (runs.sft, "supervised fine-tuning alone"),
    "evaluate": (runs.evaluate, "accuracy of a model on held-out prompts or a benchmark"),
    "curate": (data.curate, "make a training set of prompts, with a report"),
    "warmup": (data.warmup, "collect long, verified answers for supervised fine-tuning"),
    "long2short": (runs.long2short, "make a trained model answer shorter, by four methods"),
    "check": (data.check, "check programming problems and their reference solutions"),
    "reward": (data.reward, "train and compare two reward models"),
    "replay": (runs.replay, "do an iteration of a run again and compare every bit"),
    "dashboard": (viewing.dashboard, "look at runs in a browser, down to every token"),
    "chat": (viewing.chat, "ask the model of a run, before and after"),
    "push": (runs.push, "upload the checkpoint of a run to the Hugging Face hub"),
    "worker": (runs.worker, "sample for a run of another host"),
    "engine": (runs.engine, "start, wake and end an engine of this host over HTTP"),
    "sandbox": (data.sandbox, "run programs in a sandbox, serve it, or check this machine"),
    "buffer": (data.buffer, "print what a rollout buffer's file holds"),
    "completion": (
        lambda rest: completion(list(COMMANDS), rest),
        "print what bash or zsh needs to complete commands and settings",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(_overview())
        return 0 if given else 2
    keep_output()
    name, *rest = given
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        meant = f"; did you mean {near[0]}?" if near else ""
        return fail(f"kimi has no command {name!r}{meant}; it has {', '.join(COMMANDS)}", 2)
    return COMMANDS[name][0](rest)


def _overview() -> str:
    lines = [f"  {name:<12}{what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        ["usage: kimi COMMAND ...", "", *lines, "", "kimi COMMAND --help says more of each."]
    )
