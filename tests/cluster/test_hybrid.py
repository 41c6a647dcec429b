"""Trainer and engine take turns on one device: the order, the memory, and the same tokens."""

import os
from pathlib import Path

import pytest
from fleet_workers import CONTEXT, SAMPLED, model
from rewarded_runs import children, go_on, iterations, sampled, write_files

from kimi_core.cluster.turns import Turns
from kimi_core.config import ClusterConfig, RolloutConfig
from kimi_core.rollout.load import load_engine
from kimi_core.rollout.torch.engine import TorchEngine

NURSERY = "kimi_core.rollout.torch.worker"


class Noted:
    """An engine and a trainer that only say what was asked of them."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def __getattr__(self, name):
        return lambda: self.said.append(name)


def test_each_has_its_turn_and_never_both():
    both = Noted()
    turns = Turns(both, both, shared=True)
    for _ in range(2):
        with turns.engine():
            both.said.append("samples")
        with turns.trainer():
            both.said.append("trains")
    assert both.said == 2 * ["wake", "samples", "sleep", "trains", "rest"]
    assert set(turns.seconds()) == {"wake", "sleep", "rest"} and turns.seconds() == {}
    for first, second in [(turns.engine, turns.trainer), (turns.trainer, turns.engine)]:
        with first(), pytest.raises(RuntimeError, match="both share the device"), second():
            pass
    apart = Turns(both, both, shared=False)
    with apart.engine(), apart.trainer():
        pass


def resident(pids: list[int]) -> int:
    """Bytes of memory of processes, as far as they are still there."""
    pages = [Path(f"/proc/{pid}/statm") for pid in pids]
    return sum(int(one.read_text().split()[1]) for one in pages if one.exists()) * 4096


@pytest.mark.nightly
@pytest.mark.slow
def test_memory_is_gone_while_workers_sleep_and_tokens_are_the_same(request):
    from rollout.torch.test_process import gathered, requests_of

    read = model()
    twin = TorchEngine(model(), batch_rows=8)
    expected = gathered(twin.generate(requests_of(6), SAMPLED))
    engine, publisher = load_engine(
        read, RolloutConfig(workers=2), CONTEXT, cluster=ClusterConfig(hybrid=True)
    )
    request.addfinalizer(publisher.close)
    request.addfinalizer(engine.close)
    turns = Turns(engine, Noted(), shared=True)
    pids: list[int] = []
    for version in range(2):
        publisher.publish(read.named_parameters(), version)
        engine.serve(version)
        assert all(worker.pid == 0 for worker in engine._workers)
        with pytest.raises(RuntimeError, match="asleep: wake the engine"):
            engine.generate(requests_of(6), SAMPLED)
        with turns.engine():
            now = [worker.pid for worker in engine._workers]
            assert set(now).isdisjoint(pids) and resident(now) > 50e6
            assert gathered(engine.generate(requests_of(6), SAMPLED)) == expected
            assert engine.policy_version == version and engine.restarts == 0
        steps, pids = engine.decode_steps, [*pids, *now]
        assert resident(pids) == 0 and steps > 0
        engine.sleep()  # A second time changes nothing.
        assert engine.decode_steps == steps
    assert turns.seconds()["wake"] > 0


@pytest.mark.slow
@pytest.mark.nightly
def test_a_run_in_turns_is_the_run_without(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    go_on("name=apart", "iterations=3", "rollout.workers=2")
    go_on("name=turns", "iterations=3", "rollout.workers=2", "cluster.hybrid=true")
    assert sampled("apart") == sampled("turns") != []
    for one in iterations("turns"):
        assert {"wake", "sleep", "publish", "rest", "serve", "save"} == one.turn_s.keys()
        assert one.worker_restarts == 0
    nurseries = children(os.getpid(), NURSERY)
    assert [child for one in nurseries for child in children(one, NURSERY)] == []
