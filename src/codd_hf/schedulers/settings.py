"""Everything that shapes what a denoising step draws, checked in one place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..checks.arguments import FACTORS, choice, integer, is_factor, list_of_ids, number

ADAPTIVE = ("threshold", "joint")
"""Strategies that commit as many tokens as are sure enough."""

CHOICES = {
    "strategy": ("low_confidence", "margin", "entropy", "random", "left_to_right", *ADAPTIVE),
    "sampling": ("factorized", "latent", "any_order", "marginal", "viterbi"),
}

LEFT = {"activation_scope": "window", "confidence": "marginal"}
"""Settings of version 0.1 that left, each with the value that is the only one now."""


@dataclass(frozen=True)
class DrawSettings:
    """The fields are [`CoDDScheduler`]'s configuration of the same names.

    Raises:
        ValueError: a value is out of its range, or two of them do not go together.
        TypeError: a number was wanted and something else was given.
    """

    strategy: str
    sampling: str
    temperature: float
    evidence_temperature: float
    top_k: int | None
    top_p: float | None
    threshold: float
    activation_ratio: float
    repetition_penalty: float
    forbidden_token_ids: list[int] | None
    remask_threshold: float | None

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn: what is most probable is taken, and no generator is read."""
        return self.temperature == 0

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            choice(name, getattr(self, name), choices)
        self._check_number(
            "temperature",
            f"0 (the most probable token) or {FACTORS}",
            lambda x: x == 0 or is_factor(x),
        )
        self._check_number(
            "evidence_temperature", f"above 0, {FACTORS} (1 changes nothing)", is_factor
        )
        self._check_number("threshold", "a probability from 0 to 1", lambda x: 0 <= x <= 1)
        self._check_number("repetition_penalty", f"above 0, {FACTORS} (1: off)", is_factor)
        self._check_number(
            "activation_ratio", "from 0 to 1 (1: always apply the circuit)", lambda x: 0 <= x <= 1
        )
        if self.top_p is not None:
            self._check_number("top_p", "above 0 and at most 1 (1: off)", lambda x: 0 < x <= 1)
        if self.top_k is not None:
            self._set("top_k", integer("top_k", self.top_k, least=0))
        if self.remask_threshold is not None:
            self._check_number(
                "remask_threshold", "a probability from 0 (off) to 1", lambda x: 0 <= x <= 1
            )
            if self.remask_threshold > 0 and self.sampling == "factorized":
                raise ValueError(
                    "`remask_threshold` judges tokens by the circuit, which "
                    "`sampling='factorized'` leaves out: use another `sampling`, or 0."
                )
        if self.forbidden_token_ids is not None:
            ids = list_of_ids("forbidden_token_ids", self.forbidden_token_ids)
            self._set("forbidden_token_ids", ids)

    def _check_number(self, name: str, wanted: str, holds: Callable[[float], bool]) -> None:
        self._set(name, number(name, getattr(self, name), wanted, holds))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises a ValueError if a forbidden token is not in a vocabulary of this size."""
        list_of_ids("forbidden_token_ids", self.forbidden_token_ids or [], vocab_size)

    @classmethod
    def resolve(cls, config: Mapping[str, Any], overrides: Mapping[str, Any]) -> DrawSettings:
        """The settings of one call: those given in `overrides`, the others from `config`.

        A configured `remask_threshold` holds for sampling with the circuit; a call that asks for
        factorized sampling alone remasks nothing.

        Args:
            config: a scheduler's configuration.
            overrides: settings by name; None means the configured value.

        Raises:
            TypeError: a name is not a setting.
        """
        names = [field.name for field in fields(cls)]
        unknown = [name for name in overrides if name not in names]
        if unknown:
            raise TypeError(
                f"`{unknown[0]}` is not a setting of the scheduler: use one of {', '.join(names)}."
            )
        given = {name: value for name, value in overrides.items() if value is not None}
        if isinstance(given.get("sampling"), str) and given["sampling"] == "factorized":
            given.setdefault("remask_threshold", 0.0)
        return cls(**{name: given.get(name, config[name]) for name in names})
