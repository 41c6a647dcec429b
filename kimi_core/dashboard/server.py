"""The dashboard as a web server for this machine alone.

    GET /                                          the page; what it shows is behind the address's #
    GET /data/runs                                 all runs
    GET /data/runs/RUN/settings                    RUN is a name, which may have slashes
    GET /data/runs/RUN/metrics?epoch=E&after=N     lines behind the first N
    GET /data/runs/RUN/iterations                  those whose responses were written
    GET /data/runs/RUN/iterations/12
    GET /data/runs/RUN/iterations/12/groups/3
    GET /data/runs/RUN/iterations/12/responses/40
    GET /data/runs/RUN/buffer                      now
    GET /data/runs/RUN/buffer/40
    GET /data/runs/RUN/prompts
    GET /data/runs/RUN/images/DIGEST.png           an image of a prompt, by its SHA-256

It binds to loopback and answers GET alone. The ``Host`` header must name loopback, so a page of
another site that points its own name at 127.0.0.1 gets nothing. The page runs our scripts alone and
loads nothing from elsewhere (``HEADERS``). Whoever has an account on this machine can connect.
"""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kimi_core.dashboard.missing import Missing
from kimi_core.dashboard.runs import Run, Runs

PAGE = Path(__file__).parent / "page"

JSON = "application/json"

HOSTS = ["127.0.0.1", "localhost"]

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
"""What every answer has. Trusted types forbid a page to make markup from text."""

Ask = Callable[[Run, Request], Any]

QUESTIONS: dict[str, Ask] = {
    "settings": lambda run, request: run.settings(),
    "metrics": lambda run, request: run.metrics(
        _query(request, "epoch", -1), _query(request, "after")
    ),
    "iterations": lambda run, request: run.iterations(),
    "iterations/{number:int}": lambda run, request: run.iteration(request.path_params["number"]),
    "iterations/{number:int}/groups/{one:int}": lambda run, request: run.group(
        request.path_params["number"], request.path_params["one"]
    ),
    "iterations/{number:int}/responses/{one:int}": lambda run, request: run.response(
        request.path_params["number"], request.path_params["one"]
    ),
    "buffer": lambda run, request: run.waiting(),
    "buffer/{one:int}": lambda run, request: run.waiting_response(request.path_params["one"]),
    "prompts": lambda run, request: run.prompts(),
}
"""Path behind the run's name → what it asks."""


def application(runs: Runs) -> ASGIApp:
    """The server's ASGI application."""

    def answers(ask: Ask) -> Callable[[Request], Response]:
        return lambda request: _json(lambda: ask(runs.run(request.path_params["run"]), request))

    def shows(request: Request) -> Response:
        run, digest = request.path_params["run"], request.path_params["digest"]
        return _answer(lambda: runs.run(run).picture(digest), "image/png")

    routes = [
        Route("/data/runs", lambda request: _json(runs.summary)),
        *(
            Route(f"/data/runs/{{run:path}}/{path}", answers(ask))
            for path, ask in QUESTIONS.items()
        ),
        Route("/data/runs/{run:path}/images/{digest}.png", shows),
        Mount("/", StaticFiles(directory=PAGE, html=True)),
    ]
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS, www_redirect=False)
    return WithHeaders(Starlette(routes=routes, middleware=[hosts]))


class WithHeaders:
    """Adds ``HEADERS`` to every answer, errors included."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                extra = [(k.lower().encode(), v.encode()) for k, v in HEADERS.items()]
                message["headers"] = [*message["headers"], *extra]
            await send(message)

        await self._app(scope, receive, with_headers)


def _json(answer: Callable[[], Any]) -> Response:
    return _answer(lambda: as_json(answer()), JSON)


def _answer(answer: Callable[[], bytes], kind: str) -> Response:
    """The answer; ``{"error": ...}`` with 404 or 500 where there is none."""
    try:
        return Response(answer(), media_type=kind)
    except Missing as error:
        content, status = as_json({"error": str(error)}), 404
    except (OSError, ValueError, TypeError, KeyError) as error:  # A damaged file.
        content, status = as_json({"error": f"{type(error).__name__}: {error}"}), 500
    return Response(content, status, media_type=JSON)


def as_json(value: Any) -> bytes:
    """Compact JSON in ASCII, so that lone surrogates of a damaged text stay escaped."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False, default=str).encode()


def _query(request: Request, name: str, default: int = 0) -> int:
    given = request.query_params.get(name, "")
    return int(given) if given.removeprefix("-").isdecimal() and len(given) < 12 else default


def serve(runs: Runs, port: int, say: Callable[[str], object]) -> None:
    """Serve until Ctrl-C or SIGTERM.

    Args:
        port: 0 takes a free one.
        say: is told the address.

    Raises:
        ValueError: another process listens on that port.
    """
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOSTS[0], port))
        except OSError as error:
            raise ValueError(
                f"Cannot listen on {HOSTS[0]}:{port}: {error.strerror}; give another --port, or 0 "
                "for a free one"
            ) from None
        listener.listen()
        say(f"http://{HOSTS[0]}:{listener.getsockname()[1]}/")
        config = uvicorn.Config(application(runs), log_level="warning", server_header=False)
        uvicorn.Server(config).run(sockets=[listener])
