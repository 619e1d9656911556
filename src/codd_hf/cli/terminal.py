"""A canvas that resolves in the terminal, its tokens coloured by the step that committed them."""

from __future__ import annotations

import os
import shutil
import sys
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

from ..checks.errors import printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..pipelines.pipeline_codd import CoDDPipeline

COLOURS = (63, 33, 39, 44, 43, 42, 76, 112, 148, 184, 214, 208, 203)
"""Of the 256 colours of terminals: from blue, the first steps, to red, the last ones."""

MASK = "_"
PLAIN = "\x1b[0m"
FAINT = "\x1b[2m"


def can_redraw(stream: TextIO) -> bool:
    """Whether a stream is a terminal, and neither `NO_COLOR` nor `TERM=dumb` is set."""
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
    view = CanvasView(pipeline, sys.stdout, whole=call.get("infill", False))
    try:
        output = pipeline(
            callback_on_step_end=view.on_step_end,
            callback_on_step_end_tensor_inputs=["canvas", "generated", "transfer_index"],
            **call,
        )
    except BaseException:
        view.write("\n" if view.lines_drawn else "")
        raise
    view.finish(output.sequences[0].tolist(), output.texts[0])
    return output.texts[0]


class CanvasView:
    """Draws the generated part of a canvas over the one before.

    A text of more lines than the terminal has is cut to its end, until the whole text is written at
    the end.

    Args:
        pipeline: gives tokenizer, mask token and end of text, and the number of steps.
        stream: a terminal.
        whole: draw the text around the gaps of a template too; an end token then ends only its gap.
    """

    def __init__(self, pipeline: CoDDPipeline, stream: TextIO, whole: bool = False) -> None:
        self.pipeline, self.stream, self.whole = pipeline, stream, whole
        self.lines_drawn = 0
        self._committed_in: dict[int, int] = {}

    def on_step_end(
        self, pipeline: CoDDPipeline, step: int, timestep: Any, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """The pipeline's callback, for a batch of one row."""
        shown = kwargs["generated"][0] | self.whole
        committed = kwargs["transfer_index"][0][shown].nonzero()[:, 0].tolist()
        self._committed_in.update(dict.fromkeys(committed, step))
        size = shutil.get_terminal_size()
        parts = self._styled(kwargs["canvas"][0][shown].tolist())
        lines = wrapped(parts, size.columns - 1)[-max(size.lines - 1, 1) :]
        self._redraw("\x1b[K\n".join(lines) + "\x1b[J")
        self.lines_drawn = len(lines)
        return {}

    def finish(self, tokens: Sequence[int], text: str) -> None:
        """Writes the whole text in place of the canvas, coloured, as lines that can be copied."""
        parts, plain = self._styled(tokens), printable(text)
        # A tokenizer that tidies spaces up gives a text that is not its tokens' texts joined.
        if "".join(part for _, part in parts) == plain:
            plain = "".join(f"{style}{part}{PLAIN}" for style, part in parts)
        self._redraw(f"\x1b[J{plain}\n")

    def write(self, text: str) -> None:
        """Writes to the terminal at once."""
        self.stream.write(text)
        self.stream.flush()

    def _redraw(self, text: str) -> None:
        up = f"\x1b[{self.lines_drawn - 1}A" if self.lines_drawn > 1 else ""
        self.write(f"{up}\r{text}")

    def _styled(self, tokens: Sequence[int]) -> list[tuple[str, str]]:
        """Control sequence and text of each token, up to the end of the text unless `whole`."""
        ends = [] if self.whole else self.pipeline.task()["eos_token_id"]
        end = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
        mask_token_id = self.pipeline.model.config.mask_token_id
        last = max(self.pipeline.num_timesteps - 1, 1)
        styled = []
        for i, part in enumerate(token_texts(self.pipeline.tokenizer, tokens[:end], mask_token_id)):
            style, step = FAINT, self._committed_in.get(i)
            if tokens[i] != mask_token_id and step is not None:
                style = f"\x1b[38;5;{COLOURS[min(step, last) * (len(COLOURS) - 1) // last]}m"
            styled.append((style, printable(part)))
        return styled


def token_texts(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], mask_token_id: int
) -> list[str]:
    """The part that each token adds to the text: `_` for masks, none for other special tokens.

    A token is decoded after the one before, so that it keeps its space; a character of several
    tokens counts to its last one.
    """
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.update(tokenizer.all_special_ids)
    is_text = [token not in special and token < len(tokenizer) for token in tokens]
    texts: list[str] = []
    written: list[int] = []
    before = done = 0
    for token, ordinary, goes_on in zip(tokens, is_text, [*is_text[1:], False], strict=True):
        part = MASK if token == mask_token_id else ""
        if ordinary:
            written.append(token)
            text = tokenizer.decode(written[before:])
            if not (goes_on and text.endswith("\N{REPLACEMENT CHARACTER}")):
                part = text[len(tokenizer.decode(written[before:done])) :]
                before, done = done, len(written)
        texts.append(part)
    return texts


def wrapped(parts: Sequence[tuple[str, str]], width: int) -> list[str]:
    """Styled texts as lines of at most `width` cells; each character sets and resets its style."""
    lines, used = [""], 0
    for style, text in parts:
        for character in text.replace("\t", "    "):
            cells = 1 + (unicodedata.east_asian_width(character) in "WF")
            if unicodedata.category(character) in ("Mn", "Me", "Cf"):
                cells = 0
            if character == "\n" or used + cells > width:
                lines.append("")
                used = 0
            if character != "\n":
                lines[-1] += style + character + PLAIN
                used += cells
    return lines
