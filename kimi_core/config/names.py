"""Every setting by its dotted name, and what somebody meant who typed another name."""

import difflib
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

from kimi_core.config import Config, EvaluationSetConfig
from kimi_core.config.section import Section

LIKE = 0.6
"""Least similarity of two names, as difflib measures it, at which one may be meant by the other."""


NAMED = {"evaluation.sets": EvaluationSetConfig}
"""Settings that hold sections with names of the user's choice → the class of such a section."""


class Setting(NamedTuple):
    """A setting, or a whole section."""

    default: Any
    description: str
    is_section: bool


@cache
def settings() -> dict[str, Setting]:
    """Dotted name → setting, in the order of the classes; a section comes before what it holds.

    Those of ``NAMED`` are there once, with ``NAME`` in place of a name: see ``canonical``.

    >>> settings()["trainer.learning_rate"].default, settings()["trainer"].is_section
    (0.0001, True)
    """
    return dict(_settings_of(Config, ""))


def _settings_of(section: type[Section], prefix: str) -> Iterator[tuple[str, Setting]]:
    for name, field in section.model_fields.items():
        inner = field.annotation
        is_section = isinstance(inner, type) and issubclass(inner, Section)
        default = None if is_section else field.get_default(call_default_factory=True)
        default = "" if field.is_required() else default
        yield prefix + name, Setting(default, field.description or "", is_section)
        if isinstance(inner, type) and issubclass(inner, Section):
            yield from _settings_of(inner, f"{prefix}{name}.")
        if named := NAMED.get(prefix + name):
            yield f"{prefix}{name}.NAME", Setting(None, "", True)
            yield from _settings_of(named, f"{prefix}{name}.NAME.")


def canonical(dotted: str) -> str:
    """A dotted name with ``NAME`` in place of a name of the user's choice.

    >>> canonical("evaluation.sets.gsm8k.samples"), canonical("trainer.tau")
    ('evaluation.sets.NAME.samples', 'trainer.tau')
    """
    for prefix in NAMED:
        if dotted.startswith(f"{prefix}."):
            _, dot, rest = dotted.removeprefix(f"{prefix}.").partition(".")
            return f"{prefix}.NAME{dot}{rest}"
    return dotted


def meant(name: str) -> list[str]:
    """The settings that an unknown name may stand for, the likeliest first; at most 4.

    A section stands for its first setting. Otherwise the name may be short for one (``lr``) or
    misspelt, within the section that was named, or belong to another section.

    >>> meant("model"), meant("trainer.lr"), meant("rollout.budgte")
    (['model.name'], ['trainer.learning_rate'], ['rollout.token_budget'])
    >>> meant("tau"), meant("prompts_per_iteration")
    (['trainer.tau'], ['rollout.prompts_per_iteration'])
    """
    known = [key for key, setting in settings().items() if not setting.is_section]
    prefix = next((f"{one}." for one in NAMED if name.startswith(f"{one}.")), "")
    own_name = name.removeprefix(prefix).partition(".")[0] if prefix else "NAME"
    found = _meant(canonical(name.replace("-", "_").lower()), known)
    return [one.replace(".NAME.", f".{own_name}.") for one in found if prefix or "NAME" not in one]


def _meant(name: str, known: list[str]) -> list[str]:
    if name in settings() and settings()[name].is_section:
        return [next(key for key in known if key.startswith(f"{name}."))]
    section, _, leaf = name.rpartition(".")
    inside = [key for key in known if key.rpartition(".")[0] == section]
    found: list[str] = []
    if section and inside:
        found = _short_as(leaf, inside) or _alike(leaf, inside)
    found = found or _named(leaf, known) or _short_as(leaf, known) or _alike(leaf, known)
    fewest = min((key.count(".") for key in found), default=0)
    return [key for key in found if key.count(".") == fewest or "." in name][:4]


def _named(leaf: str, keys: list[str]) -> list[str]:
    return [key for key in keys if _leaf(key) == leaf]


def _short_as(leaf: str, keys: list[str]) -> list[str]:
    """The keys whose words begin with the letters of ``leaf``: ``lr`` for ``learning_rate``."""
    words = {key: _leaf(key).split("_") for key in keys}
    return [key for key in keys if len(leaf) > 1 and "".join(w[:1] for w in words[key]) == leaf]


def _alike(leaf: str, keys: list[str]) -> list[str]:
    """The keys whose last part is like ``leaf``, or ends with something like it."""

    def likeness(key: str) -> float:
        name = _leaf(key)
        parts = {name, name.rpartition("_")[2]}
        return max(difflib.SequenceMatcher(None, leaf, part).ratio() for part in parts)

    found = sorted(keys, key=likeness, reverse=True)
    best = likeness(found[0]) if found else 0
    return [key for key in found if likeness(key) >= max(LIKE, best - 0.1)]


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]
