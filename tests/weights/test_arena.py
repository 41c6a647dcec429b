"""The arena from Python: what is published is what is read, and what is wrong changes nothing."""

import faulthandler
import os
import signal
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from warm import Warm

from kimi_core.weights.arena import WeightArena
from kimi_core.weights.layout import Layout


def weights_of(layout: Layout, version: int) -> dict[str, torch.Tensor]:
    """Every tensor filled with what tells its version, name and place."""
    generator = torch.Generator().manual_seed(version)
    return {
        part.name: torch.randn(part.whole, generator=generator)
        for entry in layout.entries
        for part in entry.parts
    }


def holds(lease, version: int) -> bool:
    """Whether a lease holds just this version."""
    lease.verify()
    expected = weights_of(lease.layout, version)
    return lease.version == version and all(
        torch.equal(lease.hf_tensors[name], tensor) for name, tensor in expected.items()
    )


@pytest.fixture
def arena(arena_path, layout):
    with WeightArena.create(arena_path, layout) as arena:
        arena.publish(weights_of(layout, 1), version=1)
        yield arena


def test_both_views_are_of_the_same_memory(arena, layout):
    with WeightArena.open(arena.path) as reader, reader.acquire() as lease:
        assert holds(lease, 1)
        layer = "model.layers.1.self_attn."
        parts = [lease.hf_tensors[f"{layer}{name}_proj.weight"] for name in "qkv"]
        fused = lease.tensors[layer + "qkv_proj.weight"]
        assert torch.equal(torch.cat(parts), fused)
        assert parts[0].data_ptr() == fused.data_ptr()
        assert lease.hf_tensors["lm_head.weight"].data_ptr() == lease.payload.ctypes.data
        assert set(lease.tensors) == {entry.name for entry in layout.entries}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("given", ["float32", "same"])
def test_casts_are_those_of_torch(arena_path, tiny, dtype, given):
    layout = Layout.from_config(tiny, dtype=dtype)
    weights = weights_of(layout, 3)
    weights["model.norm.weight"][:5] = torch.tensor([1e-8, 7e4, -3e38, float("inf"), float("nan")])
    if given == "same":
        weights = {name: tensor.to(getattr(torch, dtype)) for name, tensor in weights.items()}
    with WeightArena.create(arena_path, layout) as arena:
        arena.publish(weights, version=1, threads=2)
        with arena.acquire() as lease:
            lease.verify()
            for name, tensor in weights.items():
                expected = tensor.to(getattr(torch, dtype))
                torch.testing.assert_close(
                    lease.hf_tensors[name], expected, rtol=0, atol=0, equal_nan=True
                )


@pytest.mark.parametrize("tp_size", [2, 4])
def test_a_rank_gets_its_shard(arena_path, tiny, tp_size):
    whole = weights_of(Layout.from_config(tiny, dtype="float32"), 1)
    for rank in range(tp_size):
        layout = Layout.from_config(tiny, dtype="float32", tp_rank=rank, tp_size=tp_size)
        path = arena_path.with_name(f"rank{rank}")
        o_proj = "model.layers.0.self_attn.o_proj.weight"
        with WeightArena.create(path, layout, slots=2) as arena:
            arena.publish(whole, version=0)
            with arena.acquire() as lease:
                lease.verify()
                assert lease.tensors[o_proj].shape == (32, 32 // tp_size)
                for name, (_, part) in layout.by_hf_name.items():
                    stored = whole[layout.tied.get(name, name)]
                    assert torch.equal(lease.hf_tensors[name], stored[part.index]), name


def test_a_rank_without_a_row_of_the_vocabulary(arena_path, tiny):
    config = hf.LlamaConfig(**{**tiny.to_dict(), "vocab_size": 32})
    layout = Layout.from_config(config, dtype="bfloat16", tp_rank=1, tp_size=2)
    with WeightArena.create(arena_path, layout) as arena:
        arena.publish(weights_of(layout, 1), version=1)
        with arena.acquire() as lease:
            lease.verify()
            assert lease.hf_tensors["lm_head.weight"].shape == (0, 32)


def test_tensors_in_any_layout_of_memory_and_numpy_arrays(arena, layout):
    weights = weights_of(layout, 2)
    given = {name: tensor.numpy() for name, tensor in weights.items()}
    name = "model.layers.0.mlp.down_proj.weight"
    given[name] = weights[name].T.contiguous().T
    other = "model.layers.0.mlp.up_proj.weight"
    given[other] = np.asfortranarray(given[other])
    arena.publish(given, version=2)
    with arena.acquire() as lease:
        assert holds(lease, 2)


def test_tied_names_may_be_given_twice_but_not_apart(arena, model):
    arena.publish(model.state_dict(), version=2)
    torn = dict(model.state_dict())
    torn["lm_head.weight"] = torn["lm_head.weight"].clone()
    with pytest.raises(ValueError, match=r"lm_head\.weight is tied to model\.embed_tokens\.weight"):
        arena.publish(torn, version=3)
    assert arena.active_version == 2


def drop(weights):
    del weights["model.norm.weight"]


def add(weights):
    weights["model.norm.bias"] = torch.zeros(32)


def rename(weights):
    weights["norm.weight"] = weights.pop("model.norm.weight")


def reshape(weights):
    weights["model.norm.weight"] = weights["model.norm.weight"][:31]


def flatten(weights):
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = weights[name].flatten()


def widen(weights):
    weights["model.norm.weight"] = weights["model.norm.weight"].double()


def narrow(weights):
    weights["model.norm.weight"] = weights["model.norm.weight"].bfloat16()


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (drop, r"1 names are \(model\.norm\.weight\) missing, and 0 names are unknown"),
        (add, r"0 names are missing, and 1 names are \(model\.norm\.bias\) unknown"),
        (rename, r"\(model\.norm\.weight\) missing, and 1 names are \(norm\.weight\) unknown"),
        (reshape, r"model\.norm\.weight: its shape is \[31\], but the layout has \[32\]"),
        (flatten, r"up_proj\.weight: its shape is \[1536\], but the layout has \[48, 32\]"),
        (widen, r"model\.norm\.weight as torch\.float64 into an arena of float32"),
        (narrow, r"model\.norm\.weight as bfloat16 into an arena of float32"),
    ],
)
def test_wrong_tensors_are_refused_before_anything_is_written(arena, layout, spoil, complaint):
    weights = weights_of(layout, 2)
    spoil(weights)
    before = Path(arena.path).read_bytes()
    with pytest.raises(ValueError, match=complaint):
        arena.publish(weights, version=2)
    assert Path(arena.path).read_bytes() == before
    with arena.acquire() as lease:
        assert holds(lease, 1)
    arena.publish(weights_of(layout, 2), version=2)


def test_a_name_given_twice_is_refused(arena, layout):
    weights = weights_of(layout, 2)
    with pytest.raises(ValueError, match=r"model\.norm\.weight is given twice"):
        arena.publish([*weights.items(), ("model.norm.weight", torch.zeros(32))], version=2)


@pytest.mark.parametrize("version", [1, 0, -1, 2**51])
def test_versions_only_grow(arena, layout, version):
    with pytest.raises(
        ValueError, match=r"versions only grow|allowed are 0 and above|greatest is 2\^51 - 1"
    ):
        arena.publish(weights_of(layout, 2), version=version)
    assert arena.active_version == 1


def test_versions_outlive_the_process(arena_path, layout):
    with WeightArena.create(arena_path, layout) as arena:
        assert arena.active_version is None
        with pytest.raises(ValueError, match="serves nothing yet"):
            arena.acquire()
        arena.publish(weights_of(layout, 7), version=7)
    with WeightArena.open(arena_path, readonly=False) as arena:
        assert arena.active_version == 7
        with pytest.raises(ValueError, match="it has version 7, and versions only grow"):
            arena.publish(weights_of(layout, 7), version=7)
        arena.publish(weights_of(layout, 8), version=8)
        with arena.acquire() as lease:
            assert holds(lease, 8)


def test_two_readers_and_a_slow_one(arena, layout):
    """The third slot is used; then publishing waits, and says for whom."""
    with WeightArena.open(arena.path) as reader, ExitStack() as leases:
        slow = leases.enter_context(reader.acquire())
        arena.publish(weights_of(layout, 2), version=2)
        other = leases.enter_context(reader.acquire())
        arena.publish(weights_of(layout, 3), version=3)
        with pytest.raises(TimeoutError) as failure:
            arena.publish(weights_of(layout, 4), version=4, deadline_s=0.05)
        message = str(failure.value)
        assert "none of 3 slots became free within 0.05 s" in message
        assert f"(version 1) by pid {os.getpid()}" in message
        assert f"(version 2) by pid {os.getpid()}" in message
        assert arena.active_version == 3
        assert holds(slow, 1) and holds(other, 2)
        slow.release()
        arena.publish(weights_of(layout, 4), version=4, deadline_s=0.05)
        assert holds(other, 2)
        assert not slow.held
        with pytest.raises(ValueError, match="version 1 was released"):
            slow.tensors  # noqa: B018


def test_publishing_goes_on_when_a_reader_lets_go(arena, layout):
    """In another process, after publishing has begun to wait."""
    script = (
        "import sys, time\n"
        "from kimi_core.weights.arena import WeightArena\n"
        "lease = WeightArena.open(sys.argv[1]).acquire()\n"
        "print(lease.version, flush=True)\n"
        "sys.stdin.readline()\n"
        "time.sleep(0.2)\n"
        "lease.release()\n"
        "sys.stdin.readline()\n"
    )
    child = Warm(["-c", script, arena.path])
    with ExitStack() as leases:
        leases.callback(child.kill)
        assert child.stdout.readline() == "1\n"
        for version in (2, 3):
            arena.publish(weights_of(layout, version), version=version)
            leases.enter_context(arena.acquire())
        with pytest.raises(TimeoutError, match=rf"\(version 1\) by pid {child.pid}"):
            arena.publish(weights_of(layout, 4), version=4, deadline_s=0)
        child.stdin.write("\n")
        child.stdin.flush()
        arena.publish(weights_of(layout, 4), version=4, deadline_s=60)
        child.stdin.write("\n")
    assert arena.active_version == 4


def in_child(work) -> int:
    """Run ``work`` in a forked process; returns its wait status."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1]


def test_the_memory_of_a_lease_is_read_only(arena):
    with arena.acquire() as lease:
        with pytest.raises(ValueError, match="read-only"):
            lease.payload[0] = 1

        def store() -> None:
            faulthandler.disable()  # It is meant.
            lease.tensors["model.norm.weight"].zero_()

        status = in_child(store)
        assert os.WTERMSIG(status) == signal.SIGSEGV
        assert holds(lease, 1)


def test_a_fork_does_not_release_its_parents_lease(arena_path, layout):
    with WeightArena.create(arena_path, layout, slots=2) as arena:
        arena.publish(weights_of(layout, 1), version=1)
        with arena.acquire() as lease:
            arena.publish(weights_of(layout, 2), version=2)
            assert in_child(lease.release) == 0
            with pytest.raises(TimeoutError, match=f"by pid {os.getpid()}"):
                arena.publish(weights_of(layout, 3), version=3, deadline_s=0)
        arena.publish(weights_of(layout, 3), version=3, deadline_s=0)


def test_a_lease_that_is_collected_is_released(arena_path, layout):
    with WeightArena.create(arena_path, layout, slots=2) as arena:
        for version in range(1, 5):
            arena.publish(weights_of(layout, version), version=version, deadline_s=0)
            view = arena.acquire().tensors["model.norm.weight"]
        assert view.isfinite().all()  # Mapped on, whatever stands there.


def interrupt(payload: np.ndarray, error: type[BaseException]) -> None:
    payload[:] = 1
    raise error


class TestWriting:
    """Bytes from elsewhere, as a broadcast brings them."""

    def test_bytes_are_served_when_they_are_committed(self, arena, arena_path, layout):
        with WeightArena.create(arena_path.with_name("other"), layout) as other:
            with arena.acquire() as lease, other.writing(1) as slot:
                slot.payload[:] = lease.payload
                slot.verify(lease.crcs)
                assert other.active_version is None
                slot.commit()
                with pytest.raises(ValueError, match="committed or abandoned already"):
                    slot.payload  # noqa: B018
            with other.acquire() as lease:
                assert holds(lease, 1)

    def test_a_tensor_that_did_not_arrive_whole_is_named(self, arena, layout):
        with arena.acquire() as lease:
            payload, crcs = lease.payload.copy(), lease.crcs
        entry = layout.by_hf_name["model.layers.1.mlp.up_proj.weight"][0]
        payload[entry.offset + entry.nbytes - 1] ^= 64
        complaint = r"Version 2 arrived damaged .*layers\.1\.mlp\.gate_up_proj.* Version 1 stays"
        with arena.writing(2) as slot:
            slot.payload[:] = payload
            with pytest.raises(ValueError, match=complaint):
                slot.commit(crcs)
            with pytest.raises(ValueError, match="is not verified"):
                slot.commit()
        with arena.acquire() as lease:
            assert holds(lease, 1)
        arena.publish(weights_of(layout, 2), version=2)

    def test_a_slot_that_is_left_is_abandoned(self, arena, layout):
        for error in (ConnectionError, KeyboardInterrupt):
            with pytest.raises(error), arena.writing(2) as slot:
                interrupt(slot.payload, error)
        with arena.writing(2) as slot:
            slot.payload[:] = 1
        assert arena.active_version == 1
        arena.publish(weights_of(layout, 2), version=2)

    def test_one_version_at_a_time(self, arena, layout):
        with arena.writing(2) as slot:
            with pytest.raises(RuntimeError, match="Two versions are written"):
                arena.publish(weights_of(layout, 3), version=3)
            slot.payload[:] = 0
        with pytest.raises(ValueError, match="3 checksums for"), arena.writing(2) as slot:
            slot.commit([1, 2, 3])

    def test_waiting_for_a_slot_has_a_deadline(self, arena, layout):
        with arena.acquire():
            arena.publish(weights_of(layout, 2), version=2)
            with arena.acquire():
                arena.publish(weights_of(layout, 3), version=3)
                started = time.monotonic()
                with pytest.raises(TimeoutError), arena.writing(4, deadline_s=0.1):
                    pass
                assert time.monotonic() - started >= 0.1


def test_one_publisher_at_a_time(arena):
    with pytest.raises(ValueError, match="open for writing already"):
        WeightArena.open(arena.path, readonly=False)
    with (
        WeightArena.open(arena.path) as reader,
        pytest.raises(ValueError, match="open for reading: open it with readonly=False"),
    ):
        reader.publish(weights_of(reader.layout, 2), version=2)


def test_files_are_not_taken_for_others(arena, arena_path, layout, tiny):
    with pytest.raises(FileExistsError):
        WeightArena.create(arena.path, layout)
    with pytest.raises(FileNotFoundError):
        WeightArena.open(arena_path.with_name("none"))
    other = Layout.from_config(tiny, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"has another layout: .*float32 at 0, not .*bfloat16"):
        WeightArena.open(arena.path, layout=other)
    WeightArena.open(arena.path, layout=layout).close()
    with pytest.raises(ValueError, match="slots = 1: an arena has 2 to 8"):
        WeightArena.create(arena_path.with_name("one"), layout, slots=1)


def test_no_room_leaves_no_file(arena_path, layout, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(WeightArena, "__init__", full)
        with pytest.raises(OSError, match="No space left"):
            WeightArena.create(arena_path, layout)
    assert not arena_path.exists()


def test_a_closed_arena_says_so(arena_path, layout):
    arena = WeightArena.create(arena_path, layout)
    arena.publish(weights_of(layout, 1), version=1)
    lease = arena.acquire()
    arena.close()
    arena.close()
    with pytest.raises(ValueError, match="is closed: open it again"):
        arena.acquire()
    lease.release()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_unknown_model_goes_through_under_its_own_names(arena_path, dtype):
    config = hf.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    own = hf.GPT2LMHeadModel(config)
    with pytest.warns(UserWarning, match="has to copy"):
        layout = Layout.from_config(config, dtype=dtype)
    with WeightArena.create(arena_path, layout) as arena:
        arena.publish(own.named_parameters(), version=0)
        with arena.acquire() as lease:
            lease.verify()
            for name, parameter in own.named_parameters():
                assert torch.equal(lease.tensors[name], parameter.to(getattr(torch, dtype)))
