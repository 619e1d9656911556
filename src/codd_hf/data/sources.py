"""Files and datasets of the Hub, to texts: a prompt, and an answer to learn.

Rows of JSONL and text files are read as they are written, bad ones reported by their numbers;
nothing guesses the type of a column: a date in quotes is a text.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm.auto import tqdm

from ..checks.arguments import choice, shown
from ..checks.errors import reading
from ..text.encoding import is_text
from .tasks import TASKS, Task, sample_tasks

CHAT_COLUMNS = ("messages", "conversations")
ANSWER_COLUMNS = ("answer", "completion", *CHAT_COLUMNS, "text")
PROMPT_COLUMNS = ("question", "prompt")
ROLES = {"human": "user", "gpt": "assistant"}
SAMPLE_BY = ("line", "paragraph")
LISTED = 20
"""So many reasons, and so many rows of each, are told."""

Row = tuple[int, "dict[str, Any] | BadRowError"]
"""A row's number, from 1, and its columns, or what is wrong where they should be."""


class BadRowError(ValueError):
    """What is wrong with one row, as the end of a sentence that begins with its number."""


@dataclass
class RowReport:
    """The rows of `source` that give no example: `left_out` has their numbers by the reason."""

    source: str
    skip_bad_rows: bool = False
    unit: str = "Row"
    left_out: dict[str, list[int]] = field(default_factory=dict)

    def refuse(self, number: int, reason: str) -> None:
        """Notes a bad row, or raises a ValueError if such rows are not to be skipped."""
        if not self.skip_bad_rows:
            raise ValueError(
                f"{self.unit} {number} of {self.source} {reason}: mend it, or leave bad ones out "
                "with `skip_bad_rows`."
            )
        self.pass_over(number, reason)

    def pass_over(self, number: int, reason: str) -> None:
        """Notes a row that gives no example."""
        self.left_out.setdefault(reason, []).append(number)

    def __str__(self) -> str:
        numbers = sum(map(len, self.left_out.values()))
        lines = [f"Of {self.source}, {numbers} rows are left out."] if numbers else []
        for reason, rows in islice(self.left_out.items(), LISTED):
            more = ", ..." if len(rows) > LISTED else ""
            lines.append(f"Rows left out: {', '.join(map(str, rows[:LISTED]))}{more}: {reason}.")
        return "\n".join(lines)


def tell(text: object) -> None:
    """Prints a text, unless it is empty, on the main process."""
    if str(text) and PartialState().is_main_process:
        tqdm.write(str(text))


@dataclass(frozen=True)
class Example:
    """One text to learn, with the last message of the user, if any, and those before it.

    Attributes:
        prompt: may be empty.
        answer: the text that is generated.
        history: pairs of a role and a content.
        row: the number of the row that it is from.
        task: the task that it is, if it is one.
    """

    prompt: str
    answer: str
    history: tuple[tuple[str, str], ...] = ()
    row: int | None = field(default=None, compare=False)
    task: Task | None = field(default=None, compare=False)

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
    """Reads a JSONL, Parquet or text file, or a dataset of the Hub.

    Rows hold a text, a prompt and an answer, or a conversation: a list of messages with `role` and
    `content` (or `from` and `value`), or the JSON of one. The last message of the assistant is then
    the answer, and the messages before it are the prompt; a prompt and a completion may be lists of
    messages too. Rows in which there is nothing to learn are passed over, and counted: an empty
    answer, no message of the assistant, a message without content, or a call of a tool.

    Args:
        source: a path that ends in .jsonl, .txt or .parquet, a Hub dataset id, a folder that
            `datasets` can read, or `tasks`: the package's own, whose kinds are `dataset_config`.
        prompt_column: the column of prompts; without it texts have none.
        answer_column: the column that is generated, or of conversations; by default found by its
            usual name (answer, completion, messages, conversations, text).
        remove_pattern: a regular expression whose matches are deleted from all texts.
        dataset_config: the configuration of a Hub dataset, such as "main".
        split: the split, or a part of one, such as "train[:1000]".
        sample_by: one text of a .txt file is a line or a paragraph (up to an empty line).
        skip_bad_rows: leave bad rows out, and list them; otherwise the first one is an error.

    Raises:
        OSError: there is no such source, or it cannot be read.
        ValueError: a column is missing, a row is bad, or nothing is left.
    """
    if source == TASKS:
        tasks = sample_tasks(split, dataset_config)
        return [Example(task.question, task.answer, task=task) for task in tasks]
    source = str(source)
    choice("sample_by", sample_by, SAMPLE_BY)
    try:
        pattern = re.compile(remove_pattern or "(?!)")
    except re.error as error:
        raise ValueError(
            f"`remove_pattern` must be a regular expression, got {remove_pattern!r} ({error})."
        ) from error
    rows, columns = _read(source, dataset_config, split, sample_by)
    names = _find_columns(columns, source, prompt_column, answer_column)
    report, examples = RowReport(repr(source), skip_bad_rows), []
    for number, row in rows:
        try:
            examples.append(_example(number, row, pattern, *names))
        except BadRowError as error:
            report.refuse(number, str(error))
        except _NothingToLearn as error:
            report.pass_over(number, str(error))
    if not examples:
        raise ValueError(f"`source` {source!r} has no text in column {names[0]!r}. {report}")
    tell(report)
    return examples


def _read(
    source: str, config: str | None, split: str, sample_by: str
) -> tuple[Iterable[Row], list[str]]:
    """The rows, and the columns that they have."""
    import datasets

    suffix = Path(source).suffix
    if suffix in (".jsonl", ".txt"):
        whole = read_rows(source, sample_by)  # all of which is `train`
        parts = datasets.ReadInstruction.from_spec(split).to_absolute({"train": len(whole)})
        rows = [row for part in parts for row in whole[part.from_ : part.to]]
        return rows, [*{name: 0 for _, row in rows if isinstance(row, dict) for name in row}]
    with reading(f"`source` {source!r}"):
        if suffix == ".parquet":
            table = datasets.load_dataset("parquet", data_files=source, split=split)
        else:
            table = datasets.load_dataset(source, config, split=split)
    return enumerate(table, 1), table.column_names


def read_rows(path: str, sample_by: str = "line") -> list[Row]:
    """All rows of a file in UTF-8, in order, numbered by lines where a row is a line.

    A .txt file has texts, in one column `text`: lines or, up to an empty line, paragraphs. Others
    have JSON objects, one a line. Blank lines are no rows.
    """
    if Path(path).suffix == ".txt":
        # Bytes that are no UTF-8 become halves of surrogate pairs, which only their rows are about.
        text = Path(path).read_text("utf-8-sig", "surrogateescape")
        parts = re.split(r"\n\n+" if sample_by == "paragraph" else r"\n", text)
        texts = enumerate((part.strip("\n") for part in parts), 1)
        return [(number, {"text": text}) for number, text in texts if text.strip()]
    lines = enumerate(Path(path).read_bytes().splitlines(), 1)
    return [(number, _columns(line)) for number, line in lines if line.strip()]


def _columns(line: bytes) -> dict[str, Any] | BadRowError:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return BadRowError(f"is not JSON ({error})")
    if not isinstance(value, dict):
        return BadRowError(f"is not a JSON object ({shown(value)})")
    return value


def _find_columns(
    columns: list[str], source: str, prompt_column: str | None, answer_column: str | None
) -> tuple[str, str | None]:
    """The columns of answers and prompts by their usual names, unless the user names them."""
    usual = (column for column in ANSWER_COLUMNS if column in columns)
    answer = answer_column or next(usual, ANSWER_COLUMNS[0])
    if answer_column is None and answer in ("answer", "completion") and prompt_column is None:
        prompt_column = next((c for c in PROMPT_COLUMNS if c in columns), None)
    for name, column in (("prompt_column", prompt_column), ("answer_column", answer)):
        if column is not None and column not in columns:
            raise ValueError(
                f"`{name}` must be a column of {source!r}, one of {columns}, got {column!r}."
            )
    return answer, prompt_column


def _example(
    number: int,
    row: dict[str, Any] | BadRowError,
    pattern: re.Pattern[str],
    answer_column: str,
    prompt_column: str | None,
) -> Example:
    if isinstance(row, BadRowError):
        raise row
    turns = _turns(row.get(answer_column), answer_column, "assistant")
    while turns and turns[-1][0] != "assistant":
        turns.pop()
    if not turns:
        raise _NothingToLearn("no message of the assistant")
    if prompt_column is not None:
        turns = _turns(row.get(prompt_column), prompt_column, "user") + turns
    *history, (_, answer) = [(role, pattern.sub("", text)) for role, text in turns]
    if not answer.strip():
        raise _NothingToLearn("an empty answer")
    prompt = history.pop()[1] if history and history[-1][0] == "user" else ""
    return Example(prompt, answer, tuple(history), number)


def _turns(value: Any, column: str, role: str) -> list[tuple[str, str]]:
    """Role and content of the messages in a column; a text is one message of `role`."""
    try:
        if isinstance(value, str) and column not in CHAT_COLUMNS:
            return [_turn({"role": role, "content": value})]
        messages = json.loads(value) if isinstance(value, str) else value
        return [_turn(message) for message in messages]
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise BadRowError(
            f"must hold a text, or messages with a text `role` and a text `content`, in column "
            f"{column!r}, got {shown(value)}"
        ) from error


def _turn(message: dict[str, Any]) -> tuple[str, str]:
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if message.get("tool_calls") or message.get("function_call"):
        raise _NothingToLearn("a call of a tool, of which only text can be learnt")
    if content is None:
        raise _NothingToLearn("a message without content")
    if not isinstance(content, str):  # parts, of which some may be images
        content = "".join(part["text"] for part in content)
    if not isinstance(role, str) or not is_text(content):
        raise ValueError("no message of text")
    return ROLES.get(role, role), content
