"""Machine and versions, to stand beside a figure."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any


def environment() -> dict[str, Any]:
    """The device, the threads, and the versions of what computes."""
    import torch

    packages = ("torch", "transformers", "diffusers")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "codd-hf": version("codd-hf"),
    }
