"""The arena beside a model of it in a few lines of Python: who may write which slot, and when."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from transformers import LlamaConfig

from kimi_core.weights.arena import Lease, WeightArena
from kimi_core.weights.layout import Layout

SLOTS = 3
LAYOUT = Layout.from_config(
    LlamaConfig(
        vocab_size=64,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    ),
    dtype="float32",
)
NAMES = [part.name for entry in LAYOUT.entries for part in entry.parts]


class ArenaMachine(RuleBasedStateMachine):
    """Model: the version served, and the versions that leases hold. A slot is idle unless it has
    one of these, so publishing must work just while they are fewer than the slots."""

    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        shared = Path("/dev/shm")
        self.folder = tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None)
        self.path = Path(self.folder.name) / "arena"
        self.arena = WeightArena.create(self.path, LAYOUT, slots=SLOTS)
        self.reader = WeightArena.open(self.path)
        self.served: int | None = None
        self.held: list[Lease] = []

    def teardown(self) -> None:
        for lease in self.held:
            lease.release()
        self.reader.close()
        self.arena.close()
        self.folder.cleanup()

    def has_idle_slot(self) -> bool:
        in_use = {lease.version for lease in self.held} | {self.served} - {None}
        return len(in_use) < SLOTS

    @rule(ahead=st.integers(1, 3), threads=st.integers(1, 2))
    def publish(self, ahead: int, threads: int) -> None:
        version = ahead + (-1 if self.served is None else self.served)
        wholes = {name: LAYOUT.by_hf_name[name][1].whole for name in NAMES}
        weights = {n: np.full(whole, version, np.float32) for n, whole in wholes.items()}
        if not self.has_idle_slot():
            with pytest.raises(TimeoutError, match="none of 3 slots became free"):
                self.arena.publish(weights, version=version, deadline_s=0)
            return
        self.arena.publish(weights, version=version, deadline_s=0, threads=threads)
        self.served = version

    @rule(behind=st.integers(0, 5))
    def publish_what_is_not_newer(self, behind: int) -> None:
        version = -1 - behind if self.served is None else self.served - behind
        with (
            pytest.raises(ValueError, match=r"only grow|allowed are 0 and above"),
            self.arena.writing(version),
        ):
            pass

    @rule()
    def write_half_and_leave(self) -> None:
        if self.has_idle_slot():
            version = 0 if self.served is None else self.served + 1
            with self.arena.writing(version, deadline_s=0) as slot:
                slot.payload[::3] = 255

    @rule()
    def open_to_publish_anew(self) -> None:
        self.arena.close()
        self.arena = WeightArena.open(self.path, readonly=False)

    @rule(target=leases, through_reader=st.booleans())
    def acquire(self, through_reader: bool) -> Lease | None:
        arena = self.reader if through_reader else self.arena
        if self.served is None:
            with pytest.raises(ValueError, match="serves nothing yet"):
                arena.acquire()
            return None
        lease = arena.acquire()
        assert lease.version == self.served
        self.held.append(lease)
        return lease

    @rule(lease=consumes(leases))
    def release(self, lease: Lease | None) -> None:
        if lease is not None:
            lease.release()
            lease.release()
            self.held.remove(lease)

    @invariant()
    def what_is_held_is_whole_and_still(self) -> None:
        assert self.reader.active_version == self.served
        assert len(self.reader._core._holders()) == len(self.held)
        for lease in self.held:  # Through an arena that is open, as that of the lease may not be.
            for entry in LAYOUT.entries:
                values = self.reader._core._payload(lease.slot)[entry.offset :][: entry.nbytes]
                assert (values.view(np.float32) == lease.version).all()


ArenaMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestArena = ArenaMachine.TestCase
