"""A judge behind an OpenAI-compatible server, as ``vllm serve`` is one.

It is asked as ``judge.JudgeReward`` asks: the response is escaped, the verdict counts at the end of
a text that the judge ended itself, and a second request asks for the JSON alone. Requests have a
time limit and are repeated; after that there is no verdict, and never a 0.
"""

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx2

from kimi_core.config import JudgeConfig
from kimi_core.models.images import data_uri
from kimi_core.reward.base import InfrastructureError, LimitReached
from kimi_core.reward.judges.judge import REPAIR, REPAIR_TOKENS, TEMPLATE, escape, read_verdict
from kimi_core.types import IMAGE_MARK, Image, Prompt, Score

FIRST_PAUSE_S = 0.5
"""Pause before the first repetition, seconds; doubled before each further one."""

LONGEST_PAUSE_S = 60.0
"""A server may ask for a longer pause than ours, up to this."""

BREAKS = ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CALLS]")
"""Special tokens that do not begin with ``<``; the server's tokenizer may read them from text."""

LARGEST_ANSWER = 16 << 20
"""Bytes; a chat completion has a few thousand."""

BUSY = {408, 409, 425, 429}
TOO_LONG = {400, 413, 422}
"""What servers answer to a request that exceeds the model's context."""


class Unanswered(RuntimeError):
    """An answer does not end."""


class HttpJudge:
    """A reward function: 1 if the judge finds the response right, else 0. Thread-safe.

    Args:
        config: ``reward.judge``.
        sleep: waits before a repetition; for tests.

    Raises:
        ValueError: there is no address or no template, or the template lacks a field.
    """

    __name__ = "judge"

    def __init__(self, config: JudgeConfig, *, sleep: Callable[[float], None] = time.sleep) -> None:
        if not config.url or not config.model:
            raise ValueError(
                "reward.function = 'judge' needs reward.judge.url, such as "
                "http://10.0.0.7:8000/v1, and reward.judge.model, the name that the server gives"
            )
        if not re.match(r"https?://[^/]", config.url):
            raise ValueError(
                f"reward.judge.url = {config.url!r}; allowed is http://HOST:PORT/v1 or https://"
            )
        self._config = config
        self._sleep = sleep
        self._template = _template(config.template)
        key = os.environ.get(config.key_variable, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise ValueError(f"The key in ${config.key_variable} has characters that no key has")
        self._http = httpx2.Client(
            base_url=config.url.rstrip("/"),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=config.timeout_s,
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=64),
        )

    def __call__(self, prompt: Prompt, response: str) -> Score:
        """The verdict, with the judge's reasoning as its note.

        Raises:
            LimitReached: the server refuses the request, as it does if it is too long.
            InfrastructureError: the server cannot be reached, or gives no readable verdict.
            ValueError: the server refuses the key, or does not know the model; or an image of the
                prompt is gone.
        """
        question = prompt.text.replace(IMAGE_MARK, "(image)")
        fields = {"question": question, "reference": prompt.answer, "response": response}
        safe = {name: escape(text, BREAKS) for name, text in fields.items()}
        content = _content(self._template.format(**safe), prompt.images)
        asked: list[dict[str, Any]] = [{"role": "user", "content": content}]
        reasoning, text, stopped = self._complete(asked, self._config.max_tokens)
        verdict = read_verdict(text) if stopped else None
        if verdict is None:
            asked += [{"role": "assistant", "content": text or "…"}]
            asked += [{"role": "user", "content": f"{REPAIR.strip()} true}} or false}}"}]
            _, repair, _ = self._complete(asked, REPAIR_TOKENS)
            found = re.match(r'\s*(?:```\w*\s*)?(?:\{\s*"correct"\s*:\s*)?(true|false)\b', repair)
            if found is None:
                said = f"{text[-80:]!r}, then {repair[:80]!r}"
                raise InfrastructureError(f"The judge gave no verdict in JSON: {said}")
            verdict, text = found[1] == "true", f"{text}\n{repair}"
        return Score(float(verdict), note="\n".join(filter(None, (reasoning, text))))

    def close(self) -> None:
        self._http.close()

    def _complete(
        self, messages: Sequence[Mapping[str, Any]], max_tokens: int
    ) -> tuple[str, str, bool]:
        """Reasoning that the server sets apart, the text, and whether the judge ended it itself."""
        body = {
            "model": self._config.model,
            "messages": list(messages),
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        answer = self._post(body)
        try:
            choice = answer["choices"][0]
            message = choice["message"]
            text = message.get("content") or ""
            if isinstance(text, list):  # Of parts, as some servers write it.
                text = "".join(part["text"] for part in text if part.get("type") == "text")
            reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
            reasoning, text = (
                str(one).encode(errors="replace").decode() for one in (reasoning, text)
            )
            return reasoning, text, choice.get("finish_reason") == "stop"
        except (LookupError, TypeError, AttributeError):
            raise InfrastructureError(
                f"The judge at {self._config.url} answered {answer!r:.120}, not a chat completion"
            ) from None

    def _post(self, body: Mapping[str, Any]) -> Any:
        """The server's answer, after at most ``retries`` repetitions."""
        url = f"{self._config.url.rstrip('/')}/chat/completions"
        pause, trouble = FIRST_PAUSE_S, ""
        for attempt in range(self._config.retries + 1):
            if attempt:
                self._sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
            try:
                answer = self._ask(body)
            except (httpx2.HTTPError, Unanswered) as error:
                trouble = f"{type(error).__name__}: {error}"
                continue
            if answer.is_success:
                try:
                    return answer.json()
                except (ValueError, RecursionError):
                    trouble = f"no JSON: {answer.text[:80]!r}"
                    continue
            trouble = f"{answer.status_code}: {answer.text[:120]!r}"
            if answer.status_code in TOO_LONG:
                raise LimitReached(f"The judge at {url} refused a request: {trouble}")
            if answer.status_code not in BUSY and answer.status_code < 500:
                raise ValueError(
                    f"The judge at {url} answered {trouble}: check reward.judge.url and "
                    f"reward.judge.model, and the key in ${self._config.key_variable}"
                )
            pause = max(pause, min(_asked_for_s(answer), LONGEST_PAUSE_S))
        raise InfrastructureError(
            f"The judge at {url} gave no answer in {self._config.retries + 1} requests of at most "
            f"{self._config.timeout_s:g} s each, the last: {trouble}"
        )

    def _ask(self, body: Mapping[str, Any]) -> httpx2.Response:
        """One request, whose whole answer has the time limit: httpx limits each read alone."""
        end = time.monotonic() + self._config.timeout_s
        with self._http.stream("POST", "/chat/completions", json=dict(body)) as answer:
            read = bytearray()
            for part in answer.iter_bytes():
                read += part
                if time.monotonic() > end or len(read) > LARGEST_ANSWER:
                    raise Unanswered(f"{len(read)} bytes in {self._config.timeout_s:g} s, no end")
        headers = {"Retry-After": answer.headers.get("Retry-After", "0")}
        return httpx2.Response(answer.status_code, headers=headers, content=bytes(read))


def _content(text: str, images: Sequence[Image]) -> str | list[dict[str, Any]]:
    """The content of a message; the images of a prompt stand before the text, in their order."""
    if not images:
        return text
    seen = [{"type": "image_url", "image_url": {"url": data_uri(image)}} for image in images]
    return [*seen, {"type": "text", "text": text}]


def _template(path: str) -> str:
    if not path:
        return TEMPLATE
    try:
        template = Path(path).read_text(encoding="utf-8")
        template.format(question="", reference="", response="")
    except (OSError, UnicodeDecodeError, LookupError, ValueError) as error:
        raise ValueError(
            f"reward.judge.template = {path!r}: {error}; allowed is a text file with {{question}}, "
            "{reference} and {response}, and {{ }} for braces"
        ) from None
    return template


def _asked_for_s(answer: httpx2.Response) -> float:
    """The pause that the server asks for, in seconds; 0 if it asks for none."""
    try:
        return max(0.0, float(answer.headers.get("Retry-After", 0)))
    except ValueError:  # A date.
        return 0.0
