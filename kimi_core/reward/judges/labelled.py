"""A small labelled data set for judges, made from the `multiply` prompts.

A response gives the product as an unfinished sum of two parts, so a judge has to add the parts to
know whether the response is right. In a wrong response one digit of one part is changed. The
reasoning adds the columns from the right and compares each digit with the reference.

    question   7*384=
    reference  2688
    response   2100+0588
    reasoning  0+8=8,0:8=8;0+8+0=8,0:8=8;1+5+0=6,0:6=6;2+0+0=2,0:2=2;

A column reads: digits and carry = digit, carry : digit, = or # (unequal), the reference's digit.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kimi_core.models.images import checked
from kimi_core.prompts.images import take_images
from kimi_core.prompts.place import Place
from kimi_core.tasks import multiply
from kimi_core.types import IMAGE_MARK, Image, Prompt

TEMPLATE = "{question}{reference}?{response}>"
"""The prompt for a model from scratch, which reads single characters."""

ALPHABET = multiply.ALPHABET + ':{}" correctuefals'
"""Every character of the examples and their verdicts."""

VERDICT = {True: '{"correct":true}', False: '{"correct":false}'}


@dataclass(frozen=True)
class Labelled:
    """A response with its correct verdict, and reasoning that leads to the verdict.

    >>> Labelled("7*384=", "2688", "2100+0588", True).prompt()
    '7*384=2688?2100+0588>'
    """

    question: str
    reference: str
    response: str
    correct: bool
    reasoning: str = ""
    images: tuple[Image, ...] = ()
    """Those of the question, which has an ``IMAGE_MARK`` in the place of each, or none."""

    def asked(self, template: str = TEMPLATE) -> Prompt:
        """`prompt` with the images."""
        return Prompt(0, self.prompt(template), "", images=self.images)

    def prompt(self, template: str = TEMPLATE) -> str:
        return template.format(
            question=self.question, reference=self.reference, response=without_marks(self.response)
        )


def without_marks(response: str) -> str:
    """A response in which no character is taken for the place of one of the question's images."""
    return response.replace(IMAGE_MARK, "\N{REPLACEMENT CHARACTER}")


def sums(prompts: Sequence[Prompt], *, seed: int) -> list[Labelled]:
    """One response to each of the `multiply` ``prompts``, half of them right, in random order."""
    rng = random.Random(seed)
    shuffled = rng.sample(list(prompts), len(prompts))
    return [_example(prompt, index % 2 == 0, rng) for index, prompt in enumerate(shuffled)]


def load_labelled(path: str | Path) -> list[Labelled]:
    """Read JSONL whose lines hold ``question``, ``reference``, ``response``, ``correct`` (a bool),
    and ``reasoning``, which only the training of a judge needs.

    ``images`` lists the question's images, as in a file of prompts. The folder of a run is read,
    too: its ``trajectories/`` hold the responses of the run with their verdicts.

    Raises:
        ValueError: the file does not exist, or a line is not like that; the message names the line.
    """
    if Path(path).is_dir():
        return _of_run(Path(path))
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise ValueError(f"No file {path}") from None
    examples = []
    for number, line in enumerate(lines, 1):
        try:
            fields = json.loads(line)
            if "images" in fields:
                place = Place(Path(path), number)
                fields["images"] = take_images({"prompt": fields["question"]} | fields, place)
            example = Labelled(**fields)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        texts = (example.question, example.reference, example.response, example.reasoning)
        if not isinstance(example.correct, bool) or not all(isinstance(t, str) for t in texts):
            raise ValueError(
                f"{path}, line {number}: `correct` must be true or false, all other fields text"
            )
        examples.append(example)
    return examples


def split_labelled(
    examples: Sequence[Labelled], held_out: int, *, seed: int
) -> tuple[list[Labelled], list[Labelled]]:
    """Training and test examples, in random order; a question is in only one of the two sets.

    The test set has at least ``held_out`` examples.

    Raises:
        ValueError: no training examples are left.
    """
    by_question: dict[str, list[Labelled]] = {}
    for example in examples:
        digests = [image.digest for image in example.images]
        by_question.setdefault(" ".join([example.question, *digests]), []).append(example)
    rng = random.Random(seed)
    questions = rng.sample(sorted(by_question), len(by_question))
    test: list[Labelled] = []
    while questions and len(test) < held_out:
        test += by_question[questions.pop()]
    train = [example for question in questions for example in by_question[question]]
    if not train:
        raise ValueError(
            f"A test set of {held_out} examples leaves none of {len(examples)} for training; lower "
            "--test"
        )
    return rng.sample(train, len(train)), rng.sample(test, len(test))


def _of_run(run: Path) -> list[Labelled]:
    """The responses of a run that have a verdict, each text once for each question.

    Raises:
        ValueError: the run has no trajectories.
    """
    files = sorted((run / "trajectories").glob("*.jsonl"))
    if not files:
        raise ValueError(f"{run} has no trajectories; give a file of labelled lines, or a run")
    found: dict[tuple[int, str], Labelled] = {}
    images: dict[str, Image] = {}
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            try:
                one = json.loads(line)
                if one["correctness"] is None:
                    continue
                for digest in one["images"]:
                    if digest not in images:
                        images[digest] = checked(run / "images" / f"{digest}.png")
                found[one["prompt_id"], one["response"]] = Labelled(
                    one["prompt"],
                    one["answer"],
                    one["response"],
                    one["correctness"] > 0.5,
                    images=tuple(images[digest] for digest in one["images"]),
                )
            except (KeyError, TypeError, ValueError, RecursionError) as error:
                raise ValueError(f"{file}, line {number}: {error!r}") from error
    return list(found.values())


def _example(prompt: Prompt, correct: bool, rng: random.Random) -> Labelled:
    factor, digits = prompt.text.rstrip("=").split("*")
    parts = [int(factor) * int(digits[0]) * 100, int(factor) * int(digits[1:])]
    response = "+".join(f"{part:04d}" for part in parts)
    if not correct:
        places = [place for place, char in enumerate(response) if char != "+"]
        place = rng.choice(places)
        digit = rng.choice([d for d in "0123456789" if d != response[place]])
        response = response[:place] + digit + response[place + 1 :]
    reference = f"{int(prompt.answer):04d}"
    return Labelled(prompt.text, reference, response, correct, _add_up(response, reference))


def _add_up(response: str, reference: str) -> str:
    """For each column from the right: the sum, the carry, and the comparison with the reference."""
    parts, carry, steps = response.split("+"), 0, ""
    for column in range(-1, -5, -1):
        digits = [part[column] for part in parts]
        total = carry + sum(map(int, digits))
        carried = f"+{carry}" if column < -1 else ""
        carry, digit = divmod(total, 10)
        sign = "=" if str(digit) == reference[column] else "#"
        steps += f"{'+'.join(digits)}{carried}={digit},{carry}:{digit}{sign}{reference[column]};"
    return steps
