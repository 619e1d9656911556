"""Files of a model that a library could not read, or would pass over: found before it tries."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

from safetensors import safe_open

from .errors import reason

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
                raise OSError(f"{str(path)!r} is damaged ({reason(error)}): {REMEDY}.") from error


def _object(path: Path) -> dict:
    stat = path.stat()
    return _parsed(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=64)
def _parsed(path: Path, *version: int) -> dict:
    """A JSON object, read once as long as its `version` (time and size) stays."""
    content = json.loads(path.read_text("utf-8"))
    if not isinstance(content, dict):
        raise OSError(
            f"{str(path)!r} must hold a JSON object, got {type(content).__name__}: {REMEDY}."
        )
    return content


def _index(path: Path) -> None:
    names = _object(path).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise OSError(
            f"{str(path)!r} must say in `weight_map` in which file each weight is: {REMEDY}."
        )
    for name in dict.fromkeys(names.values()):
        if Path(name).name != name or not (path.parent / name).is_file():
            raise OSError(
                f"{str(path)!r} names the file {name!r}, which is not beside it: {REMEDY}."
            )


def _text(path: Path) -> None:
    path.read_text("utf-8")


def _weights(path: Path) -> None:
    with safe_open(path, framework="pt"):
        pass


FILES = {
    "*config.json": _object,
    "model_index.json": _object,
    "tokenizer.json": _object,
    "special_tokens_map.json": _object,
    "added_tokens.json": _object,
    "*.jinja": _text,
    "*.safetensors.index.json": _index,
    "*.safetensors": _weights,
}
