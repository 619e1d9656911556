"""Checkpoints whose own code does not run here, read as a model that transformers has."""

import re
from typing import Any, ClassVar

from transformers import PretrainedConfig
from transformers.core_model_loading import WeightConverter, WeightRenaming

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id")
BLOCK_LENGTHS = ("block_length", "block_size", "bd_size")
"""What configurations call the length of the blocks of a block-causal attention."""
WINDOW = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
KNOWN_TO_ALL = ("head_dim", "rope_theta", "rope_scaling", "quantization_config")
MATHEMATICAL = re.compile(
    "norm|window|atte?n|rope|rotary|position|alibi|scal|cap|clip|bias|multiplier|activation|_act"
    "|residual|router|expert|gate|moe|softmax|logit|embed|layer|shift|share|tie_|mtp|predict"
)
"""Names of fields that say what a model computes."""
NEUTRAL = re.compile(
    "^_|^architectures$|drop|loss|coef|implementation|attention_type|init|^output_"
    "|cross_attention|^tie_encoder|logits_to_keep|lm_head_"
)
"""Names among them that change no prediction: training, kernels, and what encoders have."""
NATIVE = re.compile(
    "^(block_length|logit_shift|decoding|rope_local_base_freq|partial_rotary_factor)$"
    "|^sliding_window_pattern$|^num_nextn_predict_layers$"
)
"""Fields that configurations of transformers take without declaring them, and ours."""


class CheckpointLayout:
    """Translates one layout of `config.json` and weights to a native configuration and names.

    Fields of equal names are taken as they are. Nothing of the checkpoint's own code is run or
    kept. What is saved afterwards is native.

    Attributes:
        model_type: the checkpoint's.
        config_class: the native configuration.
        left_out: fields of the native configuration that are not taken from the checkpoint's.
        only: values that options of the checkpoint must have, since the native model has no others.
        read: fields of the checkpoint that `other_fields` reads, or that change no prediction.
        block_length: of a block-causal attention, where no field says it; None, full attention.
        logit_shift: whether the logits at a position predict the next token.
        decoding: how the published code decodes, as `generate` names it, if not by its defaults.
        tokens: special tokens that no file says, by the size of the vocabulary.
        key_mapping: patterns of the checkpoint's names of weights to native ones, if they differ.
        tokenizer_class: a native class for tokenizers that bring their own code.
    """

    model_type: ClassVar[str] = ""
    config_class: ClassVar[type[PretrainedConfig]]
    left_out: ClassVar[tuple[str, ...]] = ()
    only: ClassVar[dict[str, Any]] = {}
    read: ClassVar[tuple[str, ...]] = ()
    block_length: ClassVar[int | None] = None
    logit_shift: ClassVar[bool] = False
    decoding: ClassVar[dict[str, Any]] = {}
    tokens: ClassVar[dict[int, dict[str, Any]]] = {}
    key_mapping: ClassVar[dict[str, str] | None] = None
    tokenizer_class: ClassVar[str | None] = None

    def reads(self, config: dict[str, Any]) -> bool:
        """Whether a `config.json` with this content describes a checkpoint of the layout."""
        return config.get("model_type") == self.model_type

    def native_class(self, config: dict[str, Any]) -> type[PretrainedConfig]:
        """The native configuration's class."""
        return self.config_class

    def other_fields(self, config: dict[str, Any]) -> dict[str, Any]:
        """The native fields that are called or computed otherwise."""
        return {}

    def by_name(self, repository: str) -> dict[str, Any]:
        """What only the name of a repository says: `block_length`, more of `decoding`."""
        return {}

    def converters(self) -> list[WeightConverter | WeightRenaming]:
        """Conversions of weights that are more than other names; the native class's own follow."""
        return []

    def translate(self, config: dict[str, Any], repository: str = "") -> PretrainedConfig:
        """The native configuration; raises a ValueError if it cannot say the same."""
        native = self.native_class(config)
        names = {*native.__annotations__, *KNOWN_TO_ALL} - {*self.left_out}
        self._check_fields(config, names)
        fields = {name: config[name] for name in names if config.get(name) is not None}
        tokens = self.tokens.get(config.get("vocab_size", 0), {})
        for name in SPECIAL_TOKENS:
            found = config.get(name)
            fields[name] = tokens.get(name) if found is None else found
        fields["dtype"] = config.get("dtype", config.get("torch_dtype"))
        named = self.by_name(repository)
        if decoding := self.decoding | named.get("decoding", {}):
            fields["decoding"] = decoding
        given = (config[name] for name in BLOCK_LENGTHS if config.get(name) is not None)
        block_length = next(given, named.get("block_length", self.block_length))
        if block_length is not None:
            fields["block_length"] = block_length
        if self.logit_shift:
            fields["logit_shift"] = True
        return native(**fields | self.other_fields(config))

    def _check_fields(self, config: dict[str, Any], names: set[str]) -> None:
        kind = config.get("model_type")
        for name, value in self.only.items():
            found = config.get(name, value)
            if found != value and (found or value):
                raise ValueError(
                    f"`{name}` is {found!r} in the configuration of this {kind!r} checkpoint; only "
                    f"{value!r} can be loaded."
                )
        windowed = config.get("use_sliding_window", config.get("sliding_window"))
        windowed = windowed or {*(config.get("layer_types") or ())} - {"full_attention"}
        if windowed and "sliding_window" not in self.left_out:
            raise ValueError(
                f"The configuration of this {kind!r} checkpoint says that its attention has a "
                f"window (`sliding_window` is {config.get('sliding_window')!r}): such layers "
                "cannot be loaded."
            )
        known = {*names, *WINDOW, *self.left_out, *self.only, *self.read, *SPECIAL_TOKENS}
        check_unknown(config, known)


def check_unknown(config: dict[str, Any], known: set[str]) -> None:
    """Raises a ValueError for a field that is not known and whose name tells of mathematics."""
    for name in sorted(config.keys() - known):
        says = MATHEMATICAL.search(name) and not NEUTRAL.search(name)
        if config[name] not in (None, False) and says:
            raise ValueError(
                f"`{name}` is {config[name]!r:.80} in the configuration of this "
                f"{config.get('model_type')!r} checkpoint, a field that is not known here and may "
                "change what the model computes: remove it from `config.json` if it changes "
                "nothing."
            )


def check_native(config: dict[str, Any], native: type[PretrainedConfig]) -> None:
    """`check_unknown` for a checkpoint of a class that transformers has."""
    known = {*native().to_dict(), *native.attribute_map, *KNOWN_TO_ALL}
    if config.get("use_sliding_window") is False:
        known |= {*WINDOW}
    check_unknown(config, known | {name for name in config if NATIVE.search(name)})
