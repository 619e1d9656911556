"""Everything that shapes what a denoising step draws, defined in one place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

from ..checks.arguments import (
    FACTORS,
    check_known,
    choice,
    integer,
    is_factor,
    list_of_ids,
    number,
)
from .strategies import STRATEGIES

SAMPLING = ("factorized", "latent", "any_order", "marginal", "viterbi")
"""The ways to draw a token; the table at [`CoDDScheduler`] says what each draws from."""

ADAPTIVE = tuple(name for name, strategy in STRATEGIES.items() if strategy.goes_on)
"""Strategies that commit as many tokens as are sure enough."""

LEFT = {"activation_scope": "window", "confidence": "marginal"}
"""Settings of version 0.1 that left, each with the value that is the only one now."""

Check = Callable[[str, Any], Any]


def _one_of(choices: Iterable[str]) -> Check:
    def check(name: str, value: Any) -> str:
        choice(name, value, choices)
        return value

    return check


def _number(wanted: str, holds: Callable[[float], bool]) -> Check:
    return lambda name, value: number(name, value, wanted, holds)


def _documented(check: Check, meaning: str) -> dict[str, Any]:
    return {"check": check, "help": meaning}


@dataclass(frozen=True)
class DrawSettings:
    """The settings of a draw.

    The fields are [`CoDDScheduler`]'s configuration, entries of a generation configuration,
    keyword arguments of the pipeline and of `generate`, and flags of the command line. The call
    counts first, then the generation configuration or the scheduler.

    Raises:
        ValueError: a value is out of its range, or two of them do not go together.
        TypeError: a value is of another kind.
    """

    strategy: str = field(
        default="low_confidence",
        metadata=_documented(
            _one_of(STRATEGIES),
            "which positions a step commits first: the most probable candidates (low_confidence), "
            "those furthest ahead of the second (margin), of least entropy (entropy), at random "
            "(random), or left_to_right; threshold and joint commit all that are sure enough",
        ),
    )
    sampling: str = field(
        default="latent",
        metadata=_documented(
            _one_of(SAMPLING), f"what a token is drawn from: {', '.join(SAMPLING)}"
        ),
    )
    temperature: float = field(
        default=0.0,
        metadata=_documented(
            _number(f"0 (the most probable token) or {FACTORS}", lambda x: x == 0 or is_factor(x)),
            "of the final draw; 0 takes the most probable token and draws nothing in any mode",
        ),
    )
    evidence_temperature: float | None = field(
        default=None,
        metadata=_documented(
            _number(f"above 0, {FACTORS} (1 changes nothing)", is_factor),
            "divides the backbone's logits before the circuit sees them (the paper's tau); "
            "default: the temperature that the head was fitted for",
        ),
    )
    top_k: int | None = field(
        default=None,
        metadata=_documented(
            partial(integer, least=0),
            "draw from so many of the most probable tokens; 0: from all",
        ),
    )
    top_p: float | None = field(
        default=None,
        metadata=_documented(
            _number("above 0 and at most 1 (1: off)", lambda x: 0 < x <= 1),
            "draw from the fewest tokens whose probabilities reach it; 1: from all",
        ),
    )
    threshold: float = field(
        default=0.9,
        metadata=_documented(
            _number("a probability from 0 to 1", lambda x: 0 <= x <= 1),
            "least probability of a token (strategy threshold), or of all tokens of a step "
            "together (strategy joint)",
        ),
    )
    activation_ratio: float = field(
        default=1.0,
        metadata=_documented(
            _number("from 0 to 1 (1: always apply the circuit)", lambda x: 0 <= x <= 1),
            "largest share of masks in a window under which the circuit is applied (the paper's "
            "gamma); 1: always",
        ),
    )
    repetition_penalty: float = field(
        default=1.0,
        metadata=_documented(
            _number(f"above 0, {FACTORS} (1: off)", is_factor),
            "above 1: tokens of the prompt and of the text so far become less probable",
        ),
    )
    forbidden_token_ids: list[int] | None = field(
        default=None,
        metadata=_documented(
            list_of_ids, "tokens that are never drawn, beside those that the model forbids"
        ),
    )
    remask_threshold: float | None = field(
        default=None,
        metadata=_documented(
            _number("a probability from 0 (off) to 1", lambda x: 0 <= x <= 1),
            "tokens of the present block less probable than this given all others are masked "
            "again; 0: none",
        ),
    )

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            if value is not None or setting.default is not None:
                value = setting.metadata["check"](setting.name, value)
                object.__setattr__(self, setting.name, value)
        if self.remask_threshold and self.sampling == "factorized":
            raise ValueError(
                "`remask_threshold` judges tokens by the circuit, which `sampling='factorized'` "
                "leaves out: use another `sampling`, or 0."
            )

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable is taken, and no generator read."""
        return self.temperature == 0

    @property
    def log_threshold(self) -> float:
        """The logarithm of the threshold, -inf at 0."""
        return math.log(self.threshold) if self.threshold else -math.inf

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises a ValueError if a forbidden token is not in a vocabulary of this size."""
        list_of_ids("forbidden_token_ids", self.forbidden_token_ids or [], vocab_size)

    @classmethod
    def resolve(cls, config: Mapping[str, Any], overrides: Mapping[str, Any]) -> DrawSettings:
        """The settings of one call.

        A call that asks for factorized sampling alone remasks nothing.

        Args:
            config: a scheduler's configuration.
            overrides: what the call says; None means the configured value.

        Raises:
            TypeError: a name is not a setting.
        """
        names = [setting.name for setting in fields(cls)]
        check_known(overrides, names, "a setting of the scheduler")
        said = {name: value for name, value in overrides.items() if value is not None}
        if isinstance(said.get("sampling"), str) and said["sampling"] == "factorized":
            said.setdefault("remask_threshold", 0.0)
        return cls(**{name: said.get(name, config[name]) for name in names})
