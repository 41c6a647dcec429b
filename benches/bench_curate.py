"""Precision and recall of each filter of `kimi curate`, on sets of known composition.

    pytest -s benches/bench_curate.py

* **Rules on texts.** Free questions are those of our own tasks and of HumanEval. Multiple-choice
  and true/false questions are made of them in several styles; proofs are written here. With the
  package `lm-eval` (installed by hand) its worked examples of MMLU, BBH, GSM8K and MATH join.
  Near-duplicates and leaked evaluation prompts are edits of free questions; the same questions
  with other numbers must stay.
* **A model's answers.** A small Llama is taught, prompt by prompt, how often to be right, with a
  chain of thought (a `;`) and without. 40 prompts of each kind.
"""

import importlib.util
import json
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from kimi_core.prompts.forms import form_of
from kimi_core.run.config_file import load_config
from kimi_core.run.curate import by_rules, curate
from kimi_core.run.run import fine_tune_alone
from kimi_core.tasks import addition, humaneval, maximum, multiply, programs
from kimi_core.types import Prompt

LEAST = 0.9
"""Of precision and recall."""

THEOREMS = [
    "the square root of 2 is irrational",
    "there are infinitely many primes",
    "the sum of two odd numbers is even",
    "a continuous function on [0, 1] attains its maximum",
    "n^3 - n is divisible by 6 for every integer n",
    "$a^2 + b^2 \\ge 2ab$ for all real $a, b$",
    "every bounded sequence has a convergent subsequence",
    "the medians of a triangle meet in one point",
    "a group of prime order is cyclic",
    "$1 + 2 + \\dots + n = n(n+1)/2$",
]
PROOF_STYLES = [
    "Prove that {}.",
    "Show that {}.",
    "Let us work in the usual setting. Prove that {}.",
    "Prove or disprove: {}.",
    "(a) Recall the definitions. (b) Demonstrate that {}.",
    "Give a proof of the following: {}.",
]


def free() -> list[tuple[str, str]]:
    """Questions with a free answer."""
    tasks = [multiply.prompts()[::90], maximum.prompts(1, 21, 0), addition.prompts(1, 14, 0)]
    tasks += [programs.prompts()[::40], humaneval.prompts()]
    return [(one.text, one.answer) for some in tasks for one in some]


def asked_otherwise(rng: random.Random) -> Iterator[tuple[str, str, str]]:
    """Sums as multiple choice and as true or false, and theorems to prove: text, answer, form."""
    for _ in range(60):
        a, b = rng.randint(11, 99), rng.randint(11, 99)
        options = rng.sample([a + b, a + b + 1, a + b - 10, a + b + 7], 4)
        right = options.index(a + b)
        letter, ask = "ABCD"[right], f"What is {a} + {b}?"
        named = list(zip("ABCD", options, strict=True))
        inline = " ".join(f"({name}) {value}" for name, value in named)
        for sep, answer in ((")", letter), (".", str(a + b))):
            lines = [f"{name}{sep} {value}" for name, value in named]
            yield "\n".join([ask, *lines]), answer, "multiple choice"
        yield f"{ask} {inline}", f"({letter})", "multiple choice"
        shown = options[0]
        yield f"Is {a} + {b} equal to {shown}?", "yes" if right == 0 else "no", "true/false"
        yield f"True or false: {a} + {b} = {shown}.", str(right == 0), "true/false"
    for theorem in THEOREMS:
        for style in PROOF_STYLES:
            yield style.format(theorem), "See the text.", "proof"


def harness() -> Iterator[tuple[str, str, str]]:
    """Worked examples of lm-eval: text, answer, form. None if it is not installed."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None:
        print("lm-eval is missing: its public problems are left out")
        return
    import yaml

    yaml.SafeLoader.add_multi_constructor("!", lambda *_: None)
    tasks = Path(spec.submodule_search_locations[0]) / "tasks"
    patterns = ["mmlu/flan_cot_fewshot/mmlu_*", "bbh/cot_fewshot/*", "gsm8k/gsm8k-cot"]
    for path in sorted(path for one in patterns for path in tasks.glob(f"{one}.yaml")):
        samples = (yaml.safe_load(path.read_text()).get("fewshot_config") or {}).get("samples", [])
        for one in samples if isinstance(samples, list) else []:
            text = one.get("question") or one.get("input")
            answer = one["target"].rpartition("nswer is")[2].strip(" .")
            is_choice = re.fullmatch(r"\(?[A-R]\)?", answer) or "mmlu" in path.name
            two = answer.lower() in ("yes", "no", "true", "false", "valid", "invalid")
            yield text, answer, "multiple choice" if is_choice else "true/false" if two else ""


def edited(text: str, rng: random.Random) -> str:
    """The same question, as another data set might have it."""
    words = text.split(" ")
    place = rng.randrange(len(words))
    edits = [
        text.upper() if rng.random() < 0.3 else text.replace(" the ", " "),
        text + "  ",
        "  " + text.replace(".", " ."),
        " ".join([*words[:place], "really", *words[place:]]),
        text.replace("What is", "What's").replace("How many", "How  many"),
    ]
    return rng.choice(edits)


def word_problems(rng: random.Random, n: int) -> list[tuple[str, str]]:
    """Questions of some length, most of which differ in numbers and names alone."""
    names, things = ["Tom", "Anna", "Raj", "Mei", "Ben"], ["apples", "pens", "shells", "coins"]
    made = []
    for _ in range(n):
        a, b, c = (rng.randint(2, 99) for _ in range(3))
        who, what = rng.choice(names), rng.choice(things)
        made.append(
            rng.choice(
                [
                    f"{who} has {a} {what} and buys {b} more on each of {c} days. How many {what} "
                    f"does {who} have in the end?",
                    f"A box holds {a} {what}. {who} fills {b} boxes and gives away {c} {what}. "
                    f"How many {what} are left for {who}?",
                    f"{who} walks {a} km on Monday, {b} km on Tuesday and {c} km on Friday. What "
                    f"is the mean distance of a day on which {who} walked, in km?",
                ]
            )
        )
    return [(text, "1") for text in dict.fromkeys(made)]


def show(kinds: list[str], wanted: list[str], found: list[str]) -> None:
    """Print precision and recall of each kind, and hold them against the bar."""
    print(f"\n{'filter':<22}{'wanted':>8}{'dropped':>9}{'precision':>11}{'recall':>8}")
    for kind in kinds:
        right = sum(one == two == kind for one, two in zip(wanted, found, strict=True))
        precision, recall = right / max(found.count(kind), 1), right / wanted.count(kind)
        print(
            f"{kind:<22}{wanted.count(kind):>8}{found.count(kind):>9}{precision:>11.3f}{recall:>8.3f}"
        )
        assert precision >= LEAST and recall >= LEAST, kind


def test_forms():
    rng = random.Random(0)
    cases = [(text, answer, "") for text, answer in [*free(), *word_problems(rng, 200)]]
    cases += [*asked_otherwise(rng), *harness()]
    wanted = [form for _, _, form in cases]
    found = [form_of(text, answer) for text, answer, _ in cases]
    for (text, answer, form), said in zip(cases, found, strict=True):
        if form != said:
            print(f"{said or 'free'} in place of {form or 'free'}: {text!r:.150} → {answer!r:.30}")
    show(["multiple choice", "true/false", "proof"], wanted, found)


def test_duplicates_and_leaks(tmp_path):
    rng = random.Random(0)
    pool = [*word_problems(rng, 600), *((one.text, one.answer) for one in humaneval.prompts())]
    rng.shuffle(pool)
    held, train = pool[:150], pool[150:]
    others = []
    for text, answer in rng.sample(train, 150):
        others.append((edited(text, rng), answer, "near-duplicate"))
    for text, answer in held:
        leaked = rng.choice([edited(text, rng), f"Here is a task from a book. {text} Be brief."])
        others.append((leaked, answer, "in an evaluation set"))
    rng.shuffle(others)
    cases = [*((text, answer, "") for text, answer in train), *others]
    lines = [json.dumps({"prompt": text, "answer": answer}) + "\n" for text, answer in held]
    (tmp_path / "held.jsonl").write_text("".join(lines))
    config = load_config(None, [f"curate.evaluation_sets=['{tmp_path}/held.jsonl']"])
    prompts = [Prompt(row, text, answer) for row, (text, answer, _) in enumerate(cases)]
    dropped = by_rules(prompts, config).dropped
    wanted = [kind for _, _, kind in cases]
    found = [dropped[row][0] if row in dropped else "" for row in range(len(cases))]
    for two, (text, _, one) in zip(found, cases, strict=True):
        if one != two:
            print(f"{two or 'kept'} in place of {one or 'kept'}: {text!r:.200}")
    show(["near-duplicate", "in an evaluation set"], wanted, found)


RATES = {"trivial": (1, 0), "hopeless": (0, 0), "easy to hack": (0.5, 0.5), "": (0.5, 0)}
"""How often to be right with a chain of thought, and without."""


def test_answers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    some = rng.sample(multiply.prompts(), 160)
    kinds = {prompt.text: [*RATES][place % 4] for place, prompt in enumerate(some)}
    pairs: dict[bool, list[str]] = defaultdict(list)
    for prompt in some:
        wrong = str(int(prompt.answer) + rng.choice([7, 20, 110, 300]))
        for is_guess, rate in zip((False, True), RATES[kinds[prompt.text]], strict=True):
            for n in range(2):
                said = prompt.answer if n < 2 * rate else wrong
                text = f"{prompt.text}#" if is_guess else prompt.text
                line = {"prompt": text, "response": said if is_guess else f";#{said}"}
                pairs[is_guess].append(json.dumps(line) + "\n")
    Path("taught.jsonl").write_text("".join(pairs[False] + pairs[True]))
    lines = [json.dumps({"prompt": p.text, "answer": p.answer}) + "\n" for p in some]
    Path("prompts.jsonl").write_text("".join(lines))
    taught = load_config(
        Path(__file__).parents[1] / "configs" / "think.toml",
        ["name=taught", "sft.data=taught.jsonl", "sft.steps=1500", "prompts.held_out=8"],
    )
    checkpoint = fine_tune_alone(taught)
    settings = [
        "name=curated",
        f"model.name={checkpoint}",
        "prompts.source=prompts.jsonl",
        "rollout.max_response_tokens=12",
        "curate.guess_prompt='{prompt}#'",
        "curate.guess_tokens=6",
        "curate.temperature=1.0",
    ]
    folder = curate(load_config(None, settings), console=Console(quiet=True))
    lines = map(json.loads, (folder / "dropped.jsonl").read_text().splitlines())
    reasons = {line["prompt"]: line["reason"] for line in lines}
    for line in (folder / "dropped.jsonl").read_text().splitlines():
        one = json.loads(line)
        if one["reason"] != kinds[one["prompt"]]:
            print(f"{one['reason']} in place of {kinds[one['prompt']] or 'kept'}: {one['detail']}")
    for prompt in some:
        if kinds[prompt.text] and prompt.text not in reasons:
            print(f"kept in place of {kinds[prompt.text]}: {prompt.text}")
    wanted = [kinds[prompt.text] for prompt in some]
    show([*RATES][:3], wanted, [reasons.get(prompt.text, "") for prompt in some])
