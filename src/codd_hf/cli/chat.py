"""Talk with a model; its canvas is shown as it resolves."""

import argparse
import contextlib
import sys
from dataclasses import dataclass
from functools import partial

from ..checks.errors import one_line, reading
from ..checks.settings import Seed
from .common import (
    AnsweringSettings,
    add_flags,
    answering_pipeline,
    decoding_arguments,
    settings_from,
    write_answer,
)

EXAMPLE = """example:
  codd-hf chat --model me/my-coupled-model --num-inference-steps 16

Each line is a message, and the model sees all that was said before. /clear begins a new
conversation, /exit (or the end of the input) leaves, and Ctrl-C stops an answer. Where standard
output is no terminal, each answer is printed once it is complete."""


@dataclass
class ChatSettings(AnsweringSettings):
    """The settings of a conversation."""

    seed: Seed = 0
    """of the first answer; that of each further one is larger by one"""


add_arguments = partial(add_flags, kind=ChatSettings, decoding=True)


def run(args: argparse.Namespace) -> None:
    """Answers line after line."""
    settings = settings_from(args, ChatSettings)
    import torch

    pipeline = answering_pipeline(settings, decoding_arguments(args))
    pipeline.set_progress_bar_config(disable=True)
    if not getattr(pipeline.tokenizer, "chat_template", None):
        raise ValueError("`--model` has no chat template: use `codd-hf generate` with it.")
    conversation: list[dict[str, str]] = []
    seed, interactive = settings.seed, sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):  # On Windows the console does this.
            # Imported for its effect: `input` then lets lines be edited and recalled.
            import readline  # noqa: F401
    while True:
        try:
            with reading("Standard input"):
                line = input("> " if interactive else "").strip()
        except EOFError:
            return
        if line == "/exit":
            return
        if line in ("", "/clear"):
            conversation = [] if line else conversation
            continue
        messages = [*conversation, {"role": "user", "content": line}]
        generator = torch.Generator().manual_seed(seed)
        call = decoding_arguments(args)
        try:
            answer = write_answer(pipeline, messages=messages, generator=generator, **call)
        except (KeyboardInterrupt, ValueError) as error:
            if not interactive:
                raise
            said = one_line(str(error)) or "stopped"
            print(f"{said} (the message is forgotten; /clear begins anew)")
        else:
            seed, conversation = seed + 1, [*messages, {"role": "assistant", "content": answer}]
