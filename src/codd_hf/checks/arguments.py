"""Arguments that callers give: each check raises one sentence that names the argument.

Numbers and ids may be Python's, numpy's or tensors. A bool is no number, and a float is no id.
A value of another kind is a TypeError, one out of range a ValueError. Nothing here imports torch
at once: the help of the command line uses it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

LARGEST_INTEGER = 2**31 - 1
LARGEST_FACTOR = 1e6
KINDS = {int: "integers", float: "floating-point numbers", bool: "True or False everywhere"}


def shown(value: Any) -> str:
    """A value as an error message shows it: in one line, and cut where it is long."""
    if getattr(value, "shape", ()) and hasattr(value, "dtype"):
        return f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


class RowError(ValueError):
    """A refusal of one row of a batch; `{row}` in the message stands for its number, from 0."""

    def __init__(self, message: str, row: int) -> None:
        super().__init__(message.format(row=row))
        self.message, self.row = message, row


@contextmanager
def numbered(rows: Sequence[int] | torch.Tensor) -> Iterator[None]:
    """Inside, rows are some of a larger batch, `rows` `[n]`: errors give their numbers there."""
    try:
        yield
    except RowError as error:
        raise RowError(error.message, int(rows[error.row])) from None


def plain(value: Any) -> Any:
    """Numbers of numpy and tensors, also in lists, as Python's own."""
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    return value.tolist() if hasattr(value, "tolist") else value


def several(value: Any) -> list | None:
    """The entries of a list, a tuple, an array or a tensor; None of anything else."""
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return list(value)
    return list(value) if getattr(value, "ndim", 0) else None


def number(
    name: str,
    value: Any,
    least: float = -sys.float_info.max,
    most: float = sys.float_info.max,
    kind: type[float] = float,
) -> Any:
    """The number from `least` to `most` as Python's own."""
    found = plain(value)
    if isinstance(found, bool) or not isinstance(found, (int, kind)):
        wanted = "an integer" if kind is int else "a number"
        raise TypeError(f"`{name}` must be {wanted}, got {shown(value)}.")
    if not abs(found) <= sys.float_info.max:
        raise ValueError(f"`{name}` must be a finite number, got {shown(found)}.")
    if found < least:
        raise ValueError(f"`{name}` must be at least {least:,}, got {shown(found)}.")
    if found > most:
        raise ValueError(f"`{name}` must be at most {most:,}, got {shown(found)}.")
    return found


def integer(
    name: str, value: Any, least: int = -LARGEST_INTEGER, most: int = LARGEST_INTEGER
) -> int:
    """The integer from `least` to `most` as Python's own."""
    return number(name, value, least, most, int)


def factor(name: str, value: Any) -> float:
    """A number by which float32 can multiply and divide logits."""
    return number(name, value, 1 / LARGEST_FACTOR, LARGEST_FACTOR)


def flag(name: str, value: Any) -> bool:
    """The value as Python's `bool`."""
    if not isinstance(plain(value), bool):
        raise TypeError(f"`{name}` must be True or False, got {shown(value)}.")
    return plain(value)


def choice(name: str, value: Any, choices: Sequence[str | bool | None]) -> None:
    """Raises unless the value is one of the choices."""
    if not (isinstance(value, str | bool | None) and value in choices):
        names = ", ".join(map(str, choices))
        raise ValueError(f"`{name}` must be one of {names}, got {shown(value)}.")


def check_known(names: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raises a TypeError for a name that is not known, with those that are spelt alike."""
    known = list(known)
    for name in names:
        if name not in known:
            near = get_close_matches(str(name), known, cutoff=0.5) or known
            raise TypeError(f"`{name}` is not {what}: use one of {', '.join(near)}.")


def check_callable(name: str, value: Any, what: str) -> None:
    """Raises unless the value is None or can be called; `what` says what it must be."""
    if value is not None and not callable(value):
        raise TypeError(f"`{name}` must be {what}, got {shown(value)}.")


def without_left_fields(
    saved: Mapping[str, Any], left: Mapping[str, Any], what: str
) -> dict[str, Any]:
    """Fields that an earlier version saved, without those that left.

    Raises:
        ValueError: one of these has another value than `left` gives, which changes nothing.
    """
    for name, default in left.items():
        if saved.get(name, default) != default:
            raise ValueError(
                f"`{name}={shown(saved[name])}` in {what} is no longer supported: remove it, or "
                f"use codd-hf 0.1."
            )
    return {name: value for name, value in saved.items() if name not in left}


def generators(name: str, value: Any, rows: int) -> None:
    """Raises unless the source of randomness is None, a generator, or a list of one per row."""
    from torch import Generator

    if value is None or isinstance(value, Generator):
        return
    if not (isinstance(value, (list, tuple)) and all(isinstance(v, Generator) for v in value)):
        raise TypeError(
            f"`{name}` must be a torch.Generator or a list with one per row, got {shown(value)}: "
            "of a seed, `torch.Generator().manual_seed(seed)` makes one."
        )
    if len(value) != rows:
        raise ValueError(f"`{name}` must have one entry per row ({rows}), got {len(value)}.")


def token_id(name: str, value: Any, vocab_size: int) -> int:
    """A token of the vocabulary as Python's `int`."""
    return integer(name, value, 0, vocab_size - 1)


def list_of_ids(name: str, value: Any, vocab_size: int = LARGEST_INTEGER) -> list[int]:
    """Tokens of the vocabulary: one, several or, with None, none."""
    ids = [] if value is None else several(value)
    return [token_id(name, entry, vocab_size) for entry in ([value] if ids is None else ids)]


def as_tensor(
    name: str,
    value: Any,
    kind: type | None = None,
    shape: Sequence[int] | None = None,
    device: torch.device | None = None,
) -> torch.Tensor:
    """A tensor of a kind (int becomes int64) as it is; arrays and lists of equal lengths as one."""
    import torch

    if not isinstance(value, torch.Tensor):
        try:
            value = torch.as_tensor(plain(value) if several(value) else value, device=device)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise TypeError(
                f"`{name}` must be a tensor, an array, or rows of equal length, got {shown(value)}."
            ) from error
    if kind is int and not value.numel():  # of whatever dtype, as `torch.tensor([[]])`
        value = value.long()
    is_bool, is_real = value.dtype == torch.bool, not value.is_complex()
    found = float if value.is_floating_point() else bool if is_bool else int if is_real else None
    if kind not in (None, found):
        raise TypeError(f"`{name}` must be {KINDS[kind]}, got {value.dtype}.")
    if shape is not None and tuple(value.shape) != tuple(shape):
        raise ValueError(f"`{name}` must have shape {tuple(shape)}, got {tuple(value.shape)}.")
    return value.long() if kind is int else value


def token_ids(
    name: str, value: Any, vocab_size: int, device: torch.device | None = None
) -> torch.Tensor:
    """Rows of tokens of the vocabulary, `[batch, length]` int64, at least one row."""
    ids = as_tensor(name, value, int, device=device)
    if ids.ndim != 2:
        raise ValueError(f"`{name}` must have shape [batch, length], got {tuple(ids.shape)}.")
    if len(ids) == 0:
        raise ValueError(f"`{name}` must hold at least one row, got none.")
    check_tokens(name, ids, vocab_size)
    return ids


def check_tokens(
    name: str, ids: torch.Tensor, vocab_size: int, what: str = "ids of the vocabulary"
) -> None:
    """Raises a RowError unless all `ids` `[..., rows, length]` are tokens of the vocabulary."""
    outside = (ids < 0) | (ids >= vocab_size)
    if bool(outside.any()):
        row = int(outside.nonzero()[0, -2]) if ids.ndim > 1 else 0
        found = f"{int(ids[outside][0])} in row {{row}}."
        raise RowError(f"`{name}` must hold {what}, 0 to {vocab_size - 1}, got {found}", row)


def rows_of_ids(name: str, value: Any, vocab_size: int) -> list[torch.Tensor]:
    """Rows of tokens of the vocabulary, of any lengths, `[length]` int64 each."""
    rows = several(value)
    if rows is None:
        raise TypeError(f"`{name}` must hold rows of token ids, got {shown(value)}.")
    found = [as_tensor(name, row, int) for row in rows]
    for row, ids in enumerate(found):
        if ids.ndim != 1:
            raise ValueError(f"`{name}` must hold rows of token ids, got {shown(rows[row])}.")
        with numbered([row]):
            check_tokens(name, ids[None], vocab_size)
    return found


def check_unmasked(name: str, rows: Iterable[torch.Tensor], mask_token_id: int | None) -> None:
    """Raises if one of the rows of tokens holds the mask token."""
    for number, row in enumerate(rows):
        if mask_token_id is not None and bool((row == mask_token_id).any()):
            raise ValueError(
                f"`{name}` must not hold the mask token ({mask_token_id}), got it in row {number}: "
                "leave it out; text with gaps is filled in with `infill=True`."
            )


def padding_mask(
    name: str, value: Any, shape: Sequence[int], device: torch.device | None = None
) -> torch.Tensor:
    """A mask of tokens, 1 where they are real and 0 at padding, as int64."""
    mask = as_tensor(name, value, shape=shape, device=device)
    if bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError(f"`{name}` must be 1 at real tokens and 0 at padding, got other values.")
    return mask.long()
