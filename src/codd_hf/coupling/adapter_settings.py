"""Which adapters a CoDD model takes: LoRA on its backbone, in the kinds that are saved faithfully.

The same rules hold for an adapter that is made (a `peft.LoraConfig`) and for one that is loaded (an
`adapter_config.json`). Of a file, PEFT gets nothing but values of the fields that are listed here,
and no regular expression: a pattern can take for ever, and other fields name modules to import.
"""

from __future__ import annotations

import math
import re
from typing import Any

from huggingface_hub.dataclasses import type_validator
from peft import LoraConfig

CHANGING_STARTS = ("pissa", "olora")
"""Values of `init_lora_weights` that take the adapter's first value off the backbone's weights."""
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
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

Names = list[str] | set[str] | tuple[str, ...] | None
TYPES = {
    "r": int,
    "lora_alpha": int | float,
    "lora_dropout": int | float,
    "use_rslora": bool,
    "use_dora": bool,
    "lora_bias": bool,
    "fan_in_fan_out": bool,
    "bias": str,
    "init_lora_weights": bool | str,
    "target_modules": Names | str,
    "exclude_modules": Names | str,
    "modules_to_save": Names,
    "layers_to_transform": int | list[int] | None,
    "layers_pattern": Names | str,
    "rank_pattern": dict[str, int] | None,
    "alpha_pattern": dict[str, int | float] | None,
}
"""The fields that have an effect."""
RANGES = {
    "r": (lambda rank: rank > 0, "positive"),
    "rank_pattern": (lambda ranks: all(r > 0 for r in (ranks or {}).values()), "of positive ranks"),
    "lora_alpha": (math.isfinite, "finite"),
    "alpha_pattern": (lambda alphas: all(map(math.isfinite, (alphas or {}).values())), "finite"),
    "lora_dropout": (lambda share: 0 <= share < 1, "from 0 to below 1"),
    "bias": (lambda bias: bias == "none", "'none': the backbone's biases are not the adapter's"),
    "init_lora_weights": (lambda start: start in STARTS, f"one of {STARTS}"),
}
"""Values that a field may have, as a function and in words."""
PATTERNS = ("target_modules", "exclude_modules")
NAMES = (*PATTERNS, "modules_to_save", "layers_pattern", "rank_pattern", "alpha_pattern")
A_NAME = re.compile(r"\^?[\w.-]+")
DEFAULTS = LoraConfig().to_dict()


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
    used = {name: value for name, value in values.items() if name in TYPES}
    for name, value in values.items():
        unused = value in (None, False, DEFAULTS.get(name)) or value in ([], {})
        if name not in TYPES and name not in WITHOUT_EFFECT and not unused:
            raise ValueError(
                f"`{name}` cannot be used in the adapter of a CoDD model, got {value!r:.80}: leave "
                "it out."
            )
    for name, value in used.items():
        try:
            type_validator(name, value, TYPES[name])
        except TypeError:
            raise _refused(name, value, f"of type {TYPES[name]}") from None
        holds, wanted = RANGES.get(name, (None, ""))
        if holds is not None and not holds(value):
            raise _refused(name, value, wanted)
    for name in NAMES if stored else ():
        names = used.get(name) or ()
        if isinstance(names, str):
            names = () if name in PATTERNS else (names,)
        for part in names:
            if not A_NAME.fullmatch(part):
                raise _refused(name, part, "of names of modules, without patterns, in a file")
    return used


def _refused(name: str, value: Any, wanted: str) -> ValueError:
    return ValueError(f"`{name}` of an adapter must be {wanted}, got {value!r:.80}.")
