"""Files and datasets of the Hub, to texts: a prompt that is given and an answer to learn."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks.arguments import shown
from ..checks.errors import is_of_a_library, reason
from ..text.encoding import is_text
from .rows import SAMPLE_BY, BadRowError, Row, RowReport, file_kind, read_rows
from .tasks import TASKS, sample_tasks

if TYPE_CHECKING:
    from datasets import Dataset

FILES = (".jsonl", ".json", ".txt", ".parquet")
CHAT_COLUMNS = ("messages", "conversations")
ANSWER_COLUMNS = ("answer", "completion", *CHAT_COLUMNS, "text")
PROMPT_COLUMNS = ("question", "prompt")
ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Example:
    """One text to learn: `answer` is generated, what is before it is given.

    Attributes:
        prompt: what the user says last; may be empty.
        answer: what follows.
        history: earlier messages, as pairs of a role and a content.
        row: the number of the row that it is from.
    """

    prompt: str
    answer: str
    history: tuple[tuple[str, str], ...] = ()
    row: int | None = field(default=None, compare=False)

    @property
    def messages(self) -> list[dict[str, str]]:
        """All that is before the answer, for a chat template."""
        own = [("user", self.prompt)] if self.prompt else []
        return [{"role": role, "content": content} for role, content in (*self.history, *own)]


class _NothingToLearn(Exception):
    """Why a row is passed over."""


def load_examples(
    source: str | Path,
    *,
    prompt_column: str | None = None,
    answer_column: str | None = None,
    remove_pattern: str | None = None,
    dataset_config: str | None = None,
    split: str = "train",
    sample_by: str = "line",
    skip_bad_rows: bool = False,
) -> list[Example]:
    """Reads a JSONL, JSON, Parquet or text file, or a dataset of the Hub.

    Rows hold a text, a prompt and an answer, or a conversation: a list of messages with `role` and
    `content` (or `from` and `value`), or the JSON of one. The last message of the assistant is then
    the answer, and what comes before it the prompt; a prompt and a completion may be lists of
    messages too.

    Rows in which there is nothing to learn are passed over, and counted: an empty answer (also one
    that `remove_pattern` empties), no message at all, a message without content, or a call of a
    tool. Rows that do not hold what they should are bad.

    Args:
        source: a path that ends in .jsonl, .json, .txt (each may be packed, with .gz) or .parquet,
            a Hub dataset id, a folder that `datasets` can read, or `tasks`: the package's own,
            whose kinds are `dataset_config`.
        prompt_column: the column that is given; without it texts have no prompt.
        answer_column: the column that is generated, or of conversations; found by its usual name
            (answer, completion, messages, conversations, text) if not given.
        remove_pattern: a regular expression whose matches are deleted from all texts.
        dataset_config: the configuration of a Hub dataset, such as "main".
        split: the split, or a part of one, such as "train[:1000]".
        sample_by: what is one text of a .txt file: a line, a paragraph (up to an empty line) or
            the whole document.
        skip_bad_rows: leave bad rows out, and list them; otherwise the first one is an error.

    Raises:
        FileNotFoundError: `source` looks like a file and is not there.
        ValueError: the file cannot be read, a column is missing, a row is bad, or nothing is left.
    """
    if source == TASKS:
        columns = {"prompt_column": prompt_column, "answer_column": answer_column}
        for name, value in (columns | {"remove_pattern": remove_pattern}).items():
            if value is not None:
                raise ValueError(f"`{name}` must not be given with {TASKS!r}, got {value!r}.")
        return [Example(t.question, t.answer) for t in sample_tasks(split, dataset_config)]
    source = str(source)
    if sample_by not in SAMPLE_BY:
        raise ValueError(f"`sample_by` must be one of {', '.join(SAMPLE_BY)}, got {sample_by!r}.")
    try:
        pattern = re.compile(remove_pattern or "(?!)")
    except re.error as error:
        raise ValueError(
            f"`remove_pattern` must be a regular expression, got {remove_pattern!r} ({error})."
        ) from error
    report = RowReport(repr(source), skip_bad_rows)
    columns, read = _read_table(source, dataset_config, split, sample_by, report)
    given = prompt_column is not None
    prompt_column, answer_column = _find_columns(columns, source, prompt_column, answer_column)
    examples = []
    for number, row in read([answer_column, *([prompt_column] if prompt_column else [])]):
        try:
            turns = _answer_turns(row.get(answer_column), answer_column)
            if prompt_column is not None:
                prompt = row.get(prompt_column)
                if given and len(turns) > 1 and not isinstance(prompt, list):
                    raise ValueError(
                        f"`prompt_column` cannot be given with conversations (column "
                        f"{answer_column!r}): the prompt is what comes before the last answer."
                    )
                turns = _prompt_turns(prompt, prompt_column, answer_column, len(turns) > 1) + turns
            cleaned = [(role, pattern.sub("", content)) for role, content in turns]
            *history, (_, answer) = cleaned
            if not answer.strip():
                raise _NothingToLearn("an empty answer")
        except BadRowError as error:
            report.refuse(number, str(error))
        except _NothingToLearn as reason:
            report.pass_over(number, str(reason))
        else:
            prompt = history.pop()[1] if history and history[-1][0] == "user" else ""
            examples.append(Example(prompt, answer, tuple(history), number))
    if not examples:
        reasons = f" {report}" if report else ""
        raise ValueError(f"`source` {source!r} has no text in column {answer_column!r}.{reasons}")
    report.tell()
    return examples


Read = Callable[[list[str]], Iterable[tuple[int, dict[str, Any]]]]
"""Gives some columns of all rows, each with its number."""


def _read_table(
    source: str, config: str | None, split: str, sample_by: str, report: RowReport
) -> tuple[list[str], Read]:
    """The columns, and what reads the rows that are objects."""
    kind = file_kind(source) or Path(source).suffix
    if kind in FILES and not Path(source).is_file():
        raise FileNotFoundError(f"`source`: there is no file {source!r}.")
    if kind not in FILES and Path(source).is_file():
        raise ValueError(
            f"`source` must be a file that ends in {', '.join(FILES)} or a dataset's id, "
            f"got {source!r}."
        )
    if kind not in FILES or kind == ".parquet":
        table = _arrow_table(source, config, split, kind)
        return table.column_names, lambda wanted: enumerate(table.select_columns(wanted), 1)
    rows, columns = [], {}
    for number, row in _part(read_rows(source, sample_by), split):
        if isinstance(row, BadRowError):
            report.refuse(number, str(row))
        else:
            columns |= dict.fromkeys(row)
            rows.append((number, row))
    if not rows:
        raise ValueError(f"`source` {source!r} has no rows in {split!r}.")
    return list(columns), lambda wanted: rows


def _part(rows: list[Row], split: str) -> list[Row]:
    """What a split such as `train[:10%]` names of a file, all of which is `train`."""
    from datasets import ReadInstruction

    parts = ReadInstruction.from_spec(split).to_absolute({"train": len(rows)})
    return [row for part in parts for row in rows[part.from_ : part.to]]


def _arrow_table(source: str, config: str | None, split: str, kind: str) -> Dataset:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        if kind == ".parquet":
            return load_dataset("parquet", data_files=source, split=split)
        return load_dataset(source, config, split=split)
    except DatasetGenerationError as error:
        raise ValueError(f"`source` {source!r} cannot be read: {error.__cause__}.") from error
    except Exception as error:
        if isinstance(error, (OSError, ValueError)) or not is_of_a_library(error):
            raise
        raise ValueError(f"`source` {source!r} cannot be read: {reason(error)}.") from error


def _find_columns(
    columns: list[str], source: str, prompt_column: str | None, answer_column: str | None
) -> tuple[str | None, str]:
    """The columns by their usual names, unless they are given."""
    if answer_column is None:
        answer_column = next((c for c in ANSWER_COLUMNS if c in columns), None)
        if answer_column is None:
            raise ValueError(
                f"`answer_column` must be given: none of {', '.join(ANSWER_COLUMNS)} is among the "
                f"columns {columns} of {source!r}."
            )
        if prompt_column is None and answer_column in ("answer", "completion"):
            prompt_column = next((c for c in PROMPT_COLUMNS if c in columns), None)
    for name, column in (("prompt_column", prompt_column), ("answer_column", answer_column)):
        if column is not None and column not in columns:
            raise ValueError(
                f"`{name}` is {column!r}, but the columns of {source!r} are {columns}."
            )
    return prompt_column, answer_column


def _answer_turns(value: Any, column: str) -> list[tuple[str, str]]:
    """The messages of a row up to the last one of the assistant, which is the answer."""
    chat = _messages(value, column)
    if chat is None:
        return [("assistant", _text(value, column))]
    if not chat:
        raise _NothingToLearn("no messages")
    turns = [_turn(message, column) for message in chat]
    last = max((i for i, (role, _) in enumerate(turns) if role == "assistant"), default=None)
    if last is None:
        raise BadRowError(f"has no message of the role 'assistant' in column {column!r}")
    return turns[: last + 1]


def _prompt_turns(value: Any, column: str, answer_column: str, chat: bool) -> list[tuple[str, str]]:
    """The messages of the prompt's column; `chat`: those of the answer's are a conversation."""
    messages = _messages(value, column)
    if messages is not None:
        return [_turn(message, column) for message in messages]
    if chat:
        raise BadRowError(
            f"must hold messages in column {column!r} too, as in column {answer_column!r}, got "
            f"{shown(value)}"
        )
    return [("user", _text(value, column))]


def _messages(value: Any, column: str) -> list[Any] | None:
    """A list of messages, in a column of conversations also as JSON; None of a text."""
    if column in CHAT_COLUMNS:
        if isinstance(value, str):
            with suppress(ValueError, RecursionError):
                value = json.loads(value)
        if not isinstance(value, list):
            raise BadRowError(
                f"must hold a list of messages in column {column!r}, got {shown(value)}"
            )
        return value
    return value if isinstance(value, list) and all(isinstance(m, dict) for m in value) else None


def _turn(message: Any, column: str) -> tuple[str, str]:
    """Role and content of a message."""
    found = message if isinstance(message, dict) else {}
    role, content = (
        next((found[name] for name in names if found.get(name) is not None), None)
        for names in (("role", "from"), ("content", "value"))
    )
    if found.get("tool_calls") or found.get("function_call"):
        raise _NothingToLearn("a call of a tool, of which only text can be learnt")
    if isinstance(role, str) and content is None and {"content", "value"} & found.keys():
        raise _NothingToLearn("a message without content")
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        parts = [part.get("text") if part.get("type") == "text" else None for part in content]
        if all(isinstance(part, str) for part in parts):
            content = "".join(parts)
    if not isinstance(role, str) or not isinstance(content, str):
        raise BadRowError(
            f"must hold messages with a text `role` and a text `content` in column {column!r}, "
            f"got {shown(message)}"
        )
    return ROLES.get(role, role), _text(content, column)


def _text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise BadRowError(f"must hold a text in column {column!r}, got {shown(value)}")
    if not is_text(value):
        raise BadRowError(f"holds half of a surrogate pair in column {column!r}: {shown(value)}")
    return value
