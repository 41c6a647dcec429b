"""A run on two hosts, whose link is cut: the tokens of one host."""

import os
import shutil

import pytest
from cluster import two_hosts
from rewarded_runs import REWARD, SETTINGS, go_on, iterations, sampled, write_files

NEEDS = "needs root and iproute2, for network namespaces"


@pytest.mark.nightly
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip"), reason=NEEDS)
def test_a_cut_is_harmless_or_seen_and_the_host_joins_again(tmp_path, monkeypatch):
    write_files(tmp_path)
    (tmp_path / "reward.py").write_text(REWARD + two_hosts.SLOW)
    took = two_hosts.story(tmp_path, [*SETTINGS, *two_hosts.SETTINGS])
    assert took["losses after 3 s"] == 0
    assert took["seen after"] < 15
    assert took["run"] == took["worker"] == 0

    monkeypatch.chdir(tmp_path)
    go_on(*two_hosts.SETTINGS, "reward.function=reward.py:some", "name=one")
    assert sampled("one") == sampled("two") != []
    assert sum(one.worker_restarts for one in iterations("two")) == 1
