"""``trajectories/000012.jsonl``: every response that an iteration used up, one JSON object a line.

``samples/*.txt`` shows a few of these records to a person, and ``images/DIGEST.png`` the images of
their prompts. ``docs/metrics.md`` describes all three.
"""

import json
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import groupby
from pathlib import Path

import numpy as np

from kimi_core.config import TrajectoriesConfig
from kimi_core.loop import Outcome
from kimi_core.models.vision import Images
from kimi_core.prompts.many import ById
from kimi_core.run.files import write_atomically
from kimi_core.run.previews import Previews, preview_path
from kimi_core.types import EndReason, Prompt, Trajectory

SAMPLES_SHOWN = 8
"""Records written to a file in ``samples/``."""


@dataclass(frozen=True, kw_only=True)
class TrajectoryRecord:
    """One response that was trained, or that has no verdict, with everything known of it.

    Lists have one entry per response token. ``None`` stands for what does not exist: a reward
    without a verdict, or the trainer's log-prob of a token that does not count.
    """

    iteration: int
    """The iteration that used the response up, counted from 1."""
    trajectory_id: int
    group_id: int
    prompt_id: int
    prompt: str
    answer: str
    """The reference answer."""
    response: str
    """The response as text, without its stop token."""
    images: list[str] = field(default_factory=list)
    """SHA-256 of each image of the prompt."""
    end_reason: EndReason | None
    versions: list[tuple[int, int]]
    """(policy version, number of tokens) of each stretch of the response, in order."""
    correctness: float | None = None
    """The reward function's result; None: no verdict could be reached."""
    reward_parts: dict[str, float] = field(default_factory=dict)
    """What the reward functions say that it is made of."""
    note: str = ""
    """Why, if the reward function says so: a judge's reasoning, say."""
    length_reward: float | None = None
    penalty: float | None = None
    reward: float | None = None
    """Correctness plus length reward minus penalty."""
    advantage: float | None = None
    prompt_ids: list[int] = field(default_factory=list)
    """Token ids of the prompt."""
    token_ids: list[int] = field(default_factory=list)
    """Token ids of the response."""
    engine_logprobs: list[float] = field(default_factory=list)
    """Nats, as the engine reported them when it sampled."""
    trainer_logprobs: list[float | None] = field(default_factory=list)
    """Nats, in the training pass over the response."""


def records_of(
    outcome: Outcome,
    iteration: int,
    prompts: ById | Mapping[int, Prompt],
    response_text: Callable[[np.ndarray], str],
) -> list[TrajectoryRecord]:
    """The records of one iteration: trained responses by group, then those without a verdict."""

    def describe(one: Trajectory) -> TrajectoryRecord:
        prompt, start = prompts[one.prompt_id], one.prompt_length
        own = outcome.logprobs.get(one.trajectory_id)
        stretches = groupby(one.policy_versions[start:].tolist())
        return TrajectoryRecord(
            iteration=iteration,
            trajectory_id=one.trajectory_id,
            group_id=one.group_id,
            prompt_id=one.prompt_id,
            prompt=prompt.text,
            answer=prompt.answer,
            images=[image.digest for image in prompt.images],
            response=response_text(one.response_ids),
            end_reason=one.end_reason,
            versions=[(version, len(list(tokens))) for version, tokens in stretches],
            prompt_ids=one.token_ids[:start].tolist(),
            token_ids=one.response_ids.tolist(),
            engine_logprobs=[_short(value) for value in one.logprobs[start:].tolist()],
            trainer_logprobs=[
                None if value != value else _short(value)
                for value in ([] if own is None else own[start:].tolist())
            ],
        )

    records = []
    for group in outcome.groups:
        for row, one in enumerate(group.trajectories):
            record = replace(
                describe(one),
                correctness=float(group.correctness[row]),
                reward_parts=dict(group.scores[row].parts) if group.scores else {},
                note=group.scores[row].note if group.scores else "",
                length_reward=float(group.length_rewards[row]),
                penalty=float(group.penalties[row]),
                reward=float(group.rewards[row]),
                advantage=float(group.advantages[row]),
            )
            records.append(record)
    return records + [describe(one) for one in outcome.unjudged]


class TrajectoryFiles:
    """The folders ``trajectories/``, ``samples/`` and ``images/`` of a run.

    Files of iterations after ``start_iteration`` are removed: those iterations run a second time.

    Args:
        images: the run's images; None: no record has some, or they are not to be shown.
    """

    def __init__(
        self,
        folder: Path,
        config: TrajectoriesConfig,
        *,
        start_iteration: int = 0,
        images: Images | None = None,
    ) -> None:
        self._config = config
        self._previews = Previews(folder, images)
        self._trajectories, self._samples = folder / "trajectories", folder / "samples"
        for path in [*self._trajectories.glob("*.jsonl"), *self._samples.glob("*.txt")]:
            if int(path.stem) > start_iteration:
                path.unlink()

    def write(self, iteration: int, records: Sequence[TrajectoryRecord]) -> None:
        """Write the records of an iteration, as far as ``[trajectories]`` asks for them.

        Raises:
            OSError: the disk is full or has another fault.
        """
        if not self._config.every or iteration % self._config.every:
            return
        left_out = () if self._config.tokens else TOKEN_FIELDS
        lines = []
        for record in records:
            values = {name: v for name, v in vars(record).items() if name not in left_out}
            lines.append(json.dumps(values, allow_nan=False, separators=(",", ":")) + "\n")
        self._previews.write(digest for record in records for digest in record.images)
        self._trajectories.mkdir(exist_ok=True)
        write_atomically(self._trajectories / f"{iteration:06d}.jsonl", "".join(lines))

    def read(self, iteration: int) -> list[TrajectoryRecord]:
        """The records of an iteration; empty where none were written.

        Raises:
            ValueError: the file is damaged.
        """
        path = self._trajectories / f"{iteration:06d}.jsonl"
        try:
            return list(read_trajectories(path)) if path.is_file() else []
        except (ValueError, TypeError, LookupError) as error:
            raise ValueError(
                f"{path} is damaged ({error}): remove it; --resume then goes on without its samples"
            ) from None

    def write_samples(self, iteration: int, records: Sequence[TrajectoryRecord]) -> None:
        """Write the first records to ``samples/000010.txt`` for a person to read."""
        self._samples.mkdir(exist_ok=True)
        shown = records[:SAMPLES_SHOWN]
        self._previews.write(digest for record in shown for digest in record.images)
        text = sample_text(iteration, shown)
        write_atomically(self._samples / f"{iteration:06d}.txt", text)


TOKEN_FIELDS = ("prompt_ids", "token_ids", "engine_logprobs", "trainer_logprobs")
"""Fields that ``trajectories.tokens = false`` leaves out."""


def read_trajectories(path: str | Path) -> Iterator[TrajectoryRecord]:
    """The records of one file. Keys that this version does not know are left out."""
    known = {one.name for one in fields(TrajectoryRecord)}
    with Path(path).open() as lines:
        for line in lines:
            values = {name: v for name, v in json.loads(line).items() if name in known}
            values["versions"] = [tuple(stretch) for stretch in values["versions"]]
            yield TrajectoryRecord(**values)


def sample_text(iteration: int, records: Sequence[TrajectoryRecord]) -> str:
    """The records as text for a person.

    What a model writes is hostile input. Characters that steer a terminal become escapes, and every
    line of the model stands behind a bar, so that it cannot be mistaken for a line of ours.
    """
    blocks = [f"Iteration {iteration}\n"]
    for number, one in enumerate(records, 1):
        reward = "no verdict" if one.reward is None else f"reward {one.reward:.4g}"
        versions = ", ".join(str(version) for version, _ in one.versions)
        images = "".join(f"image {preview_path(digest)}\n" for digest in one.images)
        blocks.append(
            f"--- {number}: {reward}, end {one.end_reason or 'open'}, "
            f"policy versions {versions or 'none'}\n"
            f"prompt\n{behind_bars(one.prompt)}\n{images}response\n{behind_bars(one.response)}\n"
        )
    return "\n".join(blocks)


def visible(text: str) -> str:
    """``text`` with an escape for every character that does not print, except line feeds.

    >>> visible("1\\x1b[2J")
    '1\\\\x1b[2J'
    """
    return "".join(c if _prints(c) else c.encode("unicode_escape").decode() for c in text)


def _prints(char: str) -> bool:
    category = unicodedata.category(char)
    return char == "\n" or (category[0] != "C" and category not in ("Zl", "Zp"))


def behind_bars(text: str) -> str:
    """A text of a model for a terminal: ``visible``, with a bar before each line."""
    return "\n".join(f"  | {line}" for line in visible(text).split("\n"))


def _short(value: float) -> float:
    """Six significant digits, as many as float32 holds."""
    return float(f"{value:.6g}")
