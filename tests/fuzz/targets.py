"""What reads input that others write: each target takes bytes, and only the named errors may come.

    python tests/fuzz/targets.py TARGET --seconds 60

With ``atheris`` (``pip install atheris``) the bytes are found by coverage, otherwise by random
edits of the corpus in ``tests/fuzz/corpus/TARGET``. A finding ends the process with a traceback.
"""

import argparse
import base64
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
WORK = tempfile.TemporaryDirectory()


def config(data: bytes) -> None:
    """A TOML file, then overrides: a config or a ValueError; a config comes back from its TOML."""
    from kimi_core.run.config_file import dump_toml, load_config, parse_config

    file = Path(WORK.name) / "fuzz.toml"
    text, _, overrides = data.partition(b"\0")
    file.write_bytes(text)
    with suppress(ValueError):
        found = load_config(file, overrides.decode(errors="replace").splitlines())
        assert parse_config(dump_toml(found), file) == found


def prompts(data: bytes) -> None:
    """A file of prompts: prompts with text, or a ValueError that names the file."""
    from kimi_core.prompts.jsonl import load_examples, read_prompts

    file = Path(WORK.name) / "fuzz.jsonl"
    file.write_bytes(data)
    for read in (read_prompts, load_examples):
        said = "fuzz.jsonl"
        try:
            assert read(file)
        except ValueError as error:
            said = str(error)
        assert "fuzz.jsonl" in said


def answers(data: bytes) -> None:
    """A response of a model: an answer that is in it, or none, in a time that grows with it."""
    from kimi_core.reward.math.extract import extract

    text = data.decode(errors="replace")
    started = time.process_time()
    for place in ("boxed", "hashes", "answer", "last_line"):
        found = extract(text, [place])
        assert found is None or isinstance(found, str)
    assert time.process_time() - started < 1 + len(text) / 10_000, "slow"


def programs(data: bytes) -> None:
    """A response of a model: some program, in a time that grows with it."""
    from kimi_core.reward.code.problem import CheckTest, Problem
    from kimi_core.reward.code.program import extract_program

    text = data.decode(errors="replace")
    check = CheckTest("def check(f):\n    assert f(1)", "f")
    started = time.process_time()
    for problem in (Problem(()), Problem((check,)), Problem((check,), prefix="def f(x):\n")):
        assert isinstance(extract_program(problem, text), str)
    assert time.process_time() - started < 1 + len(text) / 10_000, "slow"


def verdicts(data: bytes) -> None:
    """What a sandboxed program has printed: a verdict, or an answer that counts as an exception."""
    from kimi_core.reward.code.check_driver import read_answer
    from kimi_core.reward.code.literals import gives, gives_json
    from kimi_core.reward.code.output import same_output
    from kimi_core.reward.code.reward import accepted_by

    line = data.decode(errors="replace")
    for expected in (1, 1.5, "a", [1, (2,)], {"a": {1}}, None, b"x"):
        assert isinstance(gives(line, expected), bool)
        assert isinstance(gives_json(line, expected), bool)
    assert isinstance(same_output(data, b"1 2\n0.5"), bool)
    assert isinstance(same_output(data, b"1 2\n0.5", 1e-6), bool)
    assert isinstance(accepted_by(data), bool)
    with suppress(Exception):  # It raises what the response's program has raised.
        read_answer(line)


def results(data: bytes) -> None:
    """A result of the sandbox service, and a program for it: JSON of ours, or a ValueError."""
    from kimi_core.sandbox.protocol import BATCH, RESULT

    for adapter in (BATCH, RESULT):
        with suppress(ValueError):
            adapter.validate_json(data)


def records(data: bytes) -> None:
    """What a killed run has left: metrics, the rollout's note, and an evaluation that was cut."""
    from kimi_core.evaluation.progress import Progress, unsealed
    from kimi_core.metrics import read_metrics

    file = Path(WORK.name) / "records"
    file.write_bytes(data)
    said = "records, line"
    try:
        read_metrics(file)
    except ValueError as error:
        said = str(error)
    assert "records, line" in said
    unsealed(data)
    progress = Progress(file, {"iteration": 3})
    progress.close()
    assert Progress(file, {"iteration": 3}).responses.keys() == progress.responses.keys()


TARGETS: dict[str, Callable[[bytes], None]] = {
    one.__name__: one for one in (config, prompts, answers, programs, verdicts, results, records)
}


def edited(data: bytes, pieces: list[bytes], chance: random.Random) -> bytes:
    """``data`` with a few random edits; pieces of other inputs are put into it."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 5)):
        at, size = chance.randrange(len(changed) + 1), chance.randrange(1, 9)
        kind = chance.randrange(6)
        if kind == 0:
            changed[at:at] = chance.randbytes(size)
        elif kind == 1:
            del changed[at : at + size]
        elif kind == 2 and changed:
            changed[at % len(changed)] ^= 1 << chance.randrange(8)
        elif kind == 3:
            piece = chance.choice(pieces)
            start = chance.randrange(len(piece) + 1)
            changed[at:at] = piece[start : start + chance.randrange(1, 40)]
        elif kind == 4:
            changed[at:at] = changed[at : at + size] * chance.randrange(1, 30)
        else:
            token = chance.choice([b"null", b"-1", b"1e999", b"[", b"{}", b'"', b"\\", b"\n", b"$"])
            changed[at:at] = token
    return bytes(changed)


def corpus(name: str) -> list[bytes]:
    return [b"", *(file.read_bytes() for file in sorted((CORPUS / name).iterdir()))]


def edit_for(name: str, seconds: float, seed: int = 0, most: float = float("inf")) -> int:
    """Run a target on its corpus, then on random edits of it; return the number of inputs."""
    target, inputs, chance = TARGETS[name], corpus(name), random.Random(seed)
    end, count = time.monotonic() + seconds, 0
    for data in inputs:
        target(data)
    while time.monotonic() < end and count < most:
        data = edited(chance.choice(inputs), inputs, chance)
        try:
            target(data)
        except BaseException:
            print(f"input, in base64: {base64.b64encode(data).decode()}", file=sys.stderr)
            raise
        count += 1
    return count + len(inputs)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--new", type=Path, help="folder for inputs that reach new code")
    given = parser.parse_args()
    try:
        import atheris
    except ImportError:
        count = edit_for(given.target, given.seconds, given.seed)
        print(json.dumps({"target": given.target, "inputs": count, "by": "random edits"}))
        return
    with atheris.instrument_imports(include=["kimi_core"]):
        TARGETS[given.target](b"")  # Imports what it tests.
    folders = [str(given.new)] if given.new else []
    arguments = [f"-max_total_time={given.seconds}", f"-seed={given.seed}", "-max_len=2000"]
    atheris.Setup(
        [sys.argv[0], *arguments, *folders, str(CORPUS / given.target)], TARGETS[given.target]
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
