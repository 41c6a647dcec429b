"""Few-shot maximum of three numbers: a task that a small pretrained model can be taught by reward.

With one worked example in front, the text to continue is two lines::

    $max(12, 35, 8) = 35$
    $max(71, 6, 40) =

and the answer ends with the dollar sign (``rollout.stop = ["$"]``). The answer stands in the
prompt: the model has to find out that it is to compare and copy, which carries over to numbers that
it was not trained on. Sums, as ``addition`` asks for, it mostly has to know.
"""

import random

from kimi_core.types import Prompt


def prompts(shots: int, largest: int, seed: int) -> list[Prompt]:
    """About largest² / 6 prompts, each on three numbers from 1 to ``largest``.

    Any two of a problem's numbers determine the third, as the sum of all three is a multiple of
    ``largest``. So no two problems have more than one number in common, and a held-out problem
    shares no pair of operands with any other.

    The order of the numbers and the worked examples are drawn from ``seed``. An example shares no
    number with its problem.

    Raises:
        ValueError: fewer than 0 shots, or too few numbers to draw an example from.
    """
    if shots < 0:
        raise ValueError(f"prompts.task.shots = {shots}; allowed is 0 or more")
    if largest < 6:
        raise ValueError(
            f"prompts.task.largest = {largest}; a problem and its example need 6 numbers; "
            "allowed is 6 or more"
        )
    rng = random.Random(seed)
    made: list[Prompt] = []
    for low in range(1, largest + 1):
        for middle in range(low + 1, largest + 1):
            high = (-low - middle) % largest or largest
            if high <= middle:
                continue
            others = [n for n in range(1, largest + 1) if n not in (low, middle, high)]
            shown = [rng.sample(others, 3) for _ in range(shots)]
            examples = [f"{_question(numbers)}{max(numbers)}$\n" for numbers in shown]
            made.append(
                Prompt(
                    id=len(made),
                    text="".join(examples) + _question(rng.sample((low, middle, high), 3)),
                    answer=str(high),
                    tags={"problem": f"{low},{middle},{high}", "domain": "arithmetic"},
                )
            )
    return made


def _question(numbers: list[int]) -> str:
    return f"$max({', '.join(map(str, numbers))}) = "
