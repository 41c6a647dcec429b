"""The life of an engine over HTTP, one service a host: ``kimi engine``.

    POST /start     {"model": "runs/think/checkpoint", "version": 0}
    POST /serve     {"model": "runs/think/best", "version": 1}
    POST /wake, /sleep, /stop
    POST /generate  {"contexts": [[5, 6]], "max_tokens": 8, "temperature": 1.0, "seed": 0}
    GET  /state

Each answers with the state (``life.py``), and /generate with ``responses`` as well. Every request
has the bearer token. It waits ``?timeout_s=`` seconds at most (600); a step that takes longer goes
on, and the answer is 504. A step during another one, or in the wrong state, is 409; what cannot
work is 422; processes that do not start or die are 503.
"""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import uvicorn
from fastapi import FastAPI, HTTPException, Query
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse

from kimi_core.cluster.life import EngineLife, NotNow
from kimi_core.models.smollm2 import ModelUnavailable
from kimi_core.rollout.engine import EngineFailed
from kimi_core.sandbox.service import MAX_BODY_BYTES, Guard
from kimi_core.types import Sampling, Segment

WAIT_S = 600.0
"""Longest wait for a step, if the request has no ``timeout_s``."""

Wait = Annotated[float, Query(gt=0, le=86400)]

STATUSES: dict[type[Exception], int] = {
    NotNow: 409,
    ValueError: 422,
    ModelUnavailable: 422,
    EngineFailed: 503,
}


class Weights(BaseModel):
    """A checkpoint, under a version."""

    model: str
    """As ``model.name`` of a config."""
    version: int = Field(ge=0)


class Ask(BaseModel):
    """What to sample: one response to each context."""

    contexts: list[list[int]]
    """Token ids."""
    max_tokens: int = Field(ge=1)
    temperature: float = Field(1.0, ge=0)
    seed: int = 0
    stop_token_ids: list[int] = []


def create_app(life: EngineLife, token: str) -> FastAPI:
    """The service as an ASGI application."""
    app = FastAPI(title="kimi_core engine", openapi_url=None)
    app.add_middleware(Guard, token=token, max_body_bytes=MAX_BODY_BYTES)

    @app.post("/start")
    async def start(weights: Weights, timeout_s: Wait = WAIT_S) -> dict[str, Any]:
        await _take("start", partial(life.start, weights.model, weights.version), timeout_s)
        return life.state()

    @app.post("/serve")
    async def serve(weights: Weights, timeout_s: Wait = WAIT_S) -> dict[str, Any]:
        await _take("serve", partial(life.serve, weights.model, weights.version), timeout_s)
        return life.state()

    @app.post("/generate")
    async def generate(ask: Ask, timeout_s: Wait = WAIT_S) -> dict[str, Any]:
        contexts = [np.array(one, np.int32) for one in ask.contexts]
        sampling = Sampling(ask.temperature, ask.seed, frozenset(ask.stop_token_ids))
        step = partial(life.generate, contexts, sampling, ask.max_tokens)
        segments = await _take("generate", step, timeout_s)
        return life.state() | {"responses": [_written(one) for one in segments]}

    @app.get("/state")
    async def state() -> dict[str, Any]:
        return life.state()

    @app.post("/{step}")
    async def other(
        step: Literal["wake", "sleep", "stop"], timeout_s: Wait = WAIT_S
    ) -> dict[str, Any]:
        steps = {"wake": life.wake, "sleep": life.sleep, "stop": life.stop}
        await _take(step, steps[step], timeout_s)
        return life.state()

    for kind, status in STATUSES.items():
        app.add_exception_handler(kind, partial(_refused, status))
    return app


async def _take(what: str, step: Callable[[], Any], timeout_s: float) -> Any:
    """What the step returns. Raises HTTPException if it takes longer."""
    going_on = asyncio.ensure_future(asyncio.to_thread(step))
    done, _ = await asyncio.wait({going_on}, timeout=timeout_s)
    if done:
        return going_on.result()
    # A later error is in the state; it is looked at here, so that nothing warns of it.
    going_on.add_done_callback(lambda late: late.exception())
    raise HTTPException(
        504, f"{what} has not ended in {timeout_s:g} s and goes on; GET /state tells when it has"
    )


def _written(segment: Segment) -> dict[str, Any]:
    return {
        "token_ids": segment.token_ids.tolist(),
        "logprobs": segment.logprobs.tolist(),
        "end_reason": segment.end_reason,
        "version": segment.policy_version,
    }


async def _refused(status: int, _: Any, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, status)


def serve(life: EngineLife, host: str, port: int, token: str) -> None:
    """Run the service until SIGTERM or Ctrl-C, and then stop the engine."""
    try:
        uvicorn.run(create_app(life, token), host=host, port=port, timeout_graceful_shutdown=30)
    finally:
        if life.state()["state"] != "stopped":
            life.stop()
