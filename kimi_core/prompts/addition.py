"""Few-shot addition: a task that a small pretrained model half knows.

With one worked example in front, the text to continue is two lines, and the answer ends with the
line::

    4+9=13
    17+25=
"""

import random

from kimi_core.types import Prompt


def prompts(shots: int, largest: int, seed: int) -> list[Prompt]:
    """One prompt for each unordered pair of operands from 1 to ``largest``.

    The order of the two operands and the worked examples are drawn from ``seed``. An example is
    never the problem itself or its swap. Those examples may be problems of other prompts: prompt
    tokens are not trained on, so a held-out answer shown there is not learned.

    Raises:
        ValueError: fewer than 0 shots, or operands too small to draw an example from.
    """
    if shots < 0:
        raise ValueError(f"prompts.shots = {shots}; allowed is 0 or more")
    if largest < 2:
        raise ValueError(f"prompts.largest = {largest}; allowed is 2 or more")
    rng = random.Random(seed)
    made: list[Prompt] = []
    for low in range(1, largest + 1):
        for high in range(low, largest + 1):
            a, b = rng.sample((low, high), 2)
            examples = [_example(rng, largest, {low, high}) for _ in range(shots)]
            made.append(
                Prompt(
                    id=len(made),
                    text="".join(examples) + f"{a}+{b}=",
                    answer=str(a + b),
                    tags={"problem": f"{low}+{high}", "domain": "arithmetic"},
                )
            )
    return made


def _example(rng: random.Random, largest: int, problem: set[int]) -> str:
    """A solved line whose operands are not those of ``problem``."""
    while True:
        a, b = rng.randint(1, largest), rng.randint(1, largest)
        if {a, b} != problem:
            return f"{a}+{b}={a + b}\n"
