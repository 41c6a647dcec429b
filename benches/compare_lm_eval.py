"""Are our verdicts those of lm-evaluation-harness, on the same model, items and requests?

    pip install '.[smollm2,math]' lm_eval==0.4.13
    python benches/compare_lm_eval.py                  # 5 minutes on a CPU
    python benches/compare_lm_eval.py --model FOLDER --limit 10

Both sides answer greedily, through the model's chat template and in float32, at most 160 tokens:
`kimi evaluate --benchmark gsm8k` and `mmlu`, and `lm_eval` with our request as its task's text. The
harness then extracts and compares answers in its own way, with the filter `flexible-extract` of its
tasks `gsm8k_cot` and `gpqa_main_cot_zeroshot`, and `custom-extract` of `mmlu_pro`.

* 50 word problems in the format of GSM8K: the 8 of the harness's `gsm8k_cot`, and 42 made here.
* A question of each of 50 of MMLU's subjects: worked examples of the harness's
  `mmlu_flan_cot_fewshot`, as `mmlu` has them.

A third task is what the harness does for MMLU by default: the log-likelihoods of the letters A to
D, where nothing is generated. We have no such evaluation; it shows how far the two ways differ.
"""

import argparse
import hashlib
import json
import os
import random
import re
from collections.abc import Iterator
from contextlib import closing
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from kimi_core.cli.settings import CONFIGS
from kimi_core.config import Config
from kimi_core.evaluation.benchmarks import chosen, load_benchmark, reward_of
from kimi_core.evaluation.record import Record, key_of
from kimi_core.models.chat import render
from kimi_core.models.load import load_model
from kimi_core.prompts.messages import chat_prompts
from kimi_core.reward.load import close_reward
from kimi_core.reward.math.extract import extract
from kimi_core.run.benchmark import run_benchmark
from kimi_core.run.config_file import load_config
from kimi_core.types import Prompt

VERSION = "0.4.13"
TOKENS = 160
ROWS = 25
ITEMS = 50
MADE = 42
LONGEST = 600
"""Characters of a question of MMLU, options included."""

LETTERS = "ABCD"
Line = dict[str, Any]

KINDS = [
    ("{who} has {a} {what} and buys {b} more. How many {what} does {who} have now?", "{a}+{b}"),
    ("{who} had {c} {what} and gave away {a}. How many {what} are left?", "{c}-{a}"),
    ("A box holds {a} {what}. How many {what} do {b} boxes hold?", "{a}*{b}"),
    ("{who} buys {a} {what} for ${b} each. How much does {who} pay in dollars?", "{a}*{b}"),
    (
        "{who} has {c} {what}, sells {a} on Monday and {b} on Tuesday. How many {what} are left?",
        "{c}-{a}-{b}",
    ),
    (
        "{who} fills {a} bags with {b} {what} each and has {c} {what} that fit in no bag. How many "
        "{what} does {who} have?",
        "{a}*{b}+{c}",
    ),
]
NAMES = ["Tom", "Anna", "Raj", "Mei", "Ben", "Ines"]
THINGS = ["apples", "pens", "shells", "coins", "books", "stamps"]


class Judged(NamedTuple):
    """An item as one side answered it."""

    request: str
    """What the model read."""
    text: str
    answer: str
    """What was taken from the text for its answer."""
    right: bool


def harness() -> Path:
    """The folder of the harness's tasks. Raises SystemExit if another version is installed."""
    try:
        found = version("lm_eval")
    except PackageNotFoundError:
        found = "none"
    spec = find_spec("lm_eval")
    if found != VERSION or spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"lm_eval {found} is installed: pip install lm_eval=={VERSION}")
    return Path(spec.submodule_search_locations[0]) / "tasks"


def examples(path: Path) -> list[dict[str, str]]:
    """The worked examples of one of the harness's tasks."""
    import yaml

    yaml.SafeLoader.add_multi_constructor("!", lambda *_: None)
    return yaml.safe_load(path.read_text())["fewshot_config"]["samples"]


def word_problems(tasks: Path) -> Iterator[Line]:
    """In the format of GSM8K."""
    for one in examples(tasks / "gsm8k" / "gsm8k-cot.yaml"):
        solution, _, answer = one["target"].rpartition(" The answer is ")
        yield {"question": one["question"], "answer": f"{solution}\n#### {answer.rstrip('.')}"}
    rng = random.Random(0)
    for number in range(MADE):
        text, formula = KINDS[number % len(KINDS)]
        a, b = rng.randint(2, 12), rng.randint(2, 9)
        words = {"who": rng.choice(NAMES), "what": rng.choice(THINGS)}
        numbers = {"a": a, "b": b, "c": a + b + rng.randint(1, 30)}
        sum_ = formula.format(**numbers)
        answer = eval(sum_)  # Of our own formulas.
        yield {
            "question": text.format(**words, **numbers),
            "answer": f"{sum_} = {answer}\n#### {answer}",
        }


def choices(tasks: Path) -> Iterator[Line]:
    """In the format of MMLU: of each subject the first worked example that is not too long."""
    for path in sorted((tasks / "mmlu" / "flan_cot_fewshot").glob("mmlu_*.yaml")):
        for one in examples(path):
            question, *options = re.split(r"\s*\([A-D]\) ", one["question"])
            letter = re.search(r"answer is \(?([A-D])", one["target"])
            if len(options) == 4 and letter and len(one["question"]) <= LONGEST:
                yield {
                    "question": question,
                    "choices": [option.strip() for option in options],
                    "answer": LETTERS.index(letter[1]),
                    "subject": path.stem.removeprefix("mmlu_"),
                }
                break


def write(path: Path, lines: list[Line]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def ours(config: Config, benchmark: str, file: Path) -> list[Judged]:
    """`kimi evaluate --benchmark`, and what it took for the answers."""
    run_benchmark(config, benchmark, file)
    prompts = chat_prompts(load_benchmark(benchmark, [file]), config.prompts)
    _, tokenizer = load_model(config.model)
    found = []
    folder = Path(config.runs) / config.name / benchmark
    with closing(Record(folder / "answers.jsonl")) as record:
        for prompt in prompts:
            (answer,) = record.answers(benchmark, key_of(prompt))
            request = render(tokenizer, prompt.messages)
            taken = _taken(config, benchmark, answer.text)
            found.append(Judged(request, answer.text, taken, answer.is_right))
    return found


def _taken(config: Config, benchmark: str, text: str) -> str:
    if benchmark == "mmlu":
        return chosen(text) or "none"
    return extract(text, config.reward.math.extraction) or "none"


def task(name: str, file: Path, **settings: Any) -> Line:
    """A task of the harness, as a configuration of it."""
    common: Line = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file.resolve())}},
        "test_split": "test",
        "num_fewshot": 0,
    }
    if settings.get("output_type") == "generate_until":
        common["doc_to_text"] = "{{prompt}}"
        common["generation_kwargs"] = {"until": ["<|im_end|>"], "do_sample": False}
        common["generation_kwargs"]["max_gen_toks"] = TOKENS
    return common | settings


def tasks_of(folder: Path) -> list[Line]:
    """Ours, with the filters and metrics of the harness's own tasks."""
    exact = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    last = {"function": "regex", "group_select": -1}
    last["regex_pattern"] = r"(-?[$0-9.,]{2,})|(-?[0-9]+)"
    letter = {"function": "multi_choice_regex", "group_select": -1, "ignore_case": True}
    letter |= {"ignore_punctuation": True, "regex_pattern": r"(\([A-Z]\))"}
    answer_is = {"function": "regex", "regex_pattern": r"answer is \(?([ABCDEFGHIJ])\)?"}
    generate: Line = {"output_type": "generate_until"}
    return [
        task(
            "gsm8k_same",
            folder / "gsm8k-asked.jsonl",
            **generate,
            doc_to_target="{{answer}}",
            filter_list=_filters({"flexible-extract": last}),
            metric_list=[
                exact
                | {
                    "ignore_case": True,
                    "ignore_punctuation": False,
                    "regexes_to_ignore": [",", r"\$", "(?s).*#### ", r"\.$"],
                }
            ],
        ),
        task(
            "mmlu_same",
            folder / "mmlu-asked.jsonl",
            **generate,
            doc_to_target="({{letter}})",
            filter_list=_filters({"flexible-extract": letter, "custom-extract": answer_is}),
            metric_list=[exact | {"ignore_case": True, "ignore_punctuation": True}],
        ),
        task(
            "mmlu_loglikelihood",
            folder / "mmlu-asked.jsonl",
            output_type="multiple_choice",
            doc_to_text="{{question}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\n"
            "D. {{choices[3]}}\nAnswer:",
            doc_to_choice=list(LETTERS),
            doc_to_target="letter",
            metric_list=[exact | {"metric": "acc"}],
        ),
    ]


def _filters(extractions: dict[str, Line]) -> list[Line]:
    first = {"function": "take_first"}
    return [{"name": name, "filter": [one, first]} for name, one in extractions.items()]


def theirs(model: str, folder: Path) -> dict[str, list[Line]]:
    """What the harness logs of each item, by task, in the order of the items. It is kept."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    (folder / "tasks").mkdir(exist_ok=True)
    found = {}
    for one in tasks_of(folder):
        data = Path(one["dataset_kwargs"]["data_files"]["test"]).read_bytes()
        asked = {"model": model, "lm_eval": VERSION, "task": one}
        asked["sha256"] = hashlib.sha256(data).hexdigest()
        kept = folder / f"{one['task']}.json"
        before = json.loads(kept.read_text()) if kept.exists() else {}
        if before.get("asked") != asked:
            before = {"asked": asked, "samples": _evaluated(model, one, folder / "tasks")}
            kept.write_text(json.dumps(before, default=str))
        found[one["task"]] = sorted(before["samples"], key=lambda one: one["doc_id"])
    return found


def _evaluated(model: str, config: Line, folder: Path) -> list[Line]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    (folder / f"{config['task']}.yaml").write_text(json.dumps(config, indent=1))  # JSON is YAML.
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": model, "dtype": "float32"},
        tasks=[config["task"]],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        batch_size=ROWS,
        device="cpu",
        apply_chat_template=True,
        bootstrap_iters=0,
    )
    return found["samples"][config["task"]]


def judged(sample: Line) -> Judged:
    """An item of a task that generates."""
    arguments, responses = sample["arguments"], sample["resps"]
    request = arguments["gen_args_0"]["arg_0"] if isinstance(arguments, dict) else arguments[0][0]
    return Judged(
        request, responses[0][0], sample["filtered_resps"][0], sample["exact_match"] == 1.0
    )


def report(
    config: Config, benchmark: str, name: str, file: Path, pairs: list[tuple[Judged, Judged]]
) -> str:
    """A table row, and each item that the two sides judge or answer in another way."""
    prompts = load_benchmark(benchmark, [file])
    reward = reward_of(benchmark, config.reward)
    counts = [
        len(pairs),
        sum(one.request == other.request for one, other in pairs),
        sum(one.text.strip() == other.text.strip() for one, other in pairs),
        sum(one.right for one, _ in pairs),
        sum(other.right for _, other in pairs),
        sum(one.right == other.right for one, other in pairs),
    ]
    lines = ["| " + " | ".join([f"{benchmark}, {name}", *map(str, counts)]) + " |", ""]
    for number, (prompt, (one, other)) in enumerate(zip(prompts, pairs, strict=True)):
        same = one.text.strip() == other.text.strip()
        if one.right == other.right and same:
            continue
        by_us = _verdict(reward, prompt, other.text)
        lines.append(
            f"* {benchmark} {number}: the answer is {prompt.answer}; we take {one.answer!r} "
            f"({_word(one.right)}), the harness {other.answer!r} ({_word(other.right)}); "
            f"{'the same text' if same else f'another text, by us {_word(by_us)}'}: "
            f"...{one.text.strip()[-160:]!r}" + ("" if same else f" / ...{other.text[-160:]!r}")
        )
    close_reward(reward)
    return "\n".join(lines)


def _verdict(reward: Any, prompt: Prompt, text: str) -> bool:
    return reward(prompt, text) > 0.5


def _word(right: bool) -> str:
    return "right" if right else "wrong"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m", help="as model.name (smollm2-135m)")
    parser.add_argument("--out", type=Path, default=Path("runs/lm-eval"), help="folder of results")
    parser.add_argument("--limit", type=int, default=ITEMS, help=f"items of each kind ({ITEMS})")
    given = parser.parse_args()
    folder = given.out
    folder.mkdir(parents=True, exist_ok=True)
    tasks = harness()
    made = {"gsm8k": [*word_problems(tasks)], "mmlu": [*choices(tasks)]}
    changes = [f"model.name={given.model}", f"runs={folder}", f"rollout.batch_rows={ROWS}"]
    changes += [f"rollout.max_response_tokens={TOKENS}", "model.dtype=float32", "model.device=cpu"]
    config = load_config(CONFIGS / "benchmark.toml", changes)
    mine, files = {}, {}
    for name, lines in made.items():
        some = lines[: given.limit]
        files[name] = write(folder / f"{name}.jsonl", some)
        asked = load_benchmark(name, [files[name]])
        pairs = zip(some, asked, strict=True)
        more = [one | {"prompt": p.text, "letter": p.answer} for one, p in pairs]
        write(folder / f"{name}-asked.jsonl", more)
        mine[name] = ours(config, name, files[name])
    found = theirs(_folder_of(config), folder)
    print(f"lm_eval {VERSION}, {given.model}\n")
    print("| items | number | same request | same text | right, ours | right, harness | same |")
    print("|---" * 7 + "|")
    for benchmark, answered in mine.items():
        samples = found[f"{benchmark}_same"]
        for name in dict.fromkeys(one["filter"] for one in samples):
            filtered = [judged(one) for one in samples if one["filter"] == name]
            pairs = list(zip(answered, filtered, strict=True))
            print(report(config, benchmark, name, files[benchmark], pairs), end="\n\n")
    right = [one["acc"] == 1.0 for one in found["mmlu_loglikelihood"]]
    both = sum(a == b.right for a, b in zip(right, mine["mmlu"], strict=True))
    print(f"log-likelihoods of the letters: {sum(right)} right, {both} of {len(right)} as ours")


def _folder_of(config: Config) -> str:
    """The folder of the model, for a reader that does not know our names."""
    from kimi_core.models.smollm2 import SMOLLM2, get_smollm2

    return str(get_smollm2()) if config.model.name == SMOLLM2 else config.model.name


if __name__ == "__main__":
    main()
