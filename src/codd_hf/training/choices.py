"""Settings that are one of a few words."""

from __future__ import annotations

LOSSES = ("elbo", "token")
PRECISIONS = ("auto", "no", "bf16")


def check_one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raises unless a setting has one of the values that are known.

    Raises:
        ValueError: it has another; the message names the setting and the values.
    """
    if value not in known:
        choices = " or ".join(repr(choice) for choice in known)
        raise ValueError(f"`{name}` must be {choices}, got {value!r}.")
