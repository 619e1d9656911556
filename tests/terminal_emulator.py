"""As much of a terminal as is needed to see what a program has drawn."""

from __future__ import annotations

import re

SEQUENCE = re.compile(r"\x1b(?:\[([0-9;?]*)([A-Za-z])|([78]))")


class Terminal:
    """Characters with their colours on a screen of a fixed size, and what scrolled off its top.

    Attributes:
        lines: rows of (character, style), those that scrolled off first.
        frames: the text on the screen each time `feed` was called.
    """

    def __init__(self, columns: int = 80, rows: int = 24) -> None:
        self.columns, self.rows = columns, rows
        self.lines: list[list[tuple[str, str]]] = [[]]
        self.row = self.column = 0
        self.style = ""
        self.saved = (0, 0)
        self.frames: list[str] = []

    @property
    def top(self) -> int:
        return max(len(self.lines) - self.rows, 0)

    @property
    def text(self) -> str:
        return "\n".join("".join(c for c, _ in line).rstrip() for line in self.lines)

    @property
    def cells(self) -> list[tuple[str, str]]:
        return [cell for line in self.lines for cell in line]

    def feed(self, output: str) -> None:
        at = 0
        while at < len(output):
            sequence = SEQUENCE.match(output, at)
            if sequence:
                self._control(*sequence.groups())
                at = sequence.end()
                continue
            self._character(output[at])
            at += 1
        self.frames.append(self.text)

    def _control(self, number: str | None, name: str | None, save: str | None) -> None:
        if save == "7":
            self.saved = (self.row, self.column)
        elif save == "8":
            self.row, self.column = self.saved
        elif name == "m":
            self.style = "" if number in ("", "0") else number
        elif name == "A":
            self.row = max(self.row - int(number or 1), self.top)
        elif name in ("K", "J"):
            # After the last cell of a line the cursor is still on it.
            del self.lines[self.row][min(self.column, self.columns - 1) :]
            if name == "J":
                del self.lines[self.row + 1 :]
        elif (number, name) not in (("?2004", "h"), ("?2004", "l")):
            raise AssertionError(f"unknown control sequence {number}{name}")

    def _character(self, character: str) -> None:
        if character == "\r":
            self.column = 0
            return
        if character == "\n":
            self._newline()
            return
        if character == "\t":
            self.column = min((self.column // 8 + 1) * 8, self.columns - 1)
            return
        assert character.isprintable(), f"control character {character!r}"
        if self.column == self.columns:
            self._newline()
        line = self.lines[self.row]
        line.extend([(" ", "")] * (self.column - len(line)))
        line[self.column : self.column + 1] = [(character, self.style)]
        self.column += 1

    def _newline(self) -> None:
        self.row, self.column = self.row + 1, 0
        if self.row == len(self.lines):
            self.lines.append([])
