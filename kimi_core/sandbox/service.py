"""The sandbox as an HTTP service, for trainers on other hosts.

    POST /run          one run                       → its result
    POST /run_batch    {"runs": [...]}, in parallel  → {"results": [...]}, in order
    GET  /health       slots, runs under way, runs that wait

A run is ``RunRequest.as_json``, a result ``result_to_json`` (``protocol.py``). At most ``slots``
runs are under way and ``queue`` wait; what comes beyond is turned away with 429 and
``Retry-After``, before it can time out in a line. The limits of a run are cut to the server's. A
bearer token guards all but ``/health``; without one the service binds to loopback only.
"""

import asyncio
import hmac
import ipaddress
import os
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any, Literal

import anyio
import uvicorn
from anyio.to_thread import run_sync
from fastapi import FastAPI, HTTPException
from pydantic import Base64Bytes, BaseModel, ConfigDict, Field
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kimi_core.sandbox.pool import Pool
from kimi_core.sandbox.program import Limits, Result, SandboxUnavailable
from kimi_core.sandbox.protocol import TOKEN_VARIABLE, result_to_json

MAX_BODY_BYTES = 32 << 20
"""Of one request."""

BODY_S = 30.0
"""The longest that a request may keep the service waiting for the next part of its body."""

MAXIMA = Limits(
    wall_s=120.0,
    cpu_s=60.0,
    memory_bytes=2 << 30,
    processes=64,
    file_bytes=64 << 20,
    open_files=256,
    output_bytes=16 << 20,
)
"""What no run gets more of, whatever its request says."""


class RunBody(BaseModel):
    """One run as it comes in."""

    model_config = ConfigDict(extra="forbid")

    program: Annotated[str, Field(min_length=1)] | Annotated[list[str], Field(min_length=1)]
    """Python source, or a command with its arguments."""
    stdin: Base64Bytes = b""
    files: dict[str, Base64Bytes] = {}
    limits: Limits = Limits()


class BatchBody(BaseModel):
    model_config = ConfigDict(extra="forbid")

    runs: Annotated[list[RunBody], Field(min_length=1)]


class Health(BaseModel):
    status: Literal["ok"] = "ok"
    slots: int
    running: int
    waiting: int
    queue: int
    """How many may wait."""


class Gate:
    """Counts the runs inside. One event loop, so no lock.

    Args:
        slots: runs under way at a time.
        queue: runs that may wait for one of them.
    """

    def __init__(self, slots: int, queue: int) -> None:
        self.slots = slots
        self.queue = queue
        self.inside = 0
        self._limiter: anyio.CapacityLimiter | None = None

    def enter(self, runs: int) -> None:
        """Take places for so many runs, all or none.

        Raises:
            HTTPException: 413 if they never fit, 429 if they do not now.
        """
        if runs > self.slots + self.queue:
            raise HTTPException(
                413, f"{runs} runs in one batch; at most {self.slots + self.queue} fit"
            )
        if self.inside + runs > self.slots + self.queue:
            raise HTTPException(
                429,
                f"{self.inside} runs are under way or wait; room for {self.slots} + {self.queue}",
                headers={"Retry-After": "1"},
            )
        self.inside += runs

    async def in_a_slot(self, function: Callable[[], Result]) -> Result:
        """Wait for a slot, call ``function`` in a thread, and give up the place."""
        if self._limiter is None:  # Belongs to the event loop, which the app is made before.
            self._limiter = anyio.CapacityLimiter(self.slots)
        try:
            return await run_sync(function, limiter=self._limiter)
        finally:
            self.inside -= 1


class Guard:
    """Turns away a request without the token or with too long a body before anything reads it."""

    def __init__(self, app: ASGIApp, token: str | None, max_body_bytes: int) -> None:
        self._app = app
        self._expected = None if token is None else f"Bearer {token}".encode()
        self._max = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("authorization", "").encode()
        if (
            self._expected is not None
            and scope["path"] != "/health"
            and not hmac.compare_digest(given, self._expected)
        ):
            refusal = JSONResponse({"detail": "A bearer token is needed, or another one"}, 401)
            refusal.headers["WWW-Authenticate"] = "Bearer"
            await refusal(scope, receive, send)
            return
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > self._max:
            await JSONResponse({"detail": self._too_long()}, 413)(scope, receive, send)
            return
        await self._app(scope, self._bounded(receive), send)

    def _bounded(self, receive: Receive) -> Receive:
        seen, complete = 0, False

        async def bounded() -> Message:
            nonlocal seen, complete
            if complete:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), BODY_S)
            except TimeoutError:
                raise HTTPException(408, f"Nothing of the body came for {BODY_S:g} s") from None
            seen += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if seen > self._max:
                raise HTTPException(413, self._too_long())
            return message

        return bounded

    def _too_long(self) -> str:
        return f"The body is longer than {self._max} bytes; split the batch"


def create_app(
    run: Callable[..., Result],
    *,
    slots: int,
    queue: int,
    token: str | None = None,
    maxima: Limits = MAXIMA,
    max_body_bytes: int = MAX_BODY_BYTES,
) -> FastAPI:
    """The service as an ASGI application.

    Args:
        run: as ``kimi_core.sandbox.run``; called from ``slots`` threads at once.
        slots: runs under way at a time.
        queue: runs that may wait for one of them.
        token: asked of every request but ``/health``; None asks for none.
        maxima: the limits of a run are cut to these.
        max_body_bytes: a longer request is refused.
    """
    app = FastAPI(title="kimi_core sandbox", openapi_url=None)
    app.add_middleware(Guard, token=token, max_body_bytes=max_body_bytes)
    gate = Gate(slots, queue)

    def prepared(body: RunBody) -> Callable[[], Result]:
        limits = clamp(body.limits, maxima)
        return partial(run, body.program, stdin=body.stdin, files=body.files, limits=limits)

    @app.post("/run")
    async def run_one(body: RunBody) -> dict[str, Any]:
        gate.enter(1)
        return result_to_json(await gate.in_a_slot(prepared(body)))

    @app.post("/run_batch")
    async def run_batch(body: BatchBody) -> dict[str, Any]:
        gate.enter(len(body.runs))
        results = await asyncio.gather(*(gate.in_a_slot(prepared(one)) for one in body.runs))
        return {"results": [result_to_json(one) for one in results]}

    @app.get("/health")
    async def health() -> Health:
        running = min(gate.inside, gate.slots)
        waiting = gate.inside - running
        return Health(slots=gate.slots, running=running, waiting=waiting, queue=gate.queue)

    @app.exception_handler(SandboxUnavailable)
    async def unavailable(_: Any, error: SandboxUnavailable) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 503)

    @app.exception_handler(ValueError)
    async def refused(_: Any, error: ValueError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 422)

    return app


def clamp(limits: Limits, maxima: Limits) -> Limits:
    """``limits``, none of them above ``maxima``."""
    most = asdict(maxima)
    return Limits(**{name: min(value, most[name]) for name, value in asdict(limits).items()})


def check_binding(host: str, token: str | None) -> None:
    """Refuse to run other people's programs for everybody on the network.

    Raises:
        ValueError: ``host`` is not a loopback address and there is no token.
    """
    if token:
        return
    try:
        safe = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        safe = False
    if not safe:
        raise ValueError(
            f"Will not bind to {host} without a bearer token: anybody could run programs here. Set "
            f"{TOKEN_VARIABLE}, or bind to 127.0.0.1"
        )


def serve(
    host: str,
    port: int,
    *,
    token: str | None,
    slots: int | None = None,
    queue: int = 256,
    allow_weak: bool = False,
) -> None:
    """Run the service on a pool of this process until SIGTERM or Ctrl-C.

    Args:
        port: 0 takes one that is free; the log says which.
        slots: of the pool; default: one a core.
        queue: runs that may wait.

    Raises:
        ValueError: as ``check_binding``.
        SandboxUnavailable: programs cannot be run safely here.
    """
    check_binding(host, token)
    slots = slots or len(os.sched_getaffinity(0))
    with Pool(slots, allow_weak=allow_weak) as pool:
        app = create_app(pool.run, slots=slots, queue=queue, token=token)
        uvicorn.run(app, host=host, port=port, timeout_graceful_shutdown=30)
