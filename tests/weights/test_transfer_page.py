"""The figures of docs/weight_transfer.md follow from its formula."""

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "weight_transfer.md").read_text()
GIGABYTES = (16, 140, 1000)
USABLE = 0.8


def seconds(size: float, bucket: float, rates: list[float]) -> float:
    """T without T₀: gigabytes and gigabytes a second."""
    slowest = min(rates)
    return size / slowest + bucket * (sum(1 / rate for rate in rates) - 1 / slowest)


def test_the_table_of_links():
    rows = re.findall(r"^\| (?:PCIe|NVLink|Infini)[^|]*\| (\d+) \|(.*)\|$", PAGE, re.MULTILINE)
    assert len(rows) == 4
    for rate, cells in rows:
        found = [float(cell.strip(" s")) for cell in cells.split("|")]
        for size, (whole, shard) in zip(
            GIGABYTES, zip(found[::2], found[1::2], strict=True), strict=True
        ):
            link = [USABLE * float(rate)]
            assert whole == pytest.approx(seconds(size, 0, link), abs=0.0051)
            assert shard == pytest.approx(seconds(size / 8, 0, link), abs=0.0051)


def test_what_ours_would_take():
    text = " ".join(PAGE.split())
    found = re.search(
        r"([\d.]+) s for 8 B in bf16, ([\d.]+) s for 70 B, and ([\d.]+) s for 1 T", text
    )
    bucket, stages = 64 * 2**20 / 1e9, [9.5, USABLE * 50, 9.5]
    for size, cell in zip(GIGABYTES, found.groups(), strict=True):
        assert float(cell) == pytest.approx(seconds(size, bucket, stages), rel=0.01)


def test_the_fill_is_a_buckets_time_at_the_other_stages():
    by_hand = [0.0] * 3  # When each stage is done with the bucket before.
    rates, bucket, buckets = [10.0, 4.0, 8.0], 0.5, 20
    for _ in range(buckets):
        done = 0.0
        for stage, rate in enumerate(rates):
            done = max(done, by_hand[stage]) + bucket / rate
            by_hand[stage] = done
    assert seconds(bucket * buckets, bucket, rates) == pytest.approx(by_hand[-1])
