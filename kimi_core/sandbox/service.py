"""The sandbox as an HTTP service, for trainers on other hosts.

    POST /run          one program                      → its result
    POST /run_batch    {"runs": [...]}, run in parallel → {"results": [...]}, in order
    GET  /health       slots, running and waiting programs

``protocol.py`` has the JSON. At most ``slots`` programs run and ``queue`` wait. More are refused
with 429 and ``Retry-After``, before they could time out while waiting. Limits are reduced to the
server's. A bearer token guards everything but ``/health``; without a token the service binds to
loopback only.
"""

import asyncio
import hmac
import ipaddress
import os
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any, Literal

import anyio
import uvicorn
from anyio.to_thread import run_sync
from fastapi import FastAPI, HTTPException, Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kimi_core.sandbox.pool import Pool
from kimi_core.sandbox.program import (
    TOKEN_VARIABLE,
    Limits,
    Program,
    Result,
    SandboxUnavailable,
)
from kimi_core.sandbox.protocol import BATCH, PROGRAM, RESULT

MAX_BODY_BYTES = 32 << 20
"""Longest body of a request."""

BODY_S = 30.0
"""Longest wait for the next part of a request's body, seconds."""

MAXIMA = Limits(
    wall_s=120.0,
    cpu_s=60.0,
    memory_bytes=2 << 30,
    processes=64,
    file_bytes=64 << 20,
    open_files=256,
    output_bytes=16 << 20,
)
"""Most that a program gets, whatever the request says."""


class Health(BaseModel):
    status: Literal["ok"] = "ok"
    slots: int
    running: int
    waiting: int
    queue: int
    """How many programs may wait."""


class Gate:
    """Counts running and waiting programs. There is one event loop, so it needs no lock.

    Args:
        slots: programs that run at the same time.
        queue: programs that may wait.
    """

    def __init__(self, slots: int, queue: int) -> None:
        self.slots = slots
        self.queue = queue
        self.inside = 0
        self._limiter: anyio.CapacityLimiter | None = None

    def enter(self, runs: int) -> None:
        """Take a place for each of ``runs`` programs, or for none.

        Raises:
            HTTPException: 413 if they never fit, 429 if they do not fit now.
        """
        if runs > self.slots + self.queue:
            raise HTTPException(
                413, f"{runs} runs in one batch; at most {self.slots + self.queue} fit"
            )
        if self.inside + runs > self.slots + self.queue:
            raise HTTPException(
                429,
                f"{self.inside} programs run or wait; allowed are {self.slots} + {self.queue}",
                headers={"Retry-After": "1"},
            )
        self.inside += runs

    async def in_a_slot(self, function: Callable[[], Result]) -> Result:
        """Wait for a slot, call ``function`` in a thread, and give up the place."""
        if (
            self._limiter is None
        ):  # It belongs to the event loop, which starts after the app is made.
            self._limiter = anyio.CapacityLimiter(self.slots)
        try:
            return await run_sync(function, limiter=self._limiter)
        finally:
            self.inside -= 1


class Guard:
    """Refuses a request without the token or with too long a body before anything reads it."""

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
            refusal = JSONResponse({"detail": "The bearer token is missing or wrong"}, 401)
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
                raise HTTPException(408, f"No part of the body came for {BODY_S:g} s") from None
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
        run: as ``kimi_core.sandbox.run``; called from ``slots`` threads at the same time.
        slots: programs that run at the same time.
        queue: programs that may wait.
        token: every request but ``/health`` must have it; None: no token is needed.
        maxima: the limits of a program are reduced to these.
        max_body_bytes: a longer request is refused.
    """
    app = FastAPI(title="kimi_core sandbox", openapi_url=None)
    app.add_middleware(Guard, token=token, max_body_bytes=max_body_bytes)
    gate = Gate(slots, queue)

    async def run_in_a_slot(program: Program) -> Any:
        call = partial(
            run,
            program.program,
            stdin=program.stdin,
            files=program.files,
            limits=clamp(program.limits, maxima),
        )
        return RESULT.dump_python(await gate.in_a_slot(call), mode="json")

    @app.post("/run")
    async def run_one(request: Request) -> Any:
        program = PROGRAM.validate_json(await request.body())
        gate.enter(_not_empty(program))
        return await run_in_a_slot(program)

    @app.post("/run_batch")
    async def run_batch(request: Request) -> dict[str, Any]:
        batch = BATCH.validate_json(await request.body())
        gate.enter(_not_empty(*batch.runs))
        return {"results": await asyncio.gather(*map(run_in_a_slot, batch.runs))}

    @app.get("/health")
    async def health() -> Health:
        running = min(gate.inside, gate.slots)
        waiting = gate.inside - running
        return Health(slots=gate.slots, running=running, waiting=waiting, queue=gate.queue)

    @app.exception_handler(SandboxUnavailable)
    async def unavailable(_: Any, error: SandboxUnavailable) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 503)

    @app.exception_handler(ValidationError)
    async def invalid(_: Any, error: ValidationError) -> JSONResponse:
        faults = [
            f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"
            for fault in error.errors(include_input=False, include_url=False)
        ]
        return JSONResponse({"detail": "; ".join(faults)}, 422)

    @app.exception_handler(ValueError)
    async def refused(_: Any, error: ValueError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 422)

    return app


def _not_empty(*programs: Program) -> int:
    """Their number, after a check that none of them is empty."""
    if any(not program.program for program in programs):
        raise HTTPException(422, "program is empty; give Python source, or a command as a list")
    return len(programs)


def clamp(limits: Limits, maxima: Limits) -> Limits:
    """``limits``, each at most that of ``maxima``."""
    most = asdict(maxima)
    return Limits(**{name: min(value, most[name]) for name, value in asdict(limits).items()})


def check_binding(host: str, token: str | None) -> None:
    """Refuse to run programs for everybody on the network.

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
        port: 0 takes a free one; the log says which.
        slots: slots of the pool; default: one per core.
        queue: programs that may wait.

    Raises:
        ValueError: as ``check_binding``.
        SandboxUnavailable: programs cannot be run safely here.
    """
    check_binding(host, token)
    slots = slots or len(os.sched_getaffinity(0))
    with Pool(slots, allow_weak=allow_weak) as pool:
        app = create_app(pool.run, slots=slots, queue=queue, token=token)
        uvicorn.run(app, host=host, port=port, timeout_graceful_shutdown=30)
