"""Vocabulary and context parallelism: two gloo ranks give what one rank gives."""

from pathlib import Path

from warm import Warm


def test_two_ranks_are_one(tmp_path):
    script = Path(__file__).with_name("parallel_ranks.py")
    ranks = [Warm([script, rank, tmp_path]) for rank in range(2)]
    try:
        errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
