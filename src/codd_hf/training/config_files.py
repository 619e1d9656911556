"""Settings by dotted names (`conditional.learning_rate`), as text, and as YAML."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
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
    """The value of a setting that the command line gives as text.

    Raises:
        ValueError: there is no such setting, or the text is no value.
    """
    settings = dict(named_settings())
    _check_known([name], settings)
    if settings[name].kind is str and text != "null":
        return text
    return _parsed(text, f"`{name}`")


def read_config(path: str | Path) -> dict[str, Any]:
    """The settings in a YAML file, by dotted names; None where a required one is left open.

    Raises:
        OSError: there is no such file.
        ValueError: it is no mapping of settings.
    """
    content = _parsed(Path(path).read_text(encoding="utf-8"), repr(str(path)))
    if not isinstance(content, Mapping):
        raise ValueError(f"{str(path)!r} must hold settings, as `--print-config` writes.")
    values = {}
    for name, value in content.items():
        part = settings_of(TrainConfig).get(name)
        nested = part is not None and is_dataclass(part.kind) and isinstance(value, Mapping)
        values |= {f"{name}.{k}": v for k, v in value.items()} if nested else {str(name): value}
    _check_known(values, dict(named_settings()))
    return values


def build_config(values: Mapping[str, Any]) -> TrainConfig:
    """The settings with these values by dotted names, and defaults for the others.

    Raises:
        ValueError: a required one is missing, or a value is not possible.
    """
    top: dict[str, Any] = {}
    parts: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        stage, _, rest = name.rpartition(".")
        (parts.setdefault(stage, {}) if stage else top)[rest] = value
    settings = settings_of(TrainConfig)
    missing = [n for n, s in settings.items() if s.default is MISSING and top.get(n) is None]
    if missing:
        raise ValueError(f"`{'` and `'.join(missing)}` must be given.")
    for stage, part in parts.items():
        try:
            top[stage] = settings[stage].kind(**part)
        except ValueError as error:
            raise ValueError(f"In `{stage}`: {error}") from error
    return TrainConfig(**top)


def config_text(values: Mapping[str, Any]) -> str:
    """All settings as YAML, with these values by dotted names.

    Raises:
        ValueError: a value is not possible.
    """
    left_open = {name: None for name in ("dataset", "output_dir") if values.get(name) is None}
    config = build_config({**values, **dict.fromkeys(left_open, "")})
    return yaml.safe_dump(asdict(config) | left_open, sort_keys=False)


def _check_known(names: Iterable[str], settings: Mapping[str, Setting]) -> None:
    for name in names:
        if name not in settings:
            close = get_close_matches(name, settings, cutoff=0.5)
            hint = f": did you mean {' or '.join(close)}?" if close else "."
            raise ValueError(f"There is no setting {name!r}{hint}")


def _parsed(text: str, what: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{what} is no YAML: {' '.join(str(error).split())}.") from error
