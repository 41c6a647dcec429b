"""The reward: a number for each response. Responses that get more of it become more likely."""

from kimi_core import Prompt


def reward(prompt: Prompt, response: str) -> float:
    """1 if what follows the last # is the answer, otherwise 0."""
    return float(response.rpartition("#")[2] == prompt.answer)
