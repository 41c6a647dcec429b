"""Everything that can be wrong with a file: a clear error, the old version serves on, and the next
one is published."""

import struct
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from kimi_core.weights.arena import WeightArena
from kimi_core.weights.binding import bind
from kimi_core.weights.layout import Layout

HEADER_SUMMED, CURRENT, SLOT_STATES, LEASES, TABLE = 80, 128, 192, 4096, 3 * 4096
FLIPS = 12


def constant(layout: Layout, value: float) -> dict[str, torch.Tensor]:
    return {
        part.name: torch.full(part.whole, float(value))
        for entry in layout.entries
        for part in entry.parts
    }


@pytest.fixture
def arena(arena_path, layout):
    """Version 2 is served, from slot 1."""
    with WeightArena.create(arena_path, layout) as arena:
        for version in (1, 2):
            arena.publish(constant(layout, version), version=version)
        yield arena


def places(arena: WeightArena) -> dict[str, tuple[int, int]]:
    """Where each region of the file begins and ends; see docs/weight_protocol.md."""
    regions = 16 * len(arena.layout.entries)
    table = TABLE + -(-(regions + len(arena.layout.to_json().encode())) // 4096) * 4096
    crcs = -(-4 * len(arena.layout.entries) // 64) * 64
    slots = -(-(table + 3 * crcs) // 4096) * 4096
    slot = -(-arena.layout.payload_bytes // 4096) * 4096
    assert Path(arena.path).stat().st_size == slots + 3 * slot
    found = {
        "header": (0, HEADER_SUMMED),
        "current": (CURRENT, CURRENT + 8),
        "slot states": (SLOT_STATES, SLOT_STATES + 3 * 64),
        "leases": (LEASES, LEASES + 128 * 64),
        "table": (TABLE, TABLE + regions + len(arena.layout.to_json().encode())),
    }
    for index in range(3):
        found[f"checksums {index}"] = (table + crcs * index, table + crcs * index + 4)
        found[f"slot {index}"] = (slots + slot * index, slots + slot * index + slot)
    return found


def flip(path: str, at: int, bit: int) -> None:
    with Path(path).open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


def spread(begin: int, end: int) -> list[tuple[int, int]]:
    """Places and bits over a range, its first and last byte among them."""
    step = max(1, (end - 1 - begin) // (FLIPS - 1))
    places = [begin + step * index for index in range(FLIPS - 1)]
    return [(at, index % 8) for index, at in enumerate([*places, end - 1]) if at < end]


def serves(arena: WeightArena, version: int) -> bool:
    with WeightArena.open(arena.path) as reader, reader.acquire() as lease:
        lease.verify()
        return is_constant(lease, version)


def is_constant(lease, version: int) -> bool:
    return lease.version == version and all(
        bool((tensor == version).all()) for tensor in lease.tensors.values()
    )


@pytest.mark.parametrize("region", ["header", "table"])
def test_a_flip_in_what_never_changes(arena, layout, region):
    """New readers refuse the file, old ones go on, and publishing repairs it."""
    for at, bit in spread(*places(arena)[region]):
        served = arena.active_version
        with arena.acquire() as held:
            flip(arena.path, at, bit)
            with pytest.raises(
                ValueError, match=r"not a weight arena|format version|damaged|no arena"
            ):
                WeightArena.open(arena.path)
            assert is_constant(held, served)
            arena.publish(constant(layout, served + 1), version=served + 1)
            assert is_constant(held, served)
        assert serves(arena, served + 1)


@pytest.mark.parametrize("region", ["current", "slot states", "leases"])
def test_a_flip_in_what_changes_costs_nothing(arena, layout, region):
    begin, end = places(arena)[region]
    for at, bit in spread(begin, end):
        if region == "slot states" and (at - begin) % 64 >= 8:
            continue  # The checksum of checksums, below, and what is not used.
        served = arena.active_version
        with arena.acquire() as held:
            flip(arena.path, at, bit)
            assert serves(arena, served)
            assert is_constant(held, served)
            arena.publish(constant(layout, served + 1), version=served + 1)
            assert is_constant(held, served)
        assert serves(arena, served + 1)


def test_a_flip_in_the_checksums_or_their_checksum(arena, layout):
    own = places(arena)
    for at in (own["checksums 1"][0], own["slot states"][0] + 64 + 8):
        with arena.acquire() as held:
            slot = held.slot
        if slot != 1:
            arena.publish(constant(layout, 10), version=10)
            arena.publish(constant(layout, 11), version=11)
        flip(arena.path, at, 3)
        with arena.acquire() as lease:
            assert lease.slot == 1
            with pytest.raises(ValueError, match="checksums of slot 1 fails its own"):
                lease.verify()
        flip(arena.path, at, 3)
        assert serves(arena, arena.active_version)
    flip(arena.path, at, 3)
    arena.publish(constant(layout, 20), version=20)
    assert serves(arena, 20)


def publish_next(arena: WeightArena) -> int:
    version = arena.active_version + 1
    arena.publish(constant(arena.layout, version), version=version)
    return version


@pytest.mark.parametrize("slot", [0, 1, 2])
def test_a_flip_in_a_slot(arena, layout, model, slot):
    """An engine keeps the version that it has; the error names the tensor."""
    with WeightArena.open(arena.path) as reader:
        binding = bind(model, reader.acquire())
        for entry in layout.entries:
            begin = places(arena)[f"slot {slot}"][0] + entry.offset
            for at, bit in ((begin, 0), (begin + entry.nbytes - 1, 7)):
                before = binding.follow()
                if binding.lease.slot == slot:
                    publish_next(arena)
                    before = binding.follow()
                version = publish_into(arena, slot)
                flip(arena.path, at, bit)
                complaint = (
                    rf"is damaged: {entry.name} of version {version} does not match its checksum"
                )
                with pytest.raises(ValueError, match=complaint):
                    binding.follow()
                assert binding.version == before < version
                assert all(bool((p == before).all()) for p in model.parameters())
                assert publish_next(arena) == binding.follow()
        binding.release()


def publish_into(arena: WeightArena, slot: int) -> int:
    """Publish until ``slot`` is served, which has no reader; the version there."""
    with ExitStack() as leases:
        while leases.enter_context(arena.acquire()).slot != slot:
            publish_next(arena)
    return arena.active_version


def test_padding_is_nobodys(arena):
    """Between tensors there is nothing to damage."""
    begin, end = places(arena)["slot 1"]
    last = arena.layout.entries[-1]
    if last.offset + last.nbytes < end - begin:
        flip(arena.path, end - 1, 0)
    assert serves(arena, 2)


def test_half_written_and_cut_files(arena, arena_path):
    whole = Path(arena.path).read_bytes()
    damaged = arena_path.with_name("damaged")
    for size in (0, 5, 79, 4095, TABLE, TABLE + 100, len(whole) // 3, len(whole) - 1):
        damaged.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"not a weight arena|is cut off: it has"):
            WeightArena.open(damaged)
        damaged.write_bytes(whole[:size] + bytes(len(whole) - size))  # Its length, no content.
        if size <= places(arena)["slot 1"][0]:
            with pytest.raises(ValueError, match=r"not a weight arena|damaged|serves nothing yet"):
                serves(WeightArena.open(damaged), 2)
        else:  # Only the empty slot was lost.
            assert serves(WeightArena.open(damaged), 2)
    assert serves(arena, 2)


def test_a_file_of_another_kind_or_a_newer_format(arena_path):
    arena_path.write_bytes(b"PK\x03\x04" + bytes(10_000))
    with pytest.raises(ValueError, match="is not a weight arena: it does not begin with KIMIWGTS"):
        WeightArena.open(arena_path)
    arena_path.write_bytes(b"KIMIWGTS" + struct.pack("<I", 2) + bytes(10_000))
    with pytest.raises(ValueError, match="has format version 2, and this kimi_core reads up to 1"):
        WeightArena.open(arena_path)


def test_a_layout_that_is_not_what_its_hash_says(arena_path, layout):
    from kimi_core import _C

    regions = [(entry.offset, entry.nbytes) for entry in layout.entries]
    text, size = layout.to_json(), layout.payload_bytes
    for name, digest, places_, description, complaint in (
        ("hash", bytes(32), regions, text, "layout hash in its header does not match its table"),
        ("regions", layout.hash, regions[:-1], text, "layout hash in its header does not match"),
        ("text", layout.hash, regions, text[:-1], "Cannot read the arena's table of tensors"),
    ):
        path = arena_path.with_name(name)
        _C.WeightArena._create(str(path), 2, size, digest, places_, description)
        with pytest.raises(ValueError, match=complaint):
            WeightArena.open(path)
