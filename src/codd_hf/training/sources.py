"""Files and datasets of the Hub, to texts: a prompt that is given and an answer to learn."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

FILE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
SAMPLE_BY = ("line", "paragraph", "document")
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
    """

    prompt: str
    answer: str
    history: tuple[tuple[str, str], ...] = ()

    @property
    def messages(self) -> list[dict[str, str]]:
        """All that is before the answer, for a chat template."""
        own = [("user", self.prompt)] if self.prompt else []
        return [{"role": role, "content": content} for role, content in (*self.history, *own)]


def load_examples(
    source: str,
    *,
    prompt_column: str | None = None,
    answer_column: str | None = None,
    remove_pattern: str | None = None,
    dataset_config: str | None = None,
    split: str = "train",
    sample_by: str = "line",
) -> list[Example]:
    """Reads a JSONL, Parquet or text file, or a dataset of the Hub.

    Rows hold a text, a prompt and an answer, or a conversation: a list of messages with `role` and
    `content` (or `from` and `value`). The last message of the assistant is then the answer, and
    what comes before it the prompt. Rows with an empty answer are passed over.

    Args:
        source: a path that ends in .jsonl, .json, .parquet or .txt, a Hub dataset id, or a folder
            that `datasets` can read.
        prompt_column: the column that is given; without it texts have no prompt.
        answer_column: the column that is generated, or of conversations; found by its usual name
            (answer, completion, messages, conversations, text) if not given.
        remove_pattern: a regular expression whose matches are deleted from all texts.
        dataset_config: the configuration of a Hub dataset, such as "main".
        split: the split, or a part of one, such as "train[:1000]".
        sample_by: what is one text of a .txt file: a line, a paragraph (up to an empty line) or
            the whole document.

    Raises:
        FileNotFoundError: `source` looks like a file and is not there.
        ValueError: the file cannot be read, a column is missing, a row does not hold what it
            should, or nothing is left.
    """
    if sample_by not in SAMPLE_BY:
        raise ValueError(f"`sample_by` must be one of {', '.join(SAMPLE_BY)}, got {sample_by!r}.")
    table = _read_table(source, dataset_config, split, sample_by)
    prompt_column, answer_column = _find_columns(table, source, prompt_column, answer_column)
    table = table.select_columns([answer_column, *([prompt_column] if prompt_column else [])])
    try:
        rows = list(table)
    except UnicodeDecodeError as error:
        raise _unreadable(source, error) from error
    chat = answer_column in CHAT_COLUMNS or any(
        isinstance(row[answer_column], list) for row in rows[:1]
    )
    if chat and prompt_column:
        raise ValueError(
            f"`prompt_column` cannot be given with conversations (column {answer_column!r}): the "
            "prompt is what comes before the last answer in them."
        )

    def clean(text: str) -> str:
        return re.sub(remove_pattern, "", text) if remove_pattern else text

    examples = []
    for number, row in enumerate(rows, 1):
        try:
            if chat:
                *history, (_, answer) = _turns(row[answer_column], answer_column)
            else:
                answer = _text(row[answer_column], answer_column)
                given = _text(row[prompt_column], prompt_column) if prompt_column else ""
                history = [("user", given)]
        except ValueError as error:
            raise ValueError(f"Row {number} of {source!r} {error}.") from error
        history, prompt = [(role, clean(content)) for role, content in history], ""
        if history and history[-1][0] == "user":
            prompt = history.pop()[1]
        if answer.strip():
            examples.append(Example(prompt, clean(answer), tuple(history)))
    if not examples:
        raise ValueError(f"`source` {source!r} has no text in column {answer_column!r}.")
    return examples


def _read_table(source: str, config: str | None, split: str, sample_by: str) -> Dataset:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    suffix = Path(source).suffix
    kind = FILE_FORMATS.get(suffix)
    if kind is None and Path(source).is_file():
        raise ValueError(
            f"`source` must be a file that ends in {', '.join(FILE_FORMATS)} or a dataset's id, "
            f"got {source!r}."
        )
    if kind is not None and not Path(source).is_file():
        raise FileNotFoundError(f"`source`: there is no file {source!r}.")
    try:
        if kind is None:
            return load_dataset(source, config, split=split)
        options = {"sample_by": sample_by} if kind == "text" else {}
        return load_dataset(kind, data_files=str(source), split=split, **options)
    except DatasetGenerationError as error:
        raise _unreadable(source, error.__cause__) from error


def _unreadable(source: str, reason: BaseException) -> ValueError:
    broken = _broken_line(Path(source)) if Path(source).suffix == ".jsonl" else None
    return ValueError(f"`source` {source!r} cannot be read: {broken or reason}.")


def _broken_line(path: Path) -> str | None:
    """What is wrong with the first line of a JSONL file that is not an object."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                if line.strip() and not isinstance(json.loads(line), dict):
                    return f"line {number} is not a JSON object"
            except ValueError as error:
                return f"line {number} is not JSON ({error})"
    return None


def _find_columns(
    table: Dataset, source: str, prompt_column: str | None, answer_column: str | None
) -> tuple[str | None, str]:
    """The columns by their usual names, unless they are given."""
    columns = table.column_names
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


def _text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must hold a text in column {column!r}, got {_short(value)}")
    return value


def _turns(messages: Any, column: str) -> list[tuple[str, str]]:
    """Role and content of the messages up to the last one of the assistant."""
    if not isinstance(messages, list):
        raise ValueError(
            f"must hold a list of messages in column {column!r}, got {_short(messages)}"
        )
    turns, last = [], 0
    for message in messages:
        found = message if isinstance(message, dict) else {}
        role, content = (
            next((found[name] for name in names if found.get(name) is not None), None)
            for names in (("role", "from"), ("content", "value"))
        )
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(
                f"must hold messages with a text `role` and a text `content` in column {column!r}, "
                f"got {_short(message)}"
            )
        turns.append((ROLES.get(role, role), content))
        if turns[-1][0] == "assistant":
            last = len(turns)
    if last == 0:
        raise ValueError(f"has no message of the role 'assistant' in column {column!r}")
    return turns[:last]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
