"""What names a repository: a folder of this machine, or an id on the Hub."""

from __future__ import annotations

from pathlib import Path

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
ADAPTER_FOLDER = "adapter"


def checked_name(name: str | Path, argument: str) -> str:
    """The path or id as a string.

    Args:
        name: what the user gave.
        argument: as what; the errors name it.

    Raises:
        TypeError: it is neither a path nor an id.
        FileNotFoundError: it can only be a path, and there is nothing.
    """
    if not isinstance(name, str | Path) or not str(name).strip():
        raise TypeError(f"`{argument}` must be a folder or an id on the Hub, got {name!r}.")
    text = str(name)
    local = isinstance(name, Path) or can_only_be_a_path(text)
    if local and not Path(text).expanduser().exists():
        raise FileNotFoundError(f"`{argument}`: there is no file or folder {text!r}.")
    return str(Path(text).expanduser()) if local else text


def can_only_be_a_path(text: str) -> bool:
    """Whether a name cannot be an id on the Hub (`name` or `owner/name`)."""
    return text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text


def is_local(name: str) -> bool:
    """Whether a name means something on this machine only."""
    return can_only_be_a_path(name) or Path(name).exists()
