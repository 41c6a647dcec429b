"""Random and hostile answers against 200 references of mixed kinds.

    python benches/fuzz_math.py --responses 20000 --seed 0

Three questions, each with its count in one line of JSON:

* Does any form of response lack a verdict, or raise? (``no_verdict``; and those that ran
  into the limit of time or memory: ``limits``.)
* Is any answer right for several references? (``universal``: answers and what accepts them.)
* Is a reference with one digit changed accepted? (``one_digit``: the pairs, for a reader to judge.)

Exit status 1 if a response lacks a verdict for another reason than a limit, or an answer is
universal.
"""

import argparse
import json
import random
import sys
import time
from collections import defaultdict

from kimi_core.config import MathConfig
from kimi_core.reward.base import InfrastructureError, LimitReached
from kimi_core.reward.math.reward import MathReward
from kimi_core.types import Prompt

KINDS = [
    "{a}", "-{a}", r"\frac{{{a}}}{{{p}}}", "{a}.{p}", r"{a} \cdot 10^{{-{p}}}", r"\sqrt{{{p}}}",
    r"{a}\sqrt{{{p}}}", r"\frac{{{a}\pi}}{{{p}}}", "x+{a}", "x^2-{a}x+{p}",
    r"\frac{{x+{a}}}{{y-{p}}}",
    "({a}, -{p})", "[-{p}, {a})", r"\{{{a}, {p}, -1\}}", "x = {a}", "x={a}, y=-{p}", "x > {a}",
    "y = {a}x+{p}", r"\begin{{pmatrix}}{a}&2\\3&{p}\end{{pmatrix}}", "{a}+{p}i", r"{a}\text{{ cm}}",
    r"\${a}.{p}", r"{a}^\circ", "f({p})={a}", r"(-\infty, -{p})\cup[{a}, \infty)",
    r"{a}\text{{ hours }}{p}\text{{ minutes}}", r"\frac{{1}}{{{p}^{{{a}}}}}", r"\log_{{{p}}} {a}",
    r"\binom{{n+{a}}}{{{p}}}", "e^{{{a}x}}-{p}", r"{a} \text{{ if }} n \text{{ is even}}", r"{a}\%",
    r"\sin({a}x)+{p}",
]  # fmt: skip
"""Shapes of references; `a` is another number for each reference, `p` a prime."""

WORDS = ["B", "(C)", "Paris", "even", "no solution", "June 20", "ABCD", r"\text{isosceles}"]
PIECES = [
    *"0123456789+-*/^=<>!,;:.()[]{}$%&_|~'xyniIeE ", r"\frac", r"\sqrt", r"\text{", "}", r"\pi",
    r"\pm", r"\infty", r"\le", r"\cup", r"\int", r"\sum", r"\lim", r"\begin{pmatrix}",
    r"\mathbb{R}", r"\end{pmatrix}", r"\\", r"\boxed{", "True", "False", "None", "nan", "zoo", "oo",
    "and", "or", "sqrt(", "exp(", "lambda", "__class__", "eval(", "10**", "!!", r"\overline{",
    r"\binom", r"\{",
    r"\}", "°", "²", "×", "№", "\u202e", "\n", "\x00", "𝟝", "½", r"\ldots", "...", "?",
]  # fmt: skip
UNIVERSAL = [
    "", "0=0", "1=1", "x=x", "True", "i<0", r"\emptyset", r"\mathbb{R}", r"(-\infty,\infty)",
    "nan", "x", "n", "i", r"\infty", r"\text{any}", "*", "x or y", r"\pm x", "1/0", "0/0", "?",
    "...", "y=y", "all", "none", "f(x)=f(x)", r"x \in \mathbb{R}", "oo", "zoo", "{}",
    "()", "[]", "a=b", "_", "c",
]  # fmt: skip
FORMS = [r"\boxed{%s}", "Answer: %s", "The answer is $%s$.", "%s", "<answer>%s</answer>", r"\[%s\]"]


def references(count: int, rng: random.Random) -> list[str]:
    """As many references of unlike values, from every kind in turn."""
    numbers = rng.sample(range(11, 999), count)
    primes = [2, 3, 5, 7]
    made = [
        KINDS[number % len(KINDS)].format(a=a, p=primes[number % len(primes)])
        for number, a in enumerate(numbers[: count - len(WORDS)])
    ]
    return made + WORDS


def one_digit_off(reference: str, rng: random.Random) -> str | None:
    """The reference with another digit at one place."""
    places = [at for at, one in enumerate(reference) if one.isdigit()]
    if not places:
        return None
    at = rng.choice(places)
    other = rng.choice([digit for digit in "123456789" if digit != reference[at]])
    return reference[:at] + other + reference[at + 1 :]


def fuzz(reward: MathReward, count: int, seed: int) -> dict[str, object]:
    """What the module's docstring lists."""
    rng = random.Random(seed)
    golds = references(200, rng)
    limits: list[tuple[str, str]] = []
    no_verdict: list[tuple[str, str, str]] = []
    accepted_by: dict[str, list[str]] = defaultdict(list)

    def accepts(gold: str, response: str) -> bool:
        try:
            return reward(Prompt(0, "", gold), response) == 1.0
        except LimitReached:
            limits.append((gold, response))
            return False
        except InfrastructureError as error:
            no_verdict.append((gold, response, str(error)))
            return False

    for number in range(count):
        gold = golds[number % len(golds)]
        answer = "".join(rng.choices(PIECES, k=rng.randrange(1, 24)))
        if rng.random() < 0.3:  # A part of the right answer among noise.
            answer = answer[: len(answer) // 2] + gold + answer[len(answer) // 2 :]
        if accepts(gold, rng.choice(FORMS) % answer):
            accepted_by[f"random: {answer}"].append(gold)
    for answer in UNIVERSAL:
        for gold in golds:
            if accepts(gold, FORMS[0] % answer):
                accepted_by[answer].append(gold)
    near = [(gold, one_digit_off(gold, rng)) for gold in golds]
    one_digit = [(gold, off) for gold, off in near if off and accepts(gold, FORMS[0] % off)]
    universal = {answer: by for answer, by in accepted_by.items() if len(by) > 1}
    noise = {answer: by for answer, by in accepted_by.items() if answer.startswith("random: ")}
    return {
        "responses": count + len(UNIVERSAL) * len(golds) + len(near),
        "references": len(golds),
        "no_verdict": no_verdict,
        "limits": limits,
        "universal": universal,
        "one_digit": one_digit,
        "accepted_noise": noise,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--responses", type=int, default=20_000, help="of random pieces")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    reward = MathReward(MathConfig())
    start = time.monotonic()
    try:
        found = fuzz(reward, options.responses, options.seed)
    finally:
        reward.close()
    print(json.dumps(found | {"wall_s": round(time.monotonic() - start)}, ensure_ascii=False))
    return 1 if found["no_verdict"] or found["universal"] else 0


if __name__ == "__main__":
    sys.exit(main())
