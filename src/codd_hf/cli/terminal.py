"""A canvas that resolves in the terminal."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from ..checks.errors import printable
from ..text.encoding import special_token_ids

if TYPE_CHECKING:
    from ..pipelines.pipeline_codd import CoDDPipeline

SECOND_SCREEN, FIRST_SCREEN = "\x1b[?1049h", "\x1b[?1049l"
CLEAR = "\x1b[H\x1b[2J"
MASK = "_"


def write_answer(pipeline: CoDDPipeline, **call: Any) -> str:
    """Generates for one prompt and writes the text to standard output.

    In a terminal the canvas is shown at every step, on the terminal's second screen, which leaves
    no trace on the first.

    Args:
        pipeline: with a tokenizer; its progress bar would get in the way of the canvas.
        **call: of the pipeline, for one prompt.

    Returns:
        The text as the model gave it, control characters and all.
    """
    if not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
        text = "".join(pipeline(**call).texts or ())
        print(printable(text), flush=True)
        return text
    tokenizer, mask = pipeline.tokenizer, pipeline.model.mask_token_id
    unseen = special_token_ids(tokenizer) - {mask}

    def show(pipeline: CoDDPipeline, step: int, timestep: Any, state: dict[str, Any]) -> dict:
        shown = state["generated"][0] | call.get("infill", False)
        tokens = state["canvas"][0][shown].tolist()
        text = tokenizer.decode([t for t in tokens if t not in unseen and t < len(tokenizer)])
        write(CLEAR + printable(text.replace(tokenizer.decode([mask]), MASK)))
        return {}

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    names = ["canvas", "generated"]
    write(SECOND_SCREEN)
    try:
        output = pipeline(
            callback_on_step_end=show, callback_on_step_end_tensor_inputs=names, **call
        )
    finally:
        write(FIRST_SCREEN)
    text = "".join(output.texts or ())
    write(printable(text) + "\n")
    return text
