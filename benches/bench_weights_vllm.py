"""New weights into vLLM: the flip through its API, beside what would be done in its place.

    .venv-vllm/bin/python -m pytest benches/bench_weights_vllm.py    # 2 minutes, 4 GB of memory

538 MB, the shapes of SmolLM2-135M in float32. The flip is ``finish_weight_update``, as the trainer
calls it: from its process through the engine core to the worker and back, and once more to the
engine core with the version's name. What is verified before it, while the engine may go on serving,
is in the whole update. Best of the rounds, wall-clock time: a busy machine only ever slows one
down, and CPU time, which stands beside it, counts how long vLLM's processes spin while they wait.
The peers are timed within the worker: vLLM's own loader, given the arena's tensors, and the same
from a safetensors file that is in the page cache. Neither checks anything.
"""

import os
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from vllm_testing import PublishedEngine

from kimi_core.rollout.vllm.engine import VLLMEngine

ROUNDS = 12
CONFIG = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
    "bos_token_id": None,
    "eos_token_id": None,
}
MISSING = "vLLM is not installed here; python/install_vllm.sh makes an environment with it"

if find_spec("vllm") is not None:
    from kimi_core.rollout.vllm import backend as vllm_backend

    class PeerWorker(vllm_backend.ArenaWorker):
        """A worker that also does what the peers would; seconds it took."""

        model_runner: Any

        def own_memory(self) -> None:
            """As without an arena."""
            for parameter in self.model_runner.model.parameters():
                parameter.data = parameter.data.clone()

        def load_from_memory(self) -> float:
            with self.weight_transfer_engine.arena.acquire() as lease:
                return _seconds(lambda: self._load(lease.hf_tensors.items()))

        def load_from_disk(self, path: str) -> float:
            return _seconds(lambda: self._load(load_file(path).items()))

        @torch.no_grad()
        def _load(self, named_tensors: Any) -> None:
            self.model_runner.model.load_weights(named_tensors)


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


@pytest.fixture(scope="module")
def engine(monkeypatch_module) -> Iterator[VLLMEngine]:
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**CONFIG))
    monkeypatch_module.setattr(vllm_backend, "EXTENSION", f"{Path(__file__).stem}.PeerWorker")
    engine = PublishedEngine(model, batch_rows=4, options={"kv_cache_memory_bytes": 1 << 27})
    engine._started()
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def monkeypatch_module() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def cpu_ms(pids: list[int]) -> float:
    """That these processes' threads have run for."""
    tasks = [task for pid in pids for task in Path(f"/proc/{pid}/task").iterdir()]
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e6


def in_worker(engine: VLLMEngine, method: str, *args: Any) -> Any:
    assert engine.server is not None
    return engine.server.wait(engine.server.llm.collective_rpc(method, args=args), method)[0]


@pytest.mark.skipif(find_spec("vllm") is None, reason=MISSING)
def test_update(engine, ratios, benchmark, tmp_path: Path):
    flips, flips_cpu, updates = [], [], []
    pids = [os.getpid(), *engine.server.pids, in_worker(engine, "weights_served")["pid"]]

    def one_round() -> None:
        version, server = engine.policy_version + 1, engine.server
        started = time.perf_counter()
        engine.publisher.publish(engine.model.named_parameters(), version)
        server.prepare(version)
        prepared, prepared_cpu = time.perf_counter(), cpu_ms(pids)
        server.flip(version)
        flips.append(time.perf_counter() - prepared)
        flips_cpu.append(cpu_ms(pids) - prepared_cpu)
        updates.append(time.perf_counter() - started)
        engine.policy_version = version

    benchmark.pedantic(one_round, rounds=ROUNDS)
    report = in_worker(engine, "weights_served")
    assert report["version"] == engine.policy_version and report["views"]
    flip, update = 1e3 * min(flips), 1e3 * min(updates)
    middle_cpu, middle = (sorted(times)[ROUNDS // 2] for times in (flips_cpu, flips))
    ratios.record(
        "weights flip, through vLLM's API",
        "5 ms",
        5 / flip,
        minimum=1.0,
        detail=f"best {flip:.2f}, median {1e3 * middle:.2f} ms of wall-clock time; median "
        f"{middle_cpu:.2f} CPU ms of three processes, which spin while they wait",
    )
    path = tmp_path / "model.safetensors"
    save_file({name: p.detach() for name, p in engine.model.named_parameters()}, path)
    in_worker(engine, "own_memory")
    for peer, method, args in (
        ("vLLM's load_weights, from memory", "load_from_memory", ()),
        ("vLLM's load_weights, from disk", "load_from_disk", (str(path),)),
    ):
        theirs = 1e3 * min(in_worker(engine, method, *args) for _ in range(5))
        for name, ours, what in (
            ("weights flip, through vLLM's API", flip, "flip"),
            ("weights published, verified and flipped", update, "whole update"),
        ):
            ratios.record(
                name, peer, theirs / ours, detail=f"{what} {ours:.1f} ms, peer {theirs:.0f} ms"
            )
