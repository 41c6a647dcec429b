"""What the vLLM tests share."""

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

from kimi_core.rollout.vllm.engine import VLLMEngine
from kimi_core.types import Request, Sampling, Segment
from kimi_core.weights.publish import ArenaPublisher

MARKS = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("vllm") is None,
        reason="vLLM is not installed here; python/install_vllm.sh makes an environment with it",
    ),
]
VOCAB, STOP = 37, 1
"""Not a multiple of 64: vLLM pads its vocabulary."""
GREEDY = Sampling(temperature=0, seed=0, stop_token_ids=frozenset({STOP}))
SAMPLED = Sampling(temperature=0.8, seed=5, stop_token_ids=frozenset({STOP}))
SMALL_CACHE = {"kv_cache_memory_bytes": 1 << 27}


def tiny_model(seed: int = 0) -> Any:
    """Two layers with grouped heads and tied embeddings, far from uniform."""
    config = hf.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(seed)
    model: Any = hf.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model.eval()


def perturb(model: Any, seed: int) -> None:
    """Other weights, as a training step would leave them, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)


class PublishedEngine(VLLMEngine):
    """A ``VLLMEngine`` with the model and the publisher that belong to its trainer."""

    def __init__(self, model: Any, *, policy_version: int = 0, **settings: Any):
        self.model = model
        size = settings.get("options", {}).get("tensor_parallel_size", 1)
        self.publisher = ArenaPublisher(model.config, model.dtype, tp_size=size)
        super().__init__(
            model.config,
            model.dtype,
            lambda: self.publisher.paths,
            policy_version=policy_version,
            **settings,
        )
        self.publisher.publish(model.named_parameters(), policy_version)

    def publish_and_serve(self, version: int) -> None:
        self.publisher.publish(self.model.named_parameters(), version)
        self.serve(version)

    def close(self) -> None:
        super().close()
        self.publisher.close()


def next_version(engine: PublishedEngine) -> None:
    perturb(engine.model, engine.policy_version)
    engine.publish_and_serve(engine.policy_version + 1)


def requests_of(n: int, budget: int = 40, remaining: int = 40) -> list[Request]:
    """Contexts of mixed lengths, each shared by two trajectories; the longest fill a block."""
    rng = np.random.default_rng(0)
    contexts = [rng.integers(2, VOCAB, 3 + 9 * (i % 6)).astype(np.int32) for i in range(n)]
    return [
        Request(i, contexts[i // 2], len(contexts[i // 2]), budget, remaining) for i in range(n)
    ]


def gathered(streams: Iterator[list[Segment]]) -> dict[int, list[Segment]]:
    parts: dict[int, list[Segment]] = {}
    for segment in chain.from_iterable(streams):
        parts.setdefault(segment.trajectory_id, []).append(segment)
    return parts


def joined(parts: Sequence[Segment]) -> tuple[list[int], np.ndarray]:
    return (
        [int(token) for part in parts for token in part.token_ids],
        np.concatenate([part.logprobs for part in parts]),
    )


def assert_logprobs_are_those_of(
    model: Any, requests: Sequence[Request], parts: dict[int, list[Segment]], sampling: Sampling
) -> None:
    """Of a plain forward pass with no cache and no padding, to 1e-4."""
    assert parts.keys() == {request.trajectory_id for request in requests}
    for request in requests:
        tokens, logprobs = joined(parts[request.trajectory_id])
        ids = torch.tensor([*request.token_ids.tolist(), *tokens])
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0].double()
        expected = (logits / (sampling.temperature or 1)).log_softmax(-1)
        expected = expected[len(request.token_ids) - 1 : -1]
        if sampling.temperature == 0:
            assert tokens == expected.argmax(-1).tolist()
        chosen = expected.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        np.testing.assert_allclose(logprobs, chosen.numpy(), atol=1e-4)


def tokens_of(engine: PublishedEngine) -> dict[int, list[int]]:
    parts = gathered(engine.generate(requests_of(12), SAMPLED))
    assert {part.policy_version for some in parts.values() for part in some} == {
        engine.policy_version
    }
    return {key: joined(some)[0] for key, some in parts.items()}


def tokens_of_two_versions() -> list[dict[int, list[int]]]:
    """Of one vLLM that stays awake, before and after an update."""
    engine = PublishedEngine(tiny_model(), batch_rows=8, options=SMALL_CACHE)
    expected = [tokens_of(engine)]
    next_version(engine)
    expected.append(tokens_of(engine))
    engine.close()
    return expected


def after(request: Request, parts: Sequence[Segment]) -> Request:
    """The request that takes up a response again."""
    tokens, _ = joined(parts)
    return Request(
        request.trajectory_id,
        np.concatenate([request.token_ids, tokens]).astype(np.int32),
        request.prompt_length,
        request.budget,
        request.remaining - len(tokens),
    )


def processes_of(engine: VLLMEngine) -> tuple[int, int]:
    """The pids of the engine core and of its worker."""
    assert engine.server is not None
    return engine.server.pids[0], served(engine)["pid"]


def served(engine: VLLMEngine) -> dict[str, Any]:
    assert engine.server is not None
    asked = engine.server.llm.collective_rpc("weights_served")
    return engine.server.wait(asked, "an answer")[0]
