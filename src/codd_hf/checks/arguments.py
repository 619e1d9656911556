"""What arguments of public functions must be; an error is one sentence that names the argument.

Numbers and ids may be Python's, numpy's or tensors. A bool is no number, and a float is no id.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

LARGEST_INTEGER = 2**31 - 1
LARGEST_FLOAT = sys.float_info.max
LARGEST_FACTOR = 1e6
FACTORS = f"within {1 / LARGEST_FACTOR:g} to {LARGEST_FACTOR:g}"


def shown(value: Any) -> str:
    """A value as an error message shows it: in one line, and cut where it is long."""
    if isinstance(value, torch.Tensor) and value.ndim:
        return f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


class RowError(ValueError):
    """A refusal that concerns one row of a batch.

    Args:
        message: what is wrong, with `{row}` where the row's number stands.
        row: its number, from 0.
    """

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


def scalar(value: Any) -> Any:
    """Numbers of numpy, and of tensors without dimensions, as Python's own."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return value.item()
    return value


def plain(value: Any) -> Any:
    """Numbers of numpy and tensors, also in lists, as Python's own."""
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    return value.tolist() if hasattr(value, "tolist") else value


def integer(name: str, value: Any, least: int | None = None, most: int = LARGEST_INTEGER) -> int:
    """The number as Python's `int`.

    Raises:
        TypeError: it is no integer.
        ValueError: it is out of range.
    """
    number = scalar(value)
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"`{name}` must be an integer, got {shown(value)}.")
    if least is not None and number < least:
        raise ValueError(f"`{name}` must be at least {least}, got {number}.")
    if abs(number) > most:
        raise ValueError(f"`{name}` must be at most {most:,}, got {shown(number)}.")
    return number


def number(name: str, value: Any, wanted: str, holds: Callable[[float], bool]) -> float:
    """The number as Python's `int` or `float`.

    Args:
        name: of the argument.
        value: of the argument.
        wanted: what it must be, in words.
        holds: whether a finite number is that.

    Raises:
        TypeError: it is no number.
        ValueError: it is not finite, or not what is wanted.
    """
    plain = scalar(value)
    if isinstance(plain, bool) or not isinstance(plain, (int, float)):
        raise TypeError(f"`{name}` must be a number {wanted}, got {shown(value)}.")
    if not (abs(plain) <= LARGEST_FLOAT and holds(plain)):
        raise ValueError(f"`{name}` must be {wanted}, got {shown(plain)}.")
    return plain


def is_factor(value: float) -> bool:
    """Whether float32 can multiply and divide logits by it: `FACTORS` in words."""
    return 1 / LARGEST_FACTOR <= value <= LARGEST_FACTOR


def flag(name: str, value: Any) -> bool:
    """The value as Python's `bool`.

    Raises:
        TypeError: it is neither True nor False.
    """
    plain = scalar(value)
    if not isinstance(plain, bool):
        raise TypeError(f"`{name}` must be True or False, got {shown(value)}.")
    return plain


def choice(name: str, value: Any, choices: Sequence[str | None]) -> None:
    """Raises a ValueError unless the value is one of the choices."""
    if not any(value is known or (isinstance(value, str) and value == known) for known in choices):
        names = ", ".join(str(known) for known in choices)
        raise ValueError(f"`{name}` must be one of {names}, got {shown(value)}.")


def check_callable(name: str, value: Any, what: str) -> None:
    """Raises a TypeError for what cannot be called; `what` says what it must be."""
    if value is not None and not callable(value):
        raise TypeError(f"`{name}` must be {what}, got {shown(value)}.")


def several(value: Any) -> list | None:
    """The entries of a list, a tuple, an array or a tensor; None of anything else."""
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return list(value)
    return list(value) if getattr(value, "ndim", 0) else None


def per_row(name: str, value: Any, rows: int, check: Callable[[str, Any], Any]) -> list:
    """An entry for each row: those of a list, or one value for all.

    Raises:
        ValueError: a list has another length; or what `check` raises.
    """
    values = several(value)
    if values is None:
        return [check(name, value)] * rows
    if len(values) != rows:
        raise ValueError(f"`{name}` must have one entry per prompt ({rows}), got {len(values)}.")
    return [check(name, entry) for entry in values]


def token_id(name: str, value: Any, vocab_size: int) -> int:
    """A token of the vocabulary as Python's `int`.

    Raises:
        TypeError: it is no integer.
        ValueError: there is no such token.
    """
    token = integer(name, value)
    if not 0 <= token < vocab_size:
        raise ValueError(
            f"`{name}` must be a token id of the vocabulary, 0 to {vocab_size - 1}, got {token}."
        )
    return token


def list_of_ids(name: str, value: Any, vocab_size: int = LARGEST_INTEGER) -> list[int]:
    """Tokens of the vocabulary as a list of Python's `int`.

    Raises:
        TypeError: it is no list, or no list of integers.
        ValueError: there is no such token.
    """
    ids = several(value)
    if ids is None:
        raise TypeError(f"`{name}` must be a list of token ids, got {shown(value)}.")
    tokens = [integer(name, entry) for entry in ids]
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"`{name}` must be a list of token ids from 0 to {vocab_size - 1}, got {token}."
            )
    return tokens


def end_tokens(name: str, value: Any, vocab_size: int) -> list[int]:
    """The tokens that end a text: one, several or, with None, none."""
    if value is None:
        return []
    return list_of_ids(name, [value] if several(value) is None else value, vocab_size)


def as_tensor(name: str, value: Any, device: torch.device | None = None) -> torch.Tensor:
    """A tensor as it is; arrays and nested lists as one.

    Raises:
        TypeError: it is none of these, or its rows have different lengths.
    """
    if isinstance(value, torch.Tensor):
        return value
    try:
        if isinstance(value, (list, tuple)):
            if any(isinstance(entry, bool) for entry in value) and not all(
                isinstance(entry, bool) for entry in value
            ):
                raise TypeError
            if any(isinstance(entry, (list, tuple)) or hasattr(entry, "shape") for entry in value):
                return torch.stack([as_tensor(name, entry, device) for entry in value])
        return torch.as_tensor(value, device=device)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(
            f"`{name}` must be a tensor, an array, or rows of equal length, got {shown(value)}."
        ) from error


def integers(name: str, value: Any, device: torch.device | None = None) -> torch.Tensor:
    """Whole numbers as an int64 tensor.

    Raises:
        TypeError: they are floats, bools or nothing of the kind.
    """
    tensor = as_tensor(name, value, device)
    if tensor.numel() == 0:  # of whatever dtype, as `torch.tensor([[]])`
        return tensor.long()
    if tensor.dtype == torch.bool or tensor.is_floating_point() or tensor.is_complex():
        raise TypeError(f"`{name}` must be integers, got {tensor.dtype}.")
    return tensor.long()


def floats(name: str, value: Any, device: torch.device | None = None) -> torch.Tensor:
    """Floating-point numbers as a tensor.

    Raises:
        TypeError: they are integers, bools or no numbers at all.
    """
    tensor = as_tensor(name, value, device)
    if not tensor.is_floating_point():
        raise TypeError(f"`{name}` must be floating-point numbers, got {tensor.dtype}.")
    return tensor


def check_shape(name: str, tensor: torch.Tensor, shape: Sequence[int]) -> None:
    """Raises a ValueError unless a tensor has a shape."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"`{name}` must have shape {tuple(shape)}, got {tuple(tensor.shape)}.")


def token_ids(
    name: str, value: Any, vocab_size: int, device: torch.device | None = None
) -> torch.Tensor:
    """Rows of tokens of the vocabulary, `[batch, length]` int64.

    Raises:
        TypeError: they are no integers.
        ValueError: they have another shape, there is no row, or no such token.
    """
    ids = integers(name, value, device)
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
    if torch.compiler.is_compiling() or not ids.numel():
        return  # a look at the data would break the graph
    lowest, highest = (int(extreme) for extreme in ids.aminmax())
    if not 0 <= lowest <= highest < vocab_size:
        outside = (ids < 0) | (ids >= vocab_size)
        row = int(outside.nonzero()[0, -2]) if ids.ndim > 1 else 0
        raise RowError(
            f"`{name}` must hold {what}, 0 to {vocab_size - 1}, got "
            f"{int(ids[outside][0])} in row {{row}}.",
            row,
        )


def rows_of_ids(name: str, value: Any, vocab_size: int) -> list[torch.Tensor]:
    """Rows of tokens of the vocabulary, of any lengths, `[length]` int64 each.

    Raises:
        TypeError: they are no rows of integers.
        ValueError: there is no such token.
    """
    rows = several(value)
    if rows is None:
        raise TypeError(f"`{name}` must hold rows of token ids, got {shown(value)}.")
    found = []
    for number, row in enumerate(rows):
        ids = integers(name, row)
        if ids.ndim != 1:
            raise ValueError(
                f"`{name}` must be one- or two-dimensional, rows of token ids, got {shown(row)} as "
                f"row {number}."
            )
        with numbered([number]):
            check_tokens(name, ids[None], vocab_size)
        found.append(ids)
    return found


def check_unmasked(name: str, rows: Iterable[torch.Tensor], mask_token_id: int | None) -> None:
    """Raises a ValueError if one of the rows of tokens holds the mask token."""
    for number, row in enumerate(rows):
        if mask_token_id is not None and bool((row == mask_token_id).any()):
            raise ValueError(
                f"`{name}` must not hold the mask token ({mask_token_id}), got it in row {number}: "
                "leave it out; text with gaps is filled in with `infill=True`."
            )


def flags(
    name: str, value: Any, shape: Sequence[int], device: torch.device | None = None
) -> torch.Tensor:
    """A bool tensor of a shape.

    Raises:
        TypeError: it holds no bools.
        ValueError: it has another shape.
    """
    tensor = as_tensor(name, value, device)
    if tensor.dtype != torch.bool:
        raise TypeError(f"`{name}` must be True or False everywhere, got {tensor.dtype}.")
    check_shape(name, tensor, shape)
    return tensor


def padding_mask(
    name: str, value: Any, shape: tuple[int, ...], device: torch.device | None = None
) -> torch.Tensor:
    """A mask of tokens, 1 where they are real and 0 at padding, as int64.

    Raises:
        TypeError: it holds no numbers.
        ValueError: it has another shape or other values.
    """
    mask = as_tensor(name, value, device)
    if tuple(mask.shape) != tuple(shape):
        raise ValueError(
            f"`{name}` must have the shape of `input_ids`, {tuple(shape)}, got {tuple(mask.shape)}."
        )
    if not torch.compiler.is_compiling() and bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError(f"`{name}` must be 1 at real tokens and 0 at padding, got other values.")
    return mask.long()


def check_token_types(value: Any, input_ids: torch.Tensor) -> None:
    """Checks what tokenizers give beside ids: one text has one type of tokens.

    Raises:
        ValueError: they have another shape than the ids, or are not 0 everywhere.
    """
    if value is None:
        return
    types = integers("token_type_ids", value)
    check_shape("token_type_ids", types, input_ids.shape)
    if not torch.compiler.is_compiling() and bool(types.any()):
        raise ValueError(
            "`token_type_ids` must be 0 everywhere, got others: a denoised text has one type of "
            "tokens."
        )


def generators(name: str, value: Any, rows: int | None = None) -> None:
    """Checks the source of randomness: None, a generator, or a list with one for each row.

    Raises:
        TypeError: it is something else, such as a seed.
        ValueError: the list has another length.
    """
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
