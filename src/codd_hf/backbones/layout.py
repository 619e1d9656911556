"""Checkpoints whose own code does not run here, read as a model that transformers has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from transformers import PretrainedConfig


class CheckpointLayout(ABC):
    """Translates one layout of `config.json` and weights to a native configuration and names.

    Nothing of the checkpoint's own code is run or kept. What is saved afterwards is native.

    Attributes:
        key_mapping: patterns of the checkpoint's names of weights to replacements, as for
            `from_pretrained`; None where the names are the native ones.
        tokenizer_class: a native class for tokenizers that bring their own code; None where
            `AutoTokenizer` needs no help.
    """

    key_mapping: dict[str, str] | None = None
    tokenizer_class: str | None = None

    @abstractmethod
    def reads(self, config: dict[str, Any]) -> bool:
        """Whether a `config.json` with this content describes a checkpoint of the layout."""

    @abstractmethod
    def translate(self, config: dict[str, Any]) -> PretrainedConfig:
        """The native configuration.

        Raises:
            ValueError: the configuration asks for what the native model does not have.
        """


SHARED_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id")


def shared_fields(config: dict[str, Any]) -> dict[str, Any]:
    """What any configuration names alike: special tokens, dtype, a stored quantization."""
    fields = {name: config.get(name) for name in SHARED_FIELDS}
    fields["dtype"] = config.get("dtype", config.get("torch_dtype"))
    if config.get("quantization_config") is not None:
        fields["quantization_config"] = config["quantization_config"]
    return fields
