"""A canvas that resolves in the terminal, its tokens coloured by the step that committed them."""

from __future__ import annotations

import os
import shutil
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from .common import printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..pipelines.pipeline_codd import CoDDPipeline

COLOURS = (63, 33, 39, 44, 43, 42, 76, 112, 148, 184, 214, 208, 203)
"""Of the 256 colours of terminals: from blue, the first steps, to red, the last ones."""

MASK = "_"
PLAIN = "\x1b[0m"
FAINT = "\x1b[2m"


def can_redraw(stream: TextIO) -> bool:
    """Whether control sequences may be written: to a terminal, unless the user wants none.

    None are wanted where `NO_COLOR` is set to anything (no-color.org) or `TERM` is `dumb`.
    """
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def write_answer(pipeline: CoDDPipeline, **call: Any) -> str:
    """Generates for one prompt and writes the text to standard output.

    In a terminal the canvas is redrawn at every step; elsewhere the text is printed at the end.

    Args:
        pipeline: with a tokenizer; its progress bar would get in the way of the canvas.
        **call: of the pipeline, for one prompt.

    Returns:
        The text as the model gave it, control characters and all.
    """
    if not can_redraw(sys.stdout):
        text = pipeline(**call).texts[0]
        print(printable(text), flush=True)
        return text
    with CanvasView(pipeline, sys.stdout, whole=call.get("infill", False)) as view:
        output = pipeline(
            callback_on_step_end=view.on_step_end,
            callback_on_step_end_tensor_inputs=["canvas", "generated", "transfer_index"],
            **call,
        )
        view.finish(output.sequences[0].tolist(), output.texts[0])
    return output.texts[0]


class CanvasView:
    """Draws the generated part of a canvas over what it drew before.

    It needs no more lines than the terminal has: of a longer text the end is shown, until the whole
    text is written at the end.

    Args:
        pipeline: gives tokenizer, mask token and end of text, and the number of steps.
        stream: a terminal.
        whole: draw what is given as well, of a template whose gaps are filled. An end token then
            ends no more than its gap.
    """

    def __init__(self, pipeline: CoDDPipeline, stream: TextIO, whole: bool = False) -> None:
        self.pipeline = pipeline
        self.stream = stream
        self.whole = whole
        self.mask_token_id = pipeline.model.config.mask_token_id
        self._committed_in: dict[int, int] = {}
        self._lines_drawn = 0

    def __enter__(self) -> CanvasView:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is not None and self._lines_drawn:
            self.stream.write("\n")
            self.stream.flush()

    def on_step_end(
        self, pipeline: CoDDPipeline, step: int, timestep: Any, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """The pipeline's callback, for a batch of one row."""
        shown = kwargs["generated"][0] | self.whole
        committed = kwargs["transfer_index"][0][shown].nonzero()[:, 0].tolist()
        self._committed_in.update(dict.fromkeys(committed, step))
        tokens = kwargs["canvas"][0][shown].tolist()
        size = shutil.get_terminal_size()
        lines = wrapped(self._styled(tokens), size.columns - 1)[-max(size.lines - 1, 1) :]
        self._write("\x1b[K\n".join(lines) + "\x1b[J")
        self._lines_drawn = len(lines)
        return {}

    def finish(self, tokens: Sequence[int], text: str) -> None:
        """Writes the whole text in place of the canvas, coloured, as lines that can be copied."""
        parts = self._styled(tokens)
        shown = "".join(f"{style}{part}{PLAIN}" for style, part in parts)
        # A tokenizer that tidies spaces up gives a text that is not its tokens' texts joined.
        exact = "".join(part for _, part in parts) == printable(text)
        self._write("\x1b[J" + (shown if exact else printable(text)) + "\n")
        self._lines_drawn = 0

    def _write(self, text: str) -> None:
        up = f"\x1b[{self._lines_drawn - 1}A" if self._lines_drawn > 1 else ""
        self.stream.write(f"{up}\r{text}")
        self.stream.flush()

    def _styled(self, tokens: Sequence[int]) -> list[tuple[str, str]]:
        """Control sequence and text of each token, up to the end of the text unless `whole`."""
        ends = [] if self.whole else self.pipeline.said_of_task()["eos_token_id"]
        end = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
        parts = token_texts(self.pipeline.tokenizer, tokens[:end], self.mask_token_id)
        last = max(self.pipeline.num_timesteps - 1, 1)
        styled = []
        for position, part in enumerate(parts):
            step = self._committed_in.get(position)
            style = FAINT
            if tokens[position] != self.mask_token_id and step is not None:
                colour = COLOURS[min(step, last) * (len(COLOURS) - 1) // last]
                style = f"\x1b[38;5;{colour}m"
            styled.append((style, printable(part)))
        return styled


def token_texts(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], mask_token_id: int
) -> list[str]:
    """What each token adds to the text: the mask token `_`, other special tokens nothing.

    A token is decoded after the one that the text last grew by, so that it keeps its space; a
    character of several tokens counts to its last one.
    """
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.update(tokenizer.all_special_ids)
    ordinary = [token not in special and token < len(tokenizer) for token in tokens]
    texts: list[str] = []
    known: list[int] = []
    grown_from = complete = 0
    for token, is_text, goes_on in zip(tokens, ordinary, [*ordinary[1:], False], strict=True):
        if not is_text:
            texts.append(MASK if token == mask_token_id else "")
            continue
        known.append(token)
        before = tokenizer.decode(known[grown_from:complete])
        text = tokenizer.decode(known[grown_from:])
        if goes_on and text.endswith("\N{REPLACEMENT CHARACTER}"):
            texts.append("")
            continue
        texts.append(text[len(before) :])
        grown_from, complete = complete, len(known)
    return texts


def wrapped(parts: Sequence[tuple[str, str]], width: int) -> list[str]:
    """Styled texts as lines of at most `width` cells; each line sets and resets its own styles."""
    lines, line, used = [], "", 0
    for style, text in parts:
        run = ""
        for cells, character in _characters(text):
            if character == "\n" or used + cells > width:
                lines.append(line + (style + run + PLAIN if run else ""))
                line, run, used = "", "", 0
            if character != "\n":
                run += character
                used += cells
        line += style + run + PLAIN if run else ""
    return [*lines, line]


def _characters(text: str) -> Iterator[tuple[int, str]]:
    """The characters of a text and the cells they take: none, one or two; a tab is four spaces."""
    for character in text.replace("\t", "    "):
        if unicodedata.category(character) in ("Mn", "Me", "Cf"):
            yield 0, character
        else:
            yield 1 + (unicodedata.east_asian_width(character) in "WF"), character
