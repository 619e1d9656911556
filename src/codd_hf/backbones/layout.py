"""Checkpoints whose own code does not run here, read as a model that transformers has."""

from typing import Any, ClassVar

from transformers import PretrainedConfig

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id")
KNOWN_TO_ALL = ("rope_theta", "rope_scaling", "quantization_config")
DECODING: dict[str, dict[str, Any]] = {
    "sdar": {"strategy": "threshold", "threshold": 0.9},
    "llada2_moe": {"strategy": "threshold", "threshold": 0.95},
    "Fast_dLLM_Qwen": {"strategy": "threshold", "threshold": 0.9, "block_length": 8},
}
"""By model type, how the published code decodes (arXiv 2510.06303, 2512.15745, 2509.26328)."""


class CheckpointLayout:
    """Translates one layout of `config.json` and weights to a native configuration and names.

    Fields of equal names are taken as they are. Nothing of the checkpoint's own code is run or
    kept. What is saved afterwards is native.

    Attributes:
        model_type: the checkpoint's.
        config_class: the native configuration.
        left_out: fields of the native configuration that are not taken from the checkpoint's.
        only: values that options of the checkpoint must have, since the native model has no others.
        key_mapping: patterns of the checkpoint's names of weights to native ones, if they differ.
        tokenizer_class: a native class for tokenizers that bring their own code.
    """

    model_type: ClassVar[str]
    config_class: ClassVar[type[PretrainedConfig]]
    left_out: ClassVar[tuple[str, ...]] = ()
    only: ClassVar[dict[str, Any]] = {}
    key_mapping: ClassVar[dict[str, str] | None] = None
    tokenizer_class: ClassVar[str | None] = None

    def reads(self, config: dict[str, Any]) -> bool:
        """Whether a `config.json` with this content describes a checkpoint of the layout."""
        return config.get("model_type") == self.model_type

    def other_fields(self, config: dict[str, Any]) -> dict[str, Any]:
        """The native fields that are called or computed otherwise."""
        return {}

    def translate(self, config: dict[str, Any]) -> PretrainedConfig:
        """The native configuration; raises a ValueError if it cannot say the same."""
        for name, value in self.only.items():
            if config.get(name, value) != value:
                raise ValueError(
                    f"`{name}` is {config[name]!r} in the configuration of this "
                    f"{config.get('model_type')!r} checkpoint; only {value!r} can be loaded."
                )
        names = {*self.config_class.__annotations__, *KNOWN_TO_ALL} - {*self.left_out}
        fields = {name: config[name] for name in names if config.get(name) is not None}
        fields |= {name: config.get(name) for name in SPECIAL_TOKENS}
        fields["dtype"] = config.get("dtype", config.get("torch_dtype"))
        if self.model_type in DECODING:
            fields["decoding"] = DECODING[self.model_type]
        return self.config_class(**fields | self.other_fields(config))
