"""Chat templates that come with a tokenizer, rendered in bounded time and memory.

A template is a program: it may loop for ever, or ask for all memory at once. transformers renders
it in jinja2's sandbox, which bounds neither; a process of its own can be bounded, and ended.
"""

from __future__ import annotations

import atexit
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from threading import Lock, Timer
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import get_json_schema

SECONDS = 5.0
MEMORY = 1 << 30
MOST_CHARACTERS = 1 << 22
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""That of the tokenizers which this package trains; it is rendered in this process."""


def render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], /, **kwargs: Any
) -> str:
    """A conversation as `tokenizer.apply_chat_template` writes it, without tokenizing.

    Raises:
        ValueError: the template refuses it, or takes too much time or memory.
    """
    tools = kwargs.pop("tools", None)
    if tools is not None:
        kwargs["tools"] = [t if isinstance(t, dict) else get_json_schema(t) for t in tools]
    template = tokenizer.get_chat_template(kwargs.pop("chat_template", None), tools)
    if template == CHAT_TEMPLATE:
        kwargs["tokenize"] = False
        return tokenizer.apply_chat_template(messages, chat_template=template, **kwargs)
    request = {**tokenizer.special_tokens_map, **kwargs}
    return _worker.render({**request, "conversations": [messages], "chat_template": template})


class _Worker:
    """The process that renders, started at the first template; one request at a time."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.process: subprocess.Popen | None = None

    def render(self, request: dict[str, Any]) -> str:
        try:
            sent = pickle.dumps(request)
        except Exception as error:  # of many types; mostly of a function
            raise ValueError(f"an argument cannot be sent to its process: {error}") from error
        with self.lock:
            self.process = process = self.process or _start()
            timer = Timer(SECONDS, process.kill)
            timer.start()
            try:
                process.stdin.write(sent)
                process.stdin.flush()
                reply = json.loads(process.stdout.readline())
            except (OSError, ValueError):
                self.stop()
                reply = {"error": f"it takes longer than {SECONDS:g} seconds, or too much memory"}
            finally:
                timer.cancel()
        if "error" in reply:
            raise ValueError(reply["error"])
        return reply["text"]

    def stop(self) -> None:
        if self.process is not None:
            with self.process as process:
                process.kill()
            self.process = None


def _start() -> subprocess.Popen:
    script = Path(__file__).with_name("template_worker.py")
    process = subprocess.Popen(
        [sys.executable, "-P", str(script), str(MEMORY), str(MOST_CHARACTERS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the parent
    )
    process.stdout.readline()  # the time that its imports take is not the template's
    return process


_worker = _Worker()
atexit.register(_worker.stop)
if hasattr(os, "register_at_fork"):  # a pipe answers one process
    os.register_at_fork(after_in_child=_worker.__init__)
