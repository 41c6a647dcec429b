"""Schemathesis asks the HTTP services: requests that fit their schema, and requests that do not.

    PYTHONPATH=tests python tests/fuzz/services.py sandbox --seconds 60    # or dashboard

It needs ``pip install '.[test,fuzz]'``.
Each service listens on a port of this machine. No answer may be a server error, and every answer
must be one that the schema below has. The sandbox service runs no program here: what reads
requests is tested, and ``tests/sandbox`` has the sandbox. A finding ends the process with a
traceback and the request.
"""

import argparse
import json
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import schemathesis
import uvicorn
from hypothesis import HealthCheck, Phase, given, seed, settings
from pydantic import TypeAdapter
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from kimi_core.dashboard.runs import Runs
from kimi_core.dashboard.server import QUESTIONS, application
from kimi_core.sandbox import Result, Status
from kimi_core.sandbox.protocol import BATCH, PROGRAM, RESULT
from kimi_core.sandbox.service import Health, create_app

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]

ROUND = 50
"""Requests to one path before the next path has its turn."""

RUN_NAMES = ["made", "deep/made", "deep%2Fmade", "made/..", "%00", "missing"]


def sandbox(work: Path) -> tuple[dict[str, Any], Any]:
    """Schema and application of the sandbox service."""

    def run(*_: Any, **__: Any) -> Result:
        return Result(Status.OK, 0, b"4", b"\xff", cpu_s=0.1, wall_s=0.2, memory_bytes=1)

    said = {"type": "object", "required": ["detail"]}
    refused = {status: answer(said) for status in ("413", "422", "429")}
    program, batch, result, health = (
        schema_of(one) for one in (PROGRAM, BATCH, RESULT, TypeAdapter(Health))
    )
    results = {"type": "object", "properties": {"results": {"type": "array", "items": result}}}
    paths = {
        "/run": {"post": body(program) | {"responses": {"200": answer(result), **refused}}},
        "/run_batch": {"post": body(batch) | {"responses": {"200": answer(results), **refused}}},
        "/health": {"get": {"responses": {"200": answer(health)}}},
    }
    return openapi(paths), create_app(run, slots=2, queue=8)


def dashboard(work: Path) -> tuple[dict[str, Any], Any]:
    """Schema and application of the dashboard over two runs."""
    from made_runs import make_run  # Loads transformers.

    make_run(work / "made", iterations=2)
    make_run(work / "deep" / "made", iterations=1)
    numbers = {"type": "integer", "minimum": 0}
    kinds = {"run": {"anyOf": [{"enum": RUN_NAMES}, {"type": "string", "minLength": 1}]}}
    missing = answer({"type": "object", "required": ["error"]})
    missing["content"]["text/plain"] = {}  # Of paths that no question has.
    responses = {"200": answer({}), "404": missing}
    paths: dict[str, Any] = {"/data/runs": {"get": {"responses": responses}}}
    for question in QUESTIONS:
        path = f"/data/runs/{{run}}/{question.replace(':number', '')}"
        names = [part.strip("{}") for part in path.split("/") if part.startswith("{")]
        parameters = [parameter(name, "path", kinds.get(name, numbers)) for name in names]
        if question == "metrics":
            parameters += [parameter(name, "query", {}) for name in ("epoch", "after")]
        paths[path] = {"get": {"parameters": parameters, "responses": responses}}
    return openapi(paths), application(Runs(work))


SERVICES = {"sandbox": sandbox, "dashboard": dashboard}


def schema_of(adapter: TypeAdapter[Any]) -> dict[str, Any]:
    """The JSON schema of what an adapter reads, with its definitions inside."""
    found = adapter.json_schema()
    definitions = found.pop("$defs", {})

    def inside(value: Any) -> Any:
        if isinstance(value, list):
            return [inside(one) for one in value]
        if not isinstance(value, dict):
            return value
        if "$ref" in value:
            return inside(definitions[value["$ref"].rpartition("/")[2]])
        return {key: inside(one) for key, one in value.items() if key != "default"}

    return inside(found)


def body(schema: dict[str, Any]) -> dict[str, Any]:
    content = {"application/json": {"schema": schema}}
    return {"requestBody": {"required": True, "content": content}}


def answer(schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": "", "content": {"application/json": {"schema": schema}}}


def parameter(name: str, place: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": place, "required": place == "path", "schema": schema}


def openapi(paths: dict[str, Any]) -> dict[str, Any]:
    return {"openapi": "3.1.0", "info": {"title": "service", "version": "1"}, "paths": paths}


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """The application on a free port of this machine; gives its address."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)


def ask_for(name: str, seconds: float, first: int = 0) -> int:
    """Ask a service until the time is over, at least a round; return the number of requests.

    Args:
        first: seed of the first round; the next one has the next.
    """
    count, end = 0, time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as place:
        schema, app = SERVICES[name](Path(place))
        every = [
            found.ok() for found in schemathesis.openapi.from_dict(schema).get_all_operations()
        ]
        with serving(app) as url:
            while not count or time.monotonic() < end:
                for operation in every:
                    count += ask(operation, url, first)
                first += 1
    return count


def ask(operation: Any, url: str, round_: int) -> int:
    asked = 0

    @seed(round_)
    @settings(
        max_examples=ROUND,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def one(case: Any) -> None:
        nonlocal asked
        asked += 1
        case.call_and_validate(base_url=url, checks=CHECKS)

    one()
    return asked


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("service", choices=SERVICES)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    count = ask_for(asked.service, asked.seconds, asked.seed)
    print(json.dumps({"service": asked.service, "requests": count}))


if __name__ == "__main__":
    main()
