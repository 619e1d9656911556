"""The files of a run over a JSONL file: the result, what the run is, and the parts on the way."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..runtime.files import atomic_write, make_durable
from .jsonl_rows import JSONLRows, line_at, parsed

DIGESTS = {
    "input_sha256": "another content of its input",
    "model_digest": "another model (other weights, settings or tokenizer)",
}
"""What differs where a digest does (its digits say nothing to anybody)."""


@dataclass
class RunFiles:
    """The files of a run: the result, what the run is, and the parts on the way there.

    Attributes:
        output: the result.
        run: what must be the same for a run to be continued; values that JSON has.
    """

    output: Path
    run: dict[str, Any]

    def __post_init__(self) -> None:
        if not self.output.name:
            raise ValueError(f"`output` must be the path of a file, got {str(self.output)!r}.")
        self.run = json.loads(json.dumps(self.run))
        self.about = self.output.with_name(self.output.name + ".run.json")
        self.lock = self.output.with_name(self.output.name + ".lock")
        self.folder = self.output.with_name(self.output.name + ".parts")

    def is_complete(self) -> bool:
        """Whether this very run has written its result.

        Raises:
            ValueError: the files are of another run that has answered rows.
            OSError: there are a result or answers, and nothing says of which run.
        """
        answered = self.output.exists() or bool(self.answers())
        if answered and not self.about.exists():
            there = self.output if self.output.exists() else self.folder
            raise FileExistsError(
                f"`output` {str(self.output)!r}: {str(there)!r} exists, and no {self.about.name!r} "
                "says of which run it is: remove it, or give another file."
            )
        if answered:
            self.check_same()
        return self.output.exists()

    def check_same(self) -> None:
        """Checks that what has begun is this run.

        Raises:
            ValueError: it is another one.
        """
        before = self._begun()
        for name in {**before, **self.run}:
            theirs, ours = before.get(name), self.run.get(name)
            if json.dumps(theirs) != json.dumps(ours):  # NaN is itself here
                what = DIGESTS.get(name, f"`{name}` {theirs!r}, not {ours!r}")
                raise ValueError(
                    f"`output` {str(self.output)!r} was begun with {what}: run it as it was to go "
                    "on, or give another file; what is answered stays."
                )

    def _begun(self) -> dict[str, Any]:
        try:
            return parsed(self.about.read_bytes())
        except ValueError as error:
            raise ValueError(
                f"{str(self.about)!r}, which says what the run is, {error}: give another `output`."
            ) from error

    def begin(self) -> None:
        """Makes the folder of the parts and says what the run is; nothing is answered yet."""
        self.folder.mkdir(exist_ok=True)
        with atomic_write(self.about) as new:
            new.write_text(json.dumps(self.run, indent=2) + "\n")

    def part(self, process: int) -> Part:
        return Part(self.folder / f"part-{process:05d}.jsonl")

    def answers(self) -> dict[int, tuple[Path, int]]:
        """The rows that have been answered or left out: in which part, and from which byte on."""
        found: dict[int, tuple[Path, int]] = {}
        for path in sorted(self.folder.glob("part-*.jsonl")):
            offset = 0
            with path.open("rb") as file:
                for line in file:
                    with contextlib.suppress(ValueError, KeyError):
                        found.setdefault(parsed(line)["row"], (path, offset))
                    offset += len(line)
        return found

    def finish(self, rows: JSONLRows) -> None:
        """Writes the result if all rows are answered.

        The last process to come here finds them so. Two that come at once write the same; so does
        a process of a killed run that went on without its launcher.
        """
        try:
            answers = self.answers()
            if len(answers) < len(rows) or self._begun() != self.run:
                return
            temporary = self.folder / f"merged-{uuid.uuid4().hex}.jsonl"
            with temporary.open("wb") as merged:
                for line in _merged_lines(rows, answers, self.run["output_column"]):
                    merged.write(line)
                merged.flush()
                os.fsync(merged.fileno())
            temporary.replace(self.output)
        except FileNotFoundError:
            if not self.output.exists():
                raise
            return
        make_durable(self.output.parent)
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # a complete run is not written again
            self.lock.unlink()


class Part:
    """A file of answers, one a line, that only grows.

    Args:
        path: the file; what is in it stays.
    """

    def __init__(self, path: Path) -> None:
        self.file = path.open("ab", buffering=0)
        if self.file.tell():
            with path.open("rb") as written:
                written.seek(-1, os.SEEK_END)
                if written.read() != b"\n":
                    # What a kill tore becomes a line of its own, which is no JSON.
                    self.file.write(b"\n")
        make_durable(path.parent)

    def __enter__(self) -> Part:
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()

    def append(self, answers: Iterable[tuple[int, str | None]]) -> None:
        """Adds rows and their texts (None: left out), and returns when they are on the disk."""
        lines = (json.dumps({"row": row, "text": text}) + "\n" for row, text in answers)
        data = "".join(lines).encode()
        # All at once, and unbuffered: a process that a kill left over may write to the same file.
        if self.file.write(data) < len(data):
            raise OSError(f"{self.file.name!r} could not be written to its end: is the disk full?")
        os.fsync(self.file.fileno())


def _merged_lines(
    rows: JSONLRows, answers: dict[int, tuple[Path, int]], column: str
) -> Iterator[bytes]:
    """The answered lines of the input, byte by byte as they are, with one more column each."""
    opened: dict[Path, BinaryIO] = {}
    try:
        with rows.path.open("rb") as source:
            for row in range(len(rows)):
                path, offset = answers[row]
                if path not in opened:
                    opened[path] = path.open("rb")
                text = parsed(line_at(opened[path], offset))["text"]
                line = rows.line(source, row).rstrip()
                if text is None:
                    continue
                added = f", {json.dumps(column)}: {json.dumps(text, ensure_ascii=False)}}}\n"
                yield line.removesuffix(b"}").rstrip() + added.encode()
    finally:
        for file in opened.values():
            file.close()
