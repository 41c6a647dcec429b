"""Does one iteration of a run a second time and compares it with what the run recorded.

A run is exact, so everything but times must be equal, bit for bit: tokens and rewards with
``trajectories/``, numbers with ``metrics.jsonl``, weights with the next state. The run's folder is
read and never written.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from kimi_core.buffer import RolloutBuffer
from kimi_core.config import Config
from kimi_core.metrics import PROCESSES, TIMES, IterationMetrics, read_lines, to_record
from kimi_core.run import identity, state
from kimi_core.run.build import Parts, build
from kimi_core.run.config_file import load_config
from kimi_core.run.files import check_run
from kimi_core.run.folder import TOKENIZER, RunFolder, changes
from kimi_core.run.states import SavedState
from kimi_core.run.trajectories import TrajectoryFiles, records_of
from kimi_core.trainer.trainer import PARAMETERS


def replay(run: Path, iteration: int) -> Iterator[tuple[bool, str]]:
    """What was compared: whether it is equal, and a line about it.

    Args:
        run: the folder of the run. Models and files are found as the run found them.
        iteration: the one to do again; the state before it must be there.

    Raises:
        ValueError: there is no such run or state, or it is of another model or other prompts.
    """
    states, _ = RunFolder.states_in(run)
    before, after = states.numbered(iteration - 1), states.numbered(iteration)
    if before is None:
        if not states.numbers():
            check_run(run)
        kept = ", ".join(str(number + 1) for number in states.numbers()) or "none"
        raise ValueError(
            f"{run} has no state to do iteration {iteration} from; it has those for {kept}. Raise "
            "keep_states to keep more"
        )
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "config.toml").write_text((after or before).record["config"])
        config = load_config(Path(place) / "config.toml")
        with closing(build(config, tokenizer_file=run / TOKENIZER)) as parts:
            metrics = _again(parts, before, Path(place))
            yield from _compare(run, config, parts, metrics, after, Path(place))
            there = identity.environment(parts.model.device)
    for name, (then, now) in changes(before.record.get("environment", {}), there).items():
        yield True, f"{name} was {then} and is {now}"


def _again(parts: Parts, before: SavedState, place: Path) -> IterationMetrics:
    loop = parts.loop
    there = before.record["fingerprint"] == loop.trainer.fingerprint()
    if not (there and state.same_prompts(loop, np.load(before.folder / state.PROMPTS))):
        raise ValueError(
            f"{before.folder} is of {'other prompts' if there else 'another model'}: put the "
            "model and the prompts of the run back where its config.toml names them"
        )
    saved = before.record["state"]
    loop.trainer.load(before.folder)
    loop.curriculum.load_state(state.curriculum_in(before.folder, saved))
    shutil.copyfile(before.folder / state.SNAPSHOT, place / "buffer.bin")
    loop.load_state(saved, RolloutBuffer.open(place / "buffer.bin"))
    return loop.iterate()


def _compare(
    run: Path,
    config: Config,
    parts: Parts,
    metrics: IterationMetrics,
    after: SavedState | None,
    place: Path,
) -> Iterator[tuple[bool, str]]:
    loop, number = parts.loop, metrics.iteration
    lines = [record for _, record in read_lines(run / "metrics.jsonl")]
    found = [one for one in lines if (one["kind"], one["iteration"]) == ("iteration", number)]
    mine = json.loads(json.dumps(to_record(metrics)))
    if found:
        recorded = {k: v for k, v in found[0].items() if k not in (*TIMES, *PROCESSES, "kind")}
        yield _equal("metrics", recorded, {key: mine.get(key) for key in recorded})
    file = run / "trajectories" / f"{number:06d}.jsonl"
    if file.is_file():
        records = records_of(loop.latest, number, loop.prompts, parts.codec.response_text)
        TrajectoryFiles(place, config.trajectories).write(number, records)
        yield _equal("responses", _lines(file), _lines(place / "trajectories" / file.name))
    if after is not None:
        loop.trainer.save(place)
        yield _equal("weights", load_file(after.folder / PARAMETERS), load_file(place / PARAMETERS))


def _lines(path: Path) -> list[Any]:
    try:
        return [json.loads(line) for line in path.read_bytes().splitlines()]
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}): remove it, and all else is compared"
        ) from None


def _equal(what: str, recorded: Any, again: Any) -> tuple[bool, str]:
    found = next(_differences(what, recorded, again), "")
    return not found, found or f"{what}: {len(recorded)} equal"


def _differences(where: str, one: Any, other: Any) -> Iterator[str]:
    """Where two values differ, and by how much."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one | other:
            yield from _differences(f"{where}, {key}", one.get(key), other.get(key))
    elif isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        if one.shape == other.shape and one.tobytes() != other.tobytes():
            gap = np.abs(one.astype(np.float64) - other.astype(np.float64))
            count = np.count_nonzero(gap)
            yield f"{where}: {count} of {gap.size} differ, by {gap.max():.3g} at most"
        elif one.shape != other.shape:
            yield f"{where}: shapes {one.shape} and {other.shape}"
    elif isinstance(one, list) and isinstance(other, list):
        for place, (a, b) in enumerate(zip(one, other, strict=False)):
            yield from _differences(f"{where}, {place}", a, b)
        if len(one) != len(other):
            yield f"{where}: {len(one)} and {len(other)} of them"
    elif one != other:
        yield f"{where}: {one!r} recorded, {other!r} again"
