"""Settings from TOML files and the command line, and back to TOML.

config = load_config("configs/think.toml", ["trainer.learning_rate=3e-4", "seed=1"])
"""

import json
import re
import reprlib
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import tomli_w
from pydantic import ValidationError

from kimi_core.config import AblationConfig, Config, ScratchConfig, TaskConfig
from kimi_core.config.names import canonical, meant, settings
from kimi_core.metrics import leaves

MOVED = {
    **{f"model.{key}": f"model.scratch.{key}" for key in ScratchConfig.model_fields},
    **{f"prompts.{key}": f"prompts.task.{key}" for key in TaskConfig.model_fields},
    **{f"trainer.{key}": f"trainer.ablation.{key}" for key in AblationConfig.model_fields},
}
"""Keys of earlier versions → where they are now."""

DROPPED = {
    "trainer.activation_checkpointing": "layers are recomputed if trainer.memory_gb, by default "
    "half of the memory, is too little",
    "rollout.vllm.start_timeout_s": "vLLM has 600 s to start",
    "curriculum.prior_weight": "the prior weighs 2 samples",
    "reward.math.memory_mb": "a comparison may use 1024 MB",
}
"""Keys of earlier versions → what holds in their place."""


def load_config(path: str | Path | None, overrides: list[str] | None = None) -> Config:
    """Read a TOML file (None: the defaults) and apply ``section.key=value`` overrides in order.

    Values are TOML literals, and a text that is not one is taken as a string. ``none`` unsets a
    setting that may be unset: ``rollout.token_budget=none``.

    Raises:
        ValueError: the file is missing or not TOML, an override has no ``=``, or a key or value is
            not allowed. The message names each of them with what was given.
    """
    text = ""
    if path is not None:
        try:
            text = Path(path).read_text()
        except FileNotFoundError:
            raise ValueError(f"No config file {path}") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not text in UTF-8: {error}") from None
    return parse_config(text, path, overrides)


def parse_config(
    text: str, source: str | Path | None, overrides: list[str] | None = None
) -> Config:
    """The config that ``text`` describes; ``source`` names it in messages. As ``load_config``."""
    try:
        raw: dict[str, Any] = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"{source} is not valid TOML: {error}") from None
    for override in overrides or []:
        _apply_override(raw, override)
    try:
        return Config(**raw)
    except ValidationError as error:
        raise ValueError(_explain(error)) from None


def dump_toml(config: Config) -> str:
    """The settings as TOML that ``load_config`` reads back to an equal ``Config``.

    Unset values are left out, because TOML has no null. Every setting that can be unset is unset by
    default.
    """
    return tomli_w.dumps(_without_none(config.model_dump()))


def plain_settings(config: Config) -> dict[str, Any]:
    """Dotted key → value, as text where it is no number, text or truth value; without unset ones.

    >>> plain_settings(Config())["rollout.stop"], plain_settings(Config())["trainer.tau"]
    ('[]', 0.01)
    """
    found = ((key.replace("/", "."), value) for key, value in leaves(config.model_dump()))
    return {
        key: value if isinstance(value, bool | int | float | str) else str(value)
        for key, value in found
        if value is not None
    }


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if value is not None
    }


def _apply_override(raw: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise ValueError(
            f"Cannot read {override!r}: an override is section.key=value, as in seed=1"
        )
    value: Any = text
    if text == "none" and _can_be_unset(dotted):
        value = None
    else:
        with suppress(tomllib.TOMLDecodeError, RecursionError):
            value = tomllib.loads(f"value = {text}")["value"]
    *sections, key = dotted.split(".")
    for section in sections:
        raw = raw.setdefault(section, {})
        if not isinstance(raw, dict):
            raise ValueError(f"Cannot set {dotted}: {section} is a value, not a section")
    raw[key] = value


def _can_be_unset(dotted: str) -> bool:
    *sections, key = dotted.split(".")
    model: Any = Config
    for section in sections:
        field = getattr(model, "model_fields", {}).get(section)
        model = field.annotation if field else None
    field = getattr(model, "model_fields", {}).get(key)
    return field is not None and type(None) in get_args(field.annotation)


SHORT = reprlib.Repr()
"""Shows values in messages: long ones are cut, and deeply nested ones end in ``...``."""
SHORT.maxstring = SHORT.maxlong = SHORT.maxother = 200


def _explain(error: ValidationError) -> str:
    return "\n".join(map(_said_of, error.errors()))


def _said_of(fault: Any) -> str:
    where, value = ".".join(str(part) for part in fault["loc"]), fault["input"]
    shown = f"{where:.100} = {SHORT.repr(value)}"
    known = settings()
    if where in MOVED:
        return f"{shown}: this key is now {MOVED[where]}"
    if where in DROPPED:
        return f"{shown}: this key is gone; {DROPPED[where]}"
    if fault["type"] == "missing":
        return f"{where} is missing, which has no default"
    if fault["type"] == "value_error":
        return str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        return f"Unknown key {shown}{_way_out(where, value)}"
    if canonical(where) in known and known[canonical(where)].is_section:
        return f"{shown}: {where} is a section{_way_out(where, value)}"
    if where == "name" and fault["type"] == "string_pattern_mismatch":
        allowed = re.sub(r"[^\w.-]+", "-", value).strip("-.") or "mine"
        return f"{shown}: allowed are letters, digits and any of . _ -; write name={allowed}"
    return f"{shown}: {fault['msg']}"


def _way_out(where: str, value: Any) -> str:
    """What to write in place of a key that does not exist."""
    section = canonical(where if canonical(where) in settings() else where.rpartition(".")[0])
    listed = f"`{f'kimi config {section}'.strip()}`"
    if likely := [] if isinstance(value, dict) else meant(where):
        written = " or ".join(f"{key}={_literal(value)}" for key in likely)
        return f"; did you mean {written}? {listed} lists what there is"
    inside = [key for key in settings() if key.rpartition(".")[0] == section]
    return f"; allowed here: {', '.join(key.rpartition('.')[2] for key in inside)} ({listed})"


def _literal(value: Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return value if isinstance(value, str) else json.dumps(value, default=str)
