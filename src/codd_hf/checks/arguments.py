"""What arguments and settings must be; an error is one sentence that names the argument.

Numbers and ids may be Python's, numpy's or tensors. A bool is no number, and a float is no id.
Checks raise a TypeError for a value of another kind and a ValueError for one out of range.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import torch

BOOL = torch.bool
LARGEST_INTEGER = 2**31 - 1
LARGEST_FACTOR = 1e6
KINDS = {
    int: ("integers", lambda kind: not (kind.is_floating_point or kind.is_complex or kind == BOOL)),
    float: ("floating-point numbers", lambda kind: kind.is_floating_point),
    bool: ("True or False everywhere", lambda kind: kind == BOOL),
}
"""What a tensor may hold, in words, and the dtypes that do."""


def shown(value: Any) -> str:
    """A value as an error message shows it: in one line, and cut where it is long."""
    if isinstance(value, torch.Tensor) and value.ndim:
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


def integer(name: str, value: Any, least: int | None = None, most: int = LARGEST_INTEGER) -> int:
    """The number as Python's `int`, from `least` to `most`."""
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"`{name}` must be an integer, got {shown(value)}.")
    if least is not None and number < least:
        raise ValueError(f"`{name}` must be at least {least}, got {number}.")
    if abs(number) > most:
        raise ValueError(f"`{name}` must be at most {most:,}, got {shown(number)}.")
    return number


def number(name: str, value: Any, wanted: str, holds: Callable[[float], bool]) -> float:
    """The finite number as Python's own; `wanted` says in words what `holds` tests."""
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TypeError(f"`{name}` must be a number {wanted}, got {shown(value)}.")
    if not (abs(number) <= sys.float_info.max and holds(number)):
        raise ValueError(f"`{name}` must be {wanted}, got {shown(number)}.")
    return number


def factor(name: str, value: Any) -> float:
    """A number by which float32 can multiply and divide logits, as Python's own."""
    least, most = 1 / LARGEST_FACTOR, LARGEST_FACTOR
    return number(
        name, value, f"above 0, within {least:g} to {most:g}", lambda x: least <= x <= most
    )


def flag(name: str, value: Any) -> bool:
    """The value as Python's `bool`."""
    if not isinstance(plain(value), bool):
        raise TypeError(f"`{name}` must be True or False, got {shown(value)}.")
    return plain(value)


def choice(name: str, value: Any, choices: Iterable[str | None]) -> None:
    """Raises unless the value is one of the choices."""
    if not (isinstance(value, str | None) and value in (choices := tuple(choices))):
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


def generators(name: str, value: Any, rows: int | None = None) -> None:
    """Raises unless the source of randomness is None, a generator, or a list of one per row."""
    if value is None or isinstance(value, torch.Generator):
        return
    if not isinstance(value, (list, tuple)) or not all(
        isinstance(entry, torch.Generator) for entry in value
    ):
        raise TypeError(
            f"`{name}` must be a torch.Generator or a list with one per row, got {shown(value)}: "
            "of a seed, `torch.Generator().manual_seed(seed)` makes one."
        )
    if rows is not None and len(value) != rows:
        raise ValueError(f"`{name}` must have one entry per row ({rows}), got {len(value)}.")


def per_row(name: str, value: Any, rows: int, check: Callable[[str, Any], Any]) -> list:
    """An entry for each row, checked: those of a list, or one value for all."""
    values = several(value)
    if values is None:
        return [check(name, value)] * rows
    if len(values) != rows:
        raise ValueError(f"`{name}` must have one entry per prompt ({rows}), got {len(values)}.")
    return [check(name, entry) for entry in values]


def token_id(name: str, value: Any, vocab_size: int, what: str = "a token id") -> int:
    """A token of the vocabulary as Python's `int`."""
    token = integer(name, value)
    if not 0 <= token < vocab_size:
        raise ValueError(
            f"`{name}` must be {what} of the vocabulary, 0 to {vocab_size - 1}, got {token}."
        )
    return token


def list_of_ids(name: str, value: Any, vocab_size: int = LARGEST_INTEGER) -> list[int]:
    """Tokens of the vocabulary as a list of Python's `int`."""
    ids = several(value)
    if ids is None:
        raise TypeError(f"`{name}` must be a list of token ids, got {shown(value)}.")
    return [token_id(name, entry, vocab_size, "a list of token ids") for entry in ids]


def end_tokens(name: str, value: Any, vocab_size: int) -> list[int]:
    """The tokens that end a text: one, several or, with None, none."""
    if value is None:
        return []
    return list_of_ids(name, [value] if several(value) is None else value, vocab_size)


def as_tensor(
    name: str,
    value: Any,
    kind: type | None = None,
    shape: Sequence[int] | None = None,
    device: torch.device | None = None,
) -> torch.Tensor:
    """A tensor as it is; an array, or lists of equal lengths, as one on `device`.

    It must hold the `kind`: int (which becomes int64), float or bool; None for anything.
    """
    try:
        if isinstance(value, (list, tuple)):
            if len({isinstance(entry, bool) for entry in value}) > 1:
                raise TypeError
            if any(isinstance(entry, (list, tuple)) or hasattr(entry, "shape") for entry in value):
                value = torch.stack([as_tensor(name, entry, device=device) for entry in value])
        if not isinstance(value, torch.Tensor):
            value = torch.as_tensor(value, device=device)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(
            f"`{name}` must be a tensor, an array, or rows of equal length, got {shown(value)}."
        ) from error
    if kind is int and not value.numel():  # of whatever dtype, as `torch.tensor([[]])`
        value = value.long()
    if kind is not None and not KINDS[kind][1](value.dtype):
        raise TypeError(f"`{name}` must be {KINDS[kind][0]}, got {value.dtype}.")
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
        raise RowError(
            f"`{name}` must hold {what}, 0 to {vocab_size - 1}, got "
            f"{int(ids[outside][0])} in row {{row}}.",
            row,
        )


def rows_of_ids(name: str, value: Any, vocab_size: int) -> list[torch.Tensor]:
    """Rows of tokens of the vocabulary, of any lengths, `[length]` int64 each."""
    rows = several(value)
    if rows is None:
        raise TypeError(f"`{name}` must hold rows of token ids, got {shown(value)}.")
    found = [as_tensor(name, row, int) for row in rows]
    for number, ids in enumerate(found):
        if ids.ndim != 1:
            raise ValueError(
                f"`{name}` must be one- or two-dimensional, rows of token ids, got "
                f"{shown(rows[number])} as row {number}."
            )
        with numbered([number]):
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
    name: str, value: Any, shape: tuple[int, ...], device: torch.device | None = None
) -> torch.Tensor:
    """A mask of tokens, 1 where they are real and 0 at padding, as int64."""
    mask = as_tensor(name, value, device=device)
    if tuple(mask.shape) != tuple(shape):
        raise ValueError(
            f"`{name}` must have the shape of `input_ids`, {tuple(shape)}, got {tuple(mask.shape)}."
        )
    if bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError(f"`{name}` must be 1 at real tokens and 0 at padding, got other values.")
    return mask.long()


def check_token_types(value: Any, input_ids: torch.Tensor) -> None:
    """Raises unless `token_type_ids` of a tokenizer, if there are any, are 0 everywhere."""
    if value is not None and as_tensor("token_type_ids", value, int, input_ids.shape).any():
        raise ValueError(
            "`token_type_ids` must be 0 everywhere, got others: a denoised text has one type of "
            "tokens."
        )
