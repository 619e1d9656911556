"""Files of a model that a library could not read, or would pass over: found before it tries."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import safe_open

from .arguments import shown
from .errors import reason

TYPES = {
    "_name_or_path": (str,),
    "eos_token_id": (int, list),
    "model_max_length": (int, float),
    "output_attentions": (bool,),
    "output_hidden_states": (bool,),
    "pad_token_id": (int,),
}
"""Of fields that transformers takes as they are, and stumbles over in use."""
REMEDY = "save it or download it again"


def check_files(folder: Path) -> None:
    """Reads what describes a model, a scheduler or a tokenizer, and the headers of weight files.

    Raises:
        OSError: a file is damaged; the sentence names it.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        for read in (read for pattern, read in FILES.items() if path.match(pattern)):
            if not path.is_file():
                raise OSError(f"{str(path)!r} must be a file, and is none: {REMEDY}.")
            try:
                read(path)
            except Exception as error:
                if isinstance(error, OSError) and error.errno is None:
                    raise
                raise _damaged(path, error) from error


def json_object(path: Path) -> dict[str, Any]:
    """The content of a JSON file.

    Raises:
        OSError: it is damaged, or no object.
    """
    stat = path.stat()
    return _parsed(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=64)
def _parsed(path: Path, *version: int) -> dict:
    """The object, read once as long as its `version` (time and size) stays."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, error) from error
    if not isinstance(content, dict):
        raise OSError(
            f"{str(path)!r} must hold a JSON object, got {type(content).__name__}: {REMEDY}."
        )
    return content


def _damaged(path: Path, error: Exception) -> OSError:
    return OSError(f"{str(path)!r} is damaged ({reason(error)}): {REMEDY}.")


def _config(path: Path) -> None:
    parts = [json_object(path)]
    for part in parts:
        parts += [value for value in part.values() if isinstance(value, dict)]
        for name, kinds in TYPES.items():
            value = part.get(name)
            if value is not None and type(value) not in kinds:
                raise OSError(
                    f"{str(path)!r} must hold a `{name}` of type "
                    f"{' or '.join(kind.__name__ for kind in kinds)}, got {shown(value)}: {REMEDY}."
                )


def _index(path: Path) -> None:
    names = json_object(path).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise OSError(
            f"{str(path)!r} must say in `weight_map` in which file each weight is: {REMEDY}."
        )
    for name in dict.fromkeys(names.values()):
        if Path(name).name != name or not (path.parent / name).is_file():
            raise OSError(
                f"{str(path)!r} names the file {name!r}, which is not beside it: {REMEDY}."
            )


def _tokenizer(path: Path) -> None:
    content = json_object(path)
    if not isinstance(content.get("model"), dict) or not isinstance(
        content.get("added_tokens"), list
    ):
        raise OSError(f"{str(path)!r} must hold a `model` and a list of `added_tokens`: {REMEDY}.")


def _text(path: Path) -> None:
    path.read_text("utf-8")


def _weights(path: Path) -> None:
    with safe_open(path, framework="pt"):
        pass


FILES = {
    "*config.json": _config,
    "model_index.json": json_object,
    "tokenizer.json": _tokenizer,
    "special_tokens_map.json": json_object,
    "added_tokens.json": json_object,
    "*.jinja": _text,
    "*.safetensors.index.json": _index,
    "*.safetensors": _weights,
}
