"""Runs programs in a sandbox service on another host, with deadlines and retries."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import httpx2

from kimi_core.sandbox.program import Limits, Program, Result, SandboxUnavailable
from kimi_core.sandbox.protocol import PROGRAM, RESULT

FIRST_PAUSE_S = 0.2
"""Pause before the first retry, seconds; doubled before each further one."""


class SandboxClient:
    """Thread-safe. A program changes nothing on the server, so a failed request is sent again.

    Args:
        url: address of the service, such as ``http://10.0.0.7:8100``.
        token: the service's bearer token.
        deadline_s: longest time of one call, with queueing and retries, seconds.
        retries: failures of the network or the service that a call survives. A full queue (429) is
            no failure: the client waits for it until the deadline.
        sleep, clock: for tests.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        deadline_s: float = 300.0,
        retries: int = 3,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._url = url.rstrip("/")
        self._deadline_s = deadline_s
        self._retries = retries
        self._sleep = sleep
        self._clock = clock
        self._http = httpx2.Client(
            base_url=self._url,
            headers={} if token is None else {"Authorization": f"Bearer {token}"},
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=64),
            trust_env=False,  # No proxy: the service runs on a host of the user.
        )

    def run(
        self,
        program: str | Sequence[str],
        *,
        stdin: bytes = b"",
        files: Mapping[str, bytes] | None = None,
        limits: Limits | None = None,
    ) -> Result:
        """As ``kimi_core.sandbox.run``; the server may reduce the limits to its own.

        Raises:
            SandboxUnavailable: no result came before the deadline, or there were more failures than
                retries.
            ValueError: the service refused the request (its token, size or form).
        """
        given = Program(program, stdin, files or {}, limits or Limits())
        body = PROGRAM.dump_python(given, mode="json")
        return self._results("/run", body, lambda answer: [answer])[0]

    def run_batch(self, programs: Sequence[Program]) -> list[Result]:
        """Run several programs in one call; the server runs them in parallel. Raises as ``run``."""
        body = {"runs": [PROGRAM.dump_python(one, mode="json") for one in programs]}
        return self._results("/run_batch", body, lambda answer: answer["results"])

    def health(self) -> dict[str, Any]:
        """Slots, running and waiting programs of the service.

        Raises:
            SandboxUnavailable: the service does not answer within 10 s.
        """
        try:
            answer = self._http.get("/health", timeout=10.0)
            answer.raise_for_status()
            found: dict[str, Any] = answer.json()
        except (httpx2.HTTPError, ValueError) as error:
            raise SandboxUnavailable(f"No sandbox service at {self._url}: {error}") from error
        return found

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> "SandboxClient":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _results(
        self, path: str, body: dict[str, Any], listed: Callable[[Any], list[Any]]
    ) -> list[Result]:
        end = self._clock() + self._deadline_s
        failures, pause, trouble = 0, FIRST_PAUSE_S, "nothing was tried"
        while (left := end - self._clock()) > 0:
            try:
                answer = self._http.post(path, json=body, timeout=left)
                if answer.status_code == 200:
                    found = listed(answer.json())
                    return [RESULT.validate_json(json.dumps(one)) for one in found]
                trouble = f"status {answer.status_code}: {answer.text[:200]}"
            except httpx2.TransportError as error:
                answer, trouble = None, f"{type(error).__name__}: {error}"
            except (ValueError, KeyError, TypeError) as error:
                raise SandboxUnavailable(f"{self._url} gave no result: {error!r}") from error
            if answer is not None and answer.status_code == 429:
                self._sleep(min(float(answer.headers.get("Retry-After", "1")), left))
                continue
            if answer is not None and answer.status_code < 500 and answer.status_code != 408:
                raise ValueError(f"The sandbox service {self._url} refused {path}: {trouble}")
            failures += 1
            if failures > self._retries:
                raise SandboxUnavailable(f"{self._url}{path} failed {failures} times: {trouble}")
            self._sleep(min(pause, left))
            pause *= 2
        raise SandboxUnavailable(
            f"{self._url}{path}: no result within {self._deadline_s:g} s: {trouble}"
        )
