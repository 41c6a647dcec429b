"""Workers of a fleet in this process, which die when a test wants it."""

import os
from bisect import insort
from collections.abc import Callable

import torch
import transformers as hf

from kimi_core.rollout import wire
from kimi_core.rollout.engine import order
from kimi_core.rollout.fleet import Fleet
from kimi_core.rollout.torch.engine import TorchEngine
from kimi_core.rollout.torch.rows import Rows
from kimi_core.rollout.work import WorkerGone
from kimi_core.types import Sampling

VOCAB, CONTEXT, STOP = 32, 96, 1
ROWS = 4
SAMPLED = Sampling(temperature=0.8, seed=5, stop_token_ids=frozenset({STOP}), stream_tokens=3)


def model() -> hf.PreTrainedModel:
    """A Llama with peaked logits, so that mistakes show."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = hf.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            bos_token_id=None,
            eos_token_id=None,
        )
        made = hf.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)
    return made


class Local:
    """Implements ``Worker`` with an engine that makes a step at each ``take``.

    Args:
        dies: asked at each ``take`` whether the worker is gone.
        joins: whether it comes from another host, and only once.
    """

    def __init__(
        self,
        number: int,
        engine: TorchEngine,
        dies: Callable[[], bool] = lambda: False,
        *,
        joins: bool = False,
    ) -> None:
        self.number, self.engine, self.dies, self.joins = number, engine, dies, joins
        self.starts = self.steps = 0
        self.fault = ""
        self.fed: list[list[int]] = []
        self.published = 0
        """The version that it takes when it is told to serve one."""
        self._pipe = os.pipe()
        os.write(self._pipe[1], b"x")  # Always readable.

    def start(self) -> None:
        self.starts += 1
        if self.joins and self.starts > 1:  # It is lost.
            return
        self.steps, self.running, self.waiting = 0, None, []
        self.ready, self.policy_version = False, -1
        self.said = [self._message(wire.READY)]

    def fileno(self) -> int:
        return self._pipe[0]

    def serve(self, version: int) -> None:
        self.ready = False
        self.said.append(self._message(wire.FAULT if self.fault else wire.READY))

    def begin(self, call, sampling, most_steps) -> None:
        self.call, self.running = call, None
        self.given = sampling, most_steps

    def feed(self, requests) -> None:
        self.fed.append([request.trajectory_id for request in requests])
        for request in requests:
            insort(self.waiting, request, key=order)

    def stop(self) -> None:
        self.waiting.clear()
        self.running = None

    def take(self) -> list[wire.Message]:
        if self.dies():
            raise WorkerGone(f"worker {self.number} died on purpose")
        said, self.said = self.said, []
        if self.running is None and self.waiting:
            sampling, most = self.given
            self.running = self.engine.steps(self.waiting, Rows(ROWS, most, sampling))
        if self.running is not None:
            segments = next(self.running, None)
            self.running = None if segments is None else self.running
            if segments:
                said.append(self._message(wire.SEGMENTS, segments))
                self.steps += 1
        for message in said:
            if message.kind == wire.READY:
                self.ready, self.policy_version = True, message.policy_version
        return said

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass

    def _message(self, kind: int, segments=()) -> wire.Message:
        call = self.call if segments else 0
        text = self.fault if kind == wire.FAULT else ""
        bytes_ = wire.packed(
            kind, call=call, policy_version=self.published, segments=segments, text=text
        )
        return wire.unpacked(bytes_, self.number)


class Door:
    """Implements ``Arrivals``: those of ``coming`` come one at a time, whenever it is asked."""

    def __init__(self, coming: list[Local]) -> None:
        self.coming = coming
        self.why = ""
        self._pipe = os.pipe()
        os.write(self._pipe[1], b"x")

    def fileno(self) -> int:
        return self._pipe[0]

    def missing(self) -> str:
        return self.why

    def take(self) -> list[Local]:
        came = [self.coming.pop(0)] if self.coming else []
        for one in came:
            one.starts = 0
            one.start()
        return came


def fleet_of(*workers: Local, exact: bool = True, door: Door | None = None) -> Fleet:
    fleet = Fleet(
        workers, batch_rows=ROWS, vocabulary=VOCAB, context=CONTEXT, exact=exact, arrivals=door
    )
    fleet.serve(0)
    return fleet
