"""Few-shot addition: a task that a small pretrained model half knows.

With one worked example in front, the text to continue is two lines::

    $4 + 9 = 13$
    $17 + 25 =

and the answer ends with the dollar sign (``rollout.stop = ["$"]``). The notation was chosen by
measuring SmolLM2-135M-Instruct, one example, operands 1 to 40 (greedy / sampled accuracy, n = 128
to 192): ``$a + b = c$`` 0.41 / 0.29, ``a + b = c`` 0.27 / 0.17; with operands 1 to 50 and n = 64,
``a+b=c`` 0.11 / 0.04, ``Q: a+b A: c`` 0.02 / 0.01.
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
        raise ValueError(f"prompts.task.shots = {shots}; allowed is 0 or more")
    if largest < 2:
        raise ValueError(f"prompts.task.largest = {largest}; allowed is 2 or more")
    rng = random.Random(seed)
    made: list[Prompt] = []
    for low in range(1, largest + 1):
        for high in range(low, largest + 1):
            a, b = rng.sample((low, high), 2)
            examples = [_example(rng, largest, {low, high}) for _ in range(shots)]
            made.append(
                Prompt(
                    id=len(made),
                    text="".join(examples) + f"${a} + {b} = ",
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
            return f"${a} + {b} = {a + b}$\n"
