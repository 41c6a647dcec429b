"""Test cases for programming problems that have none (section 2.3.5).

A problem comes with a generator of inputs, written with CYaRon, and with known good submissions:

1. The generator makes 50 cases, each in a fresh sandbox.
2. Ten submissions run on each case. If at least 7 give the same output, the case is valid and that
   output is expected. A submission that crashes or runs out of time agrees with no other.
3. If at least 9 of the ten pass all valid cases, the problem is kept with them as its tests.

::

    python -m kimi_core.reward.code.testgen problems.jsonl --out kept.jsonl --report report.jsonl

A line of ``problems.jsonl`` holds ``name``, ``generator``, ``submissions`` (ten) and optionally
``language``. Its other keys, such as ``prompt`` and ``answer``, go into ``kept.jsonl``, which
``prompts.source`` takes as it is. The generator is a Python program that prints one case. Its one
argument is the number of the case, starting at 1, so that cases can grow.
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

from kimi_core.config import SandboxConfig
from kimi_core.reward.base import InfrastructureError
from kimi_core.reward.code.output import normalized
from kimi_core.reward.code.problem import FENCES, Language
from kimi_core.reward.code.runner import Executable, Runner, last_words, limits_of, open_sandbox
from kimi_core.sandbox import Limits, Result, Status

CASES = 50
SUBMISSIONS = 10
AGREE = 7
"""Submissions that must give the same output for a case to be valid."""
PASS = 9
"""Submissions that must pass all valid cases for a problem to be kept."""

CASE_BYTES = 1 << 20
"""Most bytes of the input of one case, and of one output."""

GENERATE = """
import random, runpy, sys
sys.path.insert(0, ".")
case, seed = {case}, {seed}
random.seed(f"{{seed}}:{{case}}")
sys.argv = ["generator.py", str(case)]
runpy.run_path("generator.py", run_name="__main__")
"""


@dataclass(frozen=True)
class ProblemSource:
    """A problem that needs test cases."""

    name: str
    generator: str
    submissions: tuple[str, ...]
    language: Language = "python"


@dataclass(frozen=True)
class ProblemReport:
    """Whether a problem was kept, and why."""

    name: str
    kept: bool
    reason: str
    generated: int
    """Cases that the generator made, of ``CASES``."""
    valid: int
    """Cases with an output that enough submissions agree on."""
    passed: tuple[int, ...] = ()
    """Valid cases that each submission passes."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Number of cases that are not valid, by reason."""
    tests: tuple[dict[str, str], ...] = ()
    """The valid cases as the code reward takes them; empty if the problem is dropped."""


def make_tests(
    source: ProblemSource, runner: Runner, limits: Limits, *, seed: int = 0, threads: int = 4
) -> ProblemReport:
    """Make the cases of one problem and decide on it.

    Args:
        limits: limits of each run of a submission.
        seed: seeds the generator's random numbers, together with the number of the case.
        threads: programs that run at the same time.

    Raises:
        InfrastructureError: the sandbox failed twice, so there is no verdict on the problem.
        ValueError: CYaRon is not installed.
    """
    roomy = replace(limits, output_bytes=max(limits.output_bytes, CASE_BYTES))
    library = _cyaron()
    with ThreadPoolExecutor(threads) as pool:

        def generate(case: int) -> Result:
            program = GENERATE.format(case=case, seed=seed)
            files = {**library, "generator.py": source.generator.encode()}
            return runner.run(program, files=files, limits=roomy)

        def submit(built: Executable | Result, case: bytes) -> bytes | None:
            if isinstance(built, Result):
                return None
            done = runner.execute(built, stdin=case, limits=roomy)
            return normalized(done.stdout) if done.status is Status.OK else None

        made = list(pool.map(generate, range(1, CASES + 1)))
        cases = [done.stdout for done in made if done.status is Status.OK]
        faults = Counter(
            f"the generator ended with {done.status}: {last_words(done)}"
            for done in made
            if done.status is not Status.OK
        )
        built = list(pool.map(lambda text: runner.build(text, source.language), source.submissions))
        # One flat map, because a pool whose threads wait for other threads of it would stop.
        pairs = [(one, case) for case in cases for one in built]
        flat = list(pool.map(lambda pair: submit(*pair), pairs))
    outputs = [flat[i : i + len(built)] for i in range(0, len(flat), len(built))]
    return decide(source.name, cases, outputs, faults)


def decide(
    name: str,
    cases: Sequence[bytes],
    outputs: Sequence[Sequence[bytes | None]],
    faults: Counter[str],
) -> ProblemReport:
    """Decide which cases are valid, and whether the problem is kept.

    Args:
        outputs: for each case the normalised output of each submission; None: it failed.
        faults: number of cases that were not generated, by reason.
    """
    dropped = Counter(faults)
    valid: list[tuple[bytes, bytes, Sequence[bytes | None]]] = []
    for case, given in zip(cases, outputs, strict=True):
        votes = Counter(output for output in given if output is not None)
        expected, agreeing = votes.most_common(1)[0] if votes else (b"", 0)
        if agreeing < AGREE:
            dropped[f"fewer than {AGREE} submissions agree"] += 1
        elif not (_is_text(case) and _is_text(expected)):
            dropped["input or output is not UTF-8"] += 1
        else:
            valid.append((case, expected, given))
    passed = tuple(
        sum(given[index] == expected for _, expected, given in valid)
        for index in range(SUBMISSIONS)
    )
    good = sum(count == len(valid) for count in passed)
    kept = bool(valid) and good >= PASS
    if not valid:
        reason = "no case is valid"
    else:
        reason = f"{good} of {SUBMISSIONS} submissions pass all {len(valid)} valid cases"
        reason += "" if kept else f", {PASS} are needed"
    tests = [{"stdin": case.decode(), "stdout": output.decode()} for case, output, _ in valid]
    return ProblemReport(
        name=name,
        kept=kept,
        reason=reason,
        generated=len(cases),
        valid=len(valid),
        passed=passed,
        dropped=dict(dropped),
        tests=tuple(tests) if kept else (),
    )


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _cyaron() -> dict[str, bytes]:
    """The files of CYaRon and of its imports. The sandbox sees no installed package.

    Raises:
        ValueError: a package is not installed.
    """
    files = {}
    for package in ("cyaron", "xeger"):
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(
                f"Test generation needs the package {package}: pip install 'kimi-core[testgen]'"
            )
        folder = Path(spec.submodule_search_locations[0])
        for path in folder.rglob("*.py"):
            inside = path.relative_to(folder)
            if "tests" not in inside.parts:
                files[f"{package}/{inside}"] = path.read_bytes()
    return files


def read_sources(path: Path) -> Iterator[tuple[ProblemSource, dict[str, Any]]]:
    """Yield problems, with the other keys of their lines.

    Raises:
        ValueError: the file is missing, or a line is bad; the message says what was found.
    """
    if not path.is_file():
        raise ValueError(f"No file {path}; give a JSONL file of problems")
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
            name, generator = record.pop("name"), record.pop("generator")
            submissions, language = record.pop("submissions"), record.get("language", "python")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f'{where}: {error!r}; expected {{"name", "generator", "submissions"}}'
            ) from None
        if not isinstance(submissions, list) or len(submissions) != SUBMISSIONS:
            raise ValueError(f'{where}: "submissions" must be a list of {SUBMISSIONS} programs')
        if not all(isinstance(text, str) for text in (name, generator, *submissions)):
            raise ValueError(f"{where}: name, generator and submissions must be text")
        if language not in FENCES:
            raise ValueError(f"{where}: language {language!r}; allowed are {', '.join(FENCES)}")
        yield ProblemSource(name, generator, tuple(submissions), language), record


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("problems", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="JSONL of the kept problems")
    parser.add_argument("--report", type=Path, help="JSONL with the outcome of each problem")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--url", default="", help="sandbox service (default: a pool)")
    parser.add_argument("--allow-weak", action="store_true")
    given = parser.parse_args(argv)
    config = SandboxConfig(url=given.url, allow_weak=given.allow_weak)
    try:
        sources = list(read_sources(given.problems))
        with (
            closing(open_sandbox(config)) as sandbox,
            given.out.open("w") as out,
            (given.report or Path(os.devnull)).open("w") as reports,
        ):
            runner = Runner(sandbox.run)
            decided = [
                _write(source, others, runner, limits_of(config), given.seed, out, reports)
                for source, others in sources
            ]
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if all(decided) else 1


def _write(
    source: ProblemSource,
    others: dict[str, Any],
    runner: Runner,
    limits: Limits,
    seed: int,
    out: TextIO,
    reports: TextIO,
) -> bool:
    """Decide on one problem, write the outcome, and return whether there is a verdict."""
    decided = True
    try:
        report = make_tests(source, runner, limits, seed=seed)
    except InfrastructureError as error:
        report = ProblemReport(source.name, False, f"no verdict: {error}", 0, 0)
        decided = False
    print(f"{source.name}: {'kept' if report.kept else 'dropped'}, {report.reason}", flush=True)
    reports.write(json.dumps({**asdict(report), "tests": len(report.tests)}) + "\n")
    if report.kept:
        line = {"name": source.name, **others, "tests": report.tests}
        out.write(json.dumps(line, ensure_ascii=False) + "\n")
    return decided


if __name__ == "__main__":
    sys.exit(main())
