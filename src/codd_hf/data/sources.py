"""Files and datasets of the Hub, to texts: a prompt, and an answer to learn."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks.arguments import choice, shown
from ..checks.errors import is_of_a_library, reason
from ..text.encoding import is_text
from .rows import SAMPLE_BY, BadRowError, Row, RowReport, file_kind, read_rows, tell
from .tasks import TASKS, sample_tasks

if TYPE_CHECKING:
    from datasets import Dataset

FILES = (".jsonl", ".json", ".txt", ".parquet")
CHAT_COLUMNS = ("messages", "conversations")
ANSWER_COLUMNS = ("answer", "completion", *CHAT_COLUMNS, "text")
PROMPT_COLUMNS = ("question", "prompt")
ROLES = {"human": "user", "gpt": "assistant"}
Turns = list[tuple[str, str]]


@dataclass(frozen=True)
class Example:
    """One text to learn.

    Attributes:
        prompt: the last message of the user; may be empty.
        answer: the text that is generated.
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
    the answer, and the messages before it are the prompt; a prompt and a completion may be lists of
    messages too.

    Rows in which there is nothing to learn are passed over, and counted: an empty answer (also one
    that `remove_pattern` empties), no message at all, a message without content, or a call of a
    tool. Rows of another form are bad.

    Args:
        source: a path that ends in .jsonl, .json, .txt (each may be packed, with .gz) or .parquet,
            a Hub dataset id, a folder that `datasets` can read, or `tasks`: the package's own,
            whose kinds are `dataset_config`.
        prompt_column: the column of prompts; without it texts have none.
        answer_column: the column that is generated, or of conversations; by default found by its
            usual name (answer, completion, messages, conversations, text).
        remove_pattern: a regular expression whose matches are deleted from all texts.
        dataset_config: the configuration of a Hub dataset, such as "main".
        split: the split, or a part of one, such as "train[:1000]".
        sample_by: one text of a .txt file is a line, a paragraph (up to an empty line) or the whole
            document.
        skip_bad_rows: leave bad rows out, and list them; otherwise the first one is an error.

    Raises:
        FileNotFoundError: `source` looks like a file and is not there.
        ValueError: the file cannot be read, a column is missing, a row is bad, or nothing is left.
    """
    if source == TASKS:
        unused = {"prompt_column": prompt_column, "answer_column": answer_column}
        for name, value in (unused | {"remove_pattern": remove_pattern}).items():
            if value is not None:
                raise ValueError(f"`{name}` must not be given with {TASKS!r}, got {value!r}.")
        return [Example(t.question, t.answer) for t in sample_tasks(split, dataset_config)]
    source = str(source)
    choice("sample_by", sample_by, SAMPLE_BY)
    try:
        pattern = re.compile(remove_pattern or "(?!)")
    except re.error as error:
        raise ValueError(
            f"`remove_pattern` must be a regular expression, got {remove_pattern!r} ({error})."
        ) from error
    rows, columns = _read(source, dataset_config, split, sample_by)
    prompt_column, answer_column = _find_columns(columns, source, prompt_column, answer_column)
    names = [answer_column] if prompt_column is None else [answer_column, prompt_column]
    if not isinstance(rows, list):  # a table of `datasets`
        rows = enumerate(rows.select_columns(list(dict.fromkeys(names))), 1)
    report, examples = RowReport(repr(source), skip_bad_rows), []
    for number, row in rows:
        try:
            turns = [(role, pattern.sub("", text)) for role, text in _turns_of_row(row, *names)]
            *history, (_, answer) = turns
            if not answer.strip():
                raise _NothingToLearn("an empty answer")
        except BadRowError as error:
            report.refuse(number, str(error))
        except _NothingToLearn as error:
            report.pass_over(number, str(error))
        else:
            prompt = history.pop()[1] if history and history[-1][0] == "user" else ""
            examples.append(Example(prompt, answer, tuple(history), number))
    if not examples:
        raise ValueError(
            f"`source` {source!r} has no text in column {answer_column!r}. {report}".rstrip()
        )
    tell(report)
    return examples


def _read(
    source: str, config: str | None, split: str, sample_by: str
) -> tuple[list[Row] | Dataset, list[str]]:
    """The rows, or the table of them, and the columns that they have."""
    kind = file_kind(source)
    if kind in FILES and not Path(source).is_file():
        raise FileNotFoundError(f"`source`: there is no file {source!r}.")
    if kind not in FILES and Path(source).is_file():
        raise ValueError(
            f"`source` must be a file that ends in {', '.join(FILES)} or a dataset's id, "
            f"got {source!r}."
        )
    if kind not in FILES or kind == ".parquet":
        table = _arrow_table(source, config, split, kind)
        return table, table.column_names
    from datasets import ReadInstruction

    rows = read_rows(source, sample_by)  # all of which is `train`
    parts = ReadInstruction.from_spec(split).to_absolute({"train": len(rows)})
    rows = [row for part in parts for row in rows[part.from_ : part.to]]
    columns = {name: None for _, row in rows if isinstance(row, dict) for name in row}
    if not columns:
        told = "".join(f" Row {i} {row}." for i, row in rows[:1])
        raise ValueError(f"`source` {source!r} has no rows in {split!r}.{told}")
    return rows, list(columns)


def _arrow_table(source: str, config: str | None, split: str, kind: str) -> Dataset:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        if kind == ".parquet":
            return load_dataset("parquet", data_files=source, split=split)
        return load_dataset(source, config, split=split)
    except Exception as error:
        if isinstance(error, DatasetGenerationError):
            error = error.__cause__
        elif isinstance(error, (OSError, ValueError)) or not is_of_a_library(error):
            raise
        raise ValueError(f"`source` {source!r} cannot be read: {reason(error)}.") from error


def _find_columns(
    columns: list[str], source: str, prompt_column: str | None, answer_column: str | None
) -> tuple[str | None, str]:
    """The columns by their usual names, unless the user names them."""
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


def _turns_of_row(
    row: dict[str, Any] | BadRowError, answer_column: str, prompt_column: str | None = None
) -> Turns:
    """Role and content of the messages up to the last one of the assistant, the answer."""
    if isinstance(row, BadRowError):
        raise row
    turns = _turns(row.get(answer_column), answer_column, "assistant")
    if not turns:
        raise _NothingToLearn("no messages")
    while turns and turns[-1][0] != "assistant":
        turns.pop()
    if not turns:
        raise BadRowError(f"has no message of the role 'assistant' in column {answer_column!r}")
    if prompt_column is None:
        return turns
    prompt = row.get(prompt_column)
    if len(turns) > 1 and not isinstance(prompt, list):
        raise BadRowError(
            f"must hold messages in column {prompt_column!r} too, as in column {answer_column!r}, "
            f"got {shown(prompt)}"
        )
    return _turns(prompt, prompt_column, "user") + turns


def _turns(value: Any, column: str, role: str) -> Turns:
    """The messages in a column, in one of conversations also as JSON; a text is one of `role`."""
    is_chat = column in CHAT_COLUMNS
    if is_chat and isinstance(value, str):
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    if isinstance(value, list) and (is_chat or all(isinstance(part, dict) for part in value)):
        return [_turn(message, column) for message in value]
    if is_chat:
        raise BadRowError(f"must hold a list of messages in column {column!r}, got {shown(value)}")
    return [(role, _text(value, column))]


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
