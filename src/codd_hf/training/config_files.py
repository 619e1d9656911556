"""Settings by dotted names (`conditional.learning_rate`), as text, and as YAML."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from ..checks.settings import Setting, settings_of
from .settings import TrainConfig


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes `3e-3` for a text; here it is a number, as in YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def named_settings(kind: type = TrainConfig, prefix: str = "") -> Iterator[tuple[str, Setting]]:
    """All settings of a settings class, those of its parts with dotted names."""
    for name, setting in settings_of(kind).items():
        if is_dataclass(setting.kind):
            yield from named_settings(setting.kind, f"{prefix}{name}.")
        else:
            yield prefix + name, setting


def from_text(name: str, text: str) -> Any:
    """The value of a setting that the command line gives as text."""
    if _named(name).kind is str and text != "null":
        return text
    return _parsed(text, f"`{name}`")


def read_config(path: str | Path) -> dict[str, Any]:
    """The settings in a YAML file, by dotted names; None where a required one is left open."""
    content = _parsed(Path(path).read_text(encoding="utf-8"), repr(str(path)))
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} must hold settings, as `--print-config` writes.")
    parts = {name: value for name, value in content.items() if isinstance(value, dict)}
    values = {str(name): value for name, value in content.items() if name not in parts}
    return values | {f"{name}.{k}": v for name, part in parts.items() for k, v in part.items()}


def build_config(values: Mapping[str, Any]) -> TrainConfig:
    """The settings with these values by dotted names, and defaults for the others.

    Raises:
        ValueError: there is no such setting, a required one is missing, or a value is not possible.
    """
    parts: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        _named(name)
        part, _, field = name.rpartition(".")
        parts.setdefault(part, {})[field] = value
    top, settings = parts.pop("", {}), settings_of(TrainConfig)
    missing = [n for n, s in settings.items() if s.default is MISSING and top.get(n) is None]
    if missing:
        raise ValueError(f"`{'` and `'.join(missing)}` must be given.")
    for stage, fields in parts.items():
        try:
            top[stage] = settings[stage].kind(**fields)
        except ValueError as error:
            raise ValueError(f"In `{stage}`: {error}") from error
    return TrainConfig(**top)


def config_text(values: Mapping[str, Any]) -> str:
    """All settings as YAML, with these values by dotted names."""
    left_open = {name: None for name in ("dataset", "output_dir") if values.get(name) is None}
    config = build_config({**values, **dict.fromkeys(left_open, "")})
    return yaml.safe_dump(asdict(config) | left_open, sort_keys=False)


def _named(name: str) -> Setting:
    known = dict(named_settings())
    if name not in known:
        close = get_close_matches(name, known, cutoff=0.5)
        hint = f": did you mean {' or '.join(close)}?" if close else "."
        raise ValueError(f"There is no setting {name!r}{hint}")
    return known[name]


def _parsed(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is no YAML: {' '.join(str(error).split())}.") from error
