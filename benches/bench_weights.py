"""The weight arena beside memcpy and beside what one would use in its place: one test a line.

    pytest benches/bench_weights.py      # a minute or two, 4 GB of memory

The weights have the shapes of SmolLM2-135M, 538 MB in float32, and random values. Peers bring them
from the trainer's parameters to an engine's, as we do, but check nothing. Time is CPU time of this
process on one thread, kernel included; rounds of ours and of the peer alternate and the best of
each counts, as a busy machine only ever slows one down. Files of the peers are in the page cache
when they are read: no disk is waited for. Extra memory is what becomes resident, mapped files too.

memcpy is the physical limit: the same bytes from the same tensors into warm private memory.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from kimi_core.weights.arena import WeightArena
from kimi_core.weights.binding import bind
from kimi_core.weights.layout import Layout

pytestmark = pytest.mark.usefixtures("one_thread")

ROUNDS = 5
FLIPS = 40
CONFIG = hf.LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
    max_position_embeddings=2048,
    bos_token_id=None,
    eos_token_id=None,
)


@pytest.fixture(scope="module")
def model() -> hf.LlamaForCausalLM:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(CONFIG)


@pytest.fixture(scope="module")
def engine_model() -> hf.LlamaForCausalLM:
    return hf.LlamaForCausalLM(CONFIG).requires_grad_(False)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(
        prefix="bench-weights-", dir=shared if shared.is_dir() else None
    ) as path:
        yield Path(path)


@pytest.fixture(scope="module")
def arena(folder) -> Iterator[WeightArena]:
    layout = Layout.from_config(CONFIG, dtype="float32")
    with WeightArena.create(folder / "arena", layout, slots=2) as arena:
        yield arena


def cpu_s(run: Callable[[], object]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def next_version(arena: WeightArena) -> int:
    return 0 if arena.active_version is None else arena.active_version + 1


def publish(arena: WeightArena, model: torch.nn.Module) -> None:
    arena.publish(model.named_parameters(), version=next_version(arena), threads=1)


def status_mb(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1000
    raise KeyError(key)


def extra_mb(run: Callable[[], object]) -> float:
    """Most resident memory while it runs above what there was before, MB."""
    Path("/proc/self/clear_refs").write_text("5")  # Begins the high-water mark anew.
    before = status_mb("VmRSS")
    run()
    return max(0.0, status_mb("VmHWM") - before)


def assert_published(arena: WeightArena, model: torch.nn.Module) -> None:
    with arena.acquire() as lease:
        lease.verify()
        dtype = next(iter(lease.tensors.values())).dtype
        for name, parameter in model.named_parameters():
            assert torch.equal(lease.hf_tensors[name], parameter.to(dtype)), name


def beside_memcpy(arena, model, ratios, benchmark, *, minimum: float | None) -> None:
    """Cast and checksum in one pass, against a copy of what is read."""
    sources = [parameter.detach() for parameter in model.parameters()]
    targets = [torch.ones_like(source) for source in sources]
    spent: dict[str, list[float]] = {"publish": [], "memcpy": []}

    def one_round() -> None:
        spent["publish"].append(cpu_s(lambda: publish(arena, model)))
        spent["memcpy"].append(
            cpu_s(lambda: [to.copy_(source) for to, source in zip(targets, sources, strict=True)])
        )

    benchmark.pedantic(one_round, rounds=ROUNDS)
    assert_published(arena, model)
    ours, limit = min(spent["publish"]), min(spent["memcpy"])
    extra = extra_mb(lambda: publish(arena, model))
    ratios.record(
        f"weights publish float32 as {arena.layout.entries[0].dtype}",
        "memcpy",
        limit / ours,
        minimum=minimum,
        detail=f"{1e3 * ours:.0f} against {1e3 * limit:.0f} CPU ms; {extra:.0f} MB extra at peak",
    )


def test_publish_float32(arena, model, ratios, benchmark):
    beside_memcpy(arena, model, ratios, benchmark, minimum=0.6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_publish_cast(folder, model, ratios, benchmark, dtype):
    layout = Layout.from_config(CONFIG, dtype=dtype)
    path = folder / dtype
    with WeightArena.create(path, layout, slots=2) as arena:
        beside_memcpy(arena, model, ratios, benchmark, minimum=None)
    path.unlink()


def test_flip_of_the_embedded_engine(arena, model, engine_model, ratios, benchmark):
    """To lease a version, verified beforehand, and to point every parameter at it."""
    publish(arena, model)
    binding = bind(engine_model, arena.acquire())
    cpu_ms, wall_ms = [], []

    def prepare() -> tuple[tuple, dict]:
        publish(arena, model)
        with arena.acquire() as lease:
            lease.verify()
        return (), {}

    def flip() -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        lease = arena.acquire()
        lease.verified = True  # In ``prepare``.
        binding.flip(lease)
        cpu_ms.append(1e3 * (time.process_time() - cpu))
        wall_ms.append(1e3 * (time.perf_counter() - wall))

    benchmark.pedantic(flip, setup=prepare, rounds=FLIPS)
    assert binding.version == arena.active_version
    views = binding.lease.hf_tensors
    for name, parameter in engine_model.named_parameters():
        assert parameter.data_ptr() == views[name].data_ptr()
    extra = extra_mb(binding.follow)
    binding.release()
    middle = sorted(cpu_ms)[FLIPS // 2]
    ratios.record(
        "weights flip, embedded",
        "0.5 ms",
        0.5 / middle,
        minimum=1.0,
        detail=f"median {middle:.2f} CPU ms, {sorted(wall_ms)[FLIPS // 2]:.2f} ms of wall-clock "
        f"time; {extra:.0f} MB extra at peak",
    )


def beside(peer, name, arena, model, engine_model, ratios, benchmark, *, publishes: bool) -> None:
    """What the peer does against publish, verify and flip, or where it only loads, verify and flip.

    An engine stands still while it loads, and only for the flip with ours."""
    publish(arena, model)
    binding = bind(engine_model, arena.acquire())
    own_model = hf.LlamaForCausalLM(CONFIG).requires_grad_(False)
    spent: dict[str, list[float]] = {"publish": [], "verify": [], "flip": [], "peer": []}

    def ours() -> None:
        spent["publish"].append(cpu_s(lambda: publish(arena, model)))
        lease = arena.acquire()
        spent["verify"].append(cpu_s(lambda: lease.verify(threads=1)))
        spent["flip"].append(cpu_s(lambda: binding.flip(lease)))

    def one_round() -> None:
        ours()
        spent["peer"].append(cpu_s(lambda: peer(own_model)))

    benchmark.pedantic(one_round, rounds=3)
    for key, parameter in own_model.named_parameters():
        assert torch.equal(parameter, model.get_parameter(key)), key
    extra_ours, extra_peer = extra_mb(ours), extra_mb(lambda: peer(own_model))
    binding.release()
    best = {key: 1e3 * min(values) for key, values in spent.items()}
    best_ours = best["verify"] + best["flip"] + publishes * best["publish"]
    ratios.record(
        "weights published, verified and flipped to"
        if publishes
        else "weights verified, flipped to",
        name,
        best["peer"] / best_ours,
        detail=f"{best_ours:.0f} against {best['peer']:.0f} CPU ms; {extra_ours:.0f} against "
        f"{extra_peer:.0f} MB extra at peak",
    )
    if not publishes:
        detail = f"{best['flip']:.2f} against {best['peer']:.0f} CPU ms"
        ratios.record(
            "weights: the engine's pause", name, best["peer"] / best["flip"], detail=detail
        )


def test_beside_load_state_dict(arena, model, engine_model, ratios, benchmark):
    """In one process: it reads the trainer's own tensors."""

    def peer(target: torch.nn.Module) -> None:
        target.load_state_dict(model.state_dict())

    beside(peer, "load_state_dict", arena, model, engine_model, ratios, benchmark, publishes=False)


def test_beside_safetensors(arena, model, engine_model, ratios, benchmark, tmp_path):
    path = tmp_path / "model.safetensors"

    def peer(target: torch.nn.Module) -> None:
        save_file({name: p.detach() for name, p in model.named_parameters()}, path)
        target.load_state_dict(load_file(path), strict=False)  # The tied name is not in it.

    name = "safetensors, written and read"
    beside(peer, name, arena, model, engine_model, ratios, benchmark, publishes=True)


def test_beside_safetensors_reload(arena, model, engine_model, ratios, benchmark, tmp_path):
    """The reading alone, as an engine that is told to reload from disk does it."""
    path = tmp_path / "model.safetensors"
    save_file({name: p.detach() for name, p in model.named_parameters()}, path)

    def peer(target: torch.nn.Module) -> None:
        target.load_state_dict(load_file(path), strict=False)

    name = "safetensors, read only"
    beside(peer, name, arena, model, engine_model, ratios, benchmark, publishes=False)


def test_beside_torch_save(arena, model, engine_model, ratios, benchmark, tmp_path):
    path = tmp_path / "model.pt"

    def peer(target: torch.nn.Module) -> None:
        torch.save(model.state_dict(), path)
        target.load_state_dict(torch.load(path, weights_only=True))

    name = "torch.save and load"
    beside(peer, name, arena, model, engine_model, ratios, benchmark, publishes=True)
