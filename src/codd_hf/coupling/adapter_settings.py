"""Which adapters a CoDD model takes: LoRA on its backbone, in the kinds that are saved faithfully.

The same rules hold for an adapter that is made (a `peft.LoraConfig`) and for one that is loaded (an
`adapter_config.json`). Of a file, PEFT gets nothing but values of the fields that are listed here,
and no regular expression: a pattern can take for ever, and other fields name modules to import.
"""

from __future__ import annotations

import math
import re
from numbers import Integral, Real
from typing import Any

CHANGING_STARTS = ("pissa", "olora")
"""Values of `init_lora_weights` that take the adapter's first value off the backbone's weights."""

PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the backbone's weights as they are."""

STARTS = (*PLAIN_STARTS, *CHANGING_STARTS)

WITHOUT_EFFECT = (
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "task_type",
)
"""Fields that change no number once the kind of adapter is known."""

UNUSED = {"megatron_core": "megatron.core", "qalora_group_size": 16}
"""What fields of other methods hold, where it is not None, False or empty, if they are not used."""

A_NAME = re.compile(r"\^?[\w.-]+")


def check_adapter_settings(values: dict[str, Any], stored: bool = False) -> dict[str, Any]:
    """Refuses an adapter that could not be saved, or loaded safely.

    Args:
        values: the fields of PEFT's configuration.
        stored: whether they come from a file, which may give names of modules and no patterns but,
            as `target_modules` and `exclude_modules`, a string, which is not used.

    Returns:
        The fields that have an effect.

    Raises:
        ValueError: a field or a value is not supported; the message names it.
    """
    kind = values.get("peft_type")
    if (kind := str(getattr(kind, "value", kind))) != "LORA":
        raise ValueError(
            f"`peft_type` must be 'LORA' for the adapter of a CoDD model, got {kind!r}: use a "
            "`peft.LoraConfig` on the backbone."
        )
    start = values.get("init_lora_weights", True)
    if not any(start is s or (isinstance(start, str) and start == s) for s in STARTS):
        raise _refused("init_lora_weights", start, f"one of {STARTS}")
    used = {}
    for name, value in values.items():
        if name in WITHOUT_EFFECT:
            continue
        if name not in RULES:
            if value not in (None, False, UNUSED.get(name)) and value != [] and value != {}:
                raise ValueError(
                    f"`{name}` cannot be used in the adapter of a CoDD model, got {value!r:.80}: "
                    "leave it out."
                )
            continue
        rule, wanted = RULES[name]
        if not rule(value):
            raise _refused(name, value, wanted)
        used[name] = value
    for name in NAMES if stored else ():
        given = used.get(name) or ()
        if isinstance(given, str):
            if name in PATTERNS:
                continue
            given = (given,)
        for part in given:
            if not A_NAME.fullmatch(part):
                raise _refused(name, part, "of names of modules, without patterns, in a file")
    return used


def _refused(name: str, value: Any, wanted: str) -> ValueError:
    return ValueError(f"`{name}` of an adapter must be {wanted}, got {value!r:.80}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_rank(value: Any) -> bool:
    return _is_index(value) and value > 0


def _are_names(value: Any) -> bool:
    return isinstance(value, list | set | tuple) and all(isinstance(v, str) for v in value)


def _is_index(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


FLAG = (lambda v: isinstance(v, bool), "True or False")
RULES = {
    "r": (_is_rank, "a positive integer"),
    "lora_alpha": (_is_number, "a number"),
    "lora_dropout": (lambda v: _is_number(v) and 0 <= v < 1, "a number from 0 to below 1"),
    "use_rslora": FLAG,
    "use_dora": FLAG,
    "lora_bias": FLAG,
    "fan_in_fan_out": FLAG,
    "bias": (
        lambda v: v == "none",
        "'none', since the backbone's biases are not the adapter's to hold",
    ),
    "init_lora_weights": (lambda v: True, ""),
    "target_modules": (lambda v: v is None or isinstance(v, str) or _are_names(v), "names"),
    "exclude_modules": (lambda v: v is None or isinstance(v, str) or _are_names(v), "names"),
    "modules_to_save": (lambda v: v is None or _are_names(v), "a list of names"),
    "layers_to_transform": (
        lambda v: v is None or _is_index(v) or (isinstance(v, list) and all(map(_is_index, v))),
        "an integer or a list of integers",
    ),
    "layers_pattern": (lambda v: v is None or isinstance(v, str) or _are_names(v), "names"),
    "rank_pattern": (
        lambda v: (
            v is None
            or (isinstance(v, dict) and _are_names([*v]) and all(map(_is_rank, v.values())))
        ),
        "a dict of positive integers",
    ),
    "alpha_pattern": (
        lambda v: (
            v is None
            or (isinstance(v, dict) and _are_names([*v]) and all(map(_is_number, v.values())))
        ),
        "a dict of numbers",
    ),
}
"""Of every field that has an effect: what it may be, as a function and in words."""

PATTERNS = ("target_modules", "exclude_modules")
NAMES = (*PATTERNS, "modules_to_save", "layers_pattern", "rank_pattern", "alpha_pattern")
