"""A process that renders chat templates for another (`chat_templates`), by transformers alone.

Requests are pickles on standard input; a reply is a line of JSON on standard output, with a text or
an error. The process imports neither torch nor this package, and so starts in less than a second.
"""

import contextlib
import json
import pickle
import sys

from transformers.utils.chat_template_utils import render_jinja_template


def serve(memory: int, most_characters: int) -> None:
    """Renders until the input ends, with so many bytes of memory where the system can limit it."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    requests, replies = sys.stdin.buffer, sys.stdout
    sys.stdout = sys.stderr  # for prints of libraries
    print("ready", file=replies, flush=True)
    while requests.peek(1):
        request = pickle.load(requests)
        try:
            ((text,), _) = render_jinja_template(**request)
            if max(len(text), len(request["chat_template"])) > most_characters:
                raise ValueError(f"more than {most_characters:,} characters")
            reply = {"text": text}
        except BaseException as error:
            reply = {"error": f"{type(error).__name__}: {error}"[:1000]}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    serve(*map(int, sys.argv[1:]))
