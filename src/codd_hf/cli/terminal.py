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
    """Generates for one prompt, writes the text to standard output and returns it as it is.

    In a terminal the canvas is shown at every step, on the terminal's second screen, which leaves
    no trace on the first; a progress bar of the pipeline would get in its way.
    """
    tokenizer, mask = pipeline.tokenizer, pipeline.model.mask_token_id
    unseen = special_token_ids(tokenizer) - {mask}
    watched = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"

    def write(text: str) -> None:
        sys.stdout.write(text if watched else "")
        sys.stdout.flush()

    def show(pipeline: CoDDPipeline, step: int, timestep: Any, state: dict[str, Any]) -> dict:
        shown = state["generated"][0] | call.get("infill", False)
        tokens = state["canvas"][0][shown].tolist()
        text = tokenizer.decode([t for t in tokens if t not in unseen and t < len(tokenizer)])
        write(CLEAR + printable(text.replace(tokenizer.decode([mask]), MASK)))
        return {}

    names = ["canvas", "generated"]
    write(SECOND_SCREEN)
    try:
        output = pipeline(
            callback_on_step_end=show, callback_on_step_end_tensor_inputs=names, **call
        )
    finally:
        write(FIRST_SCREEN)
    text = "".join(output.texts or ())
    print(printable(text), flush=True)
    return text
