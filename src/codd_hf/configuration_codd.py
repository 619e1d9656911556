"""Configurations of a CoDD head and of a backbone with a head."""

# Annotations are not postponed here: they are what values are checked against.
from collections.abc import Mapping
from typing import Any

from huggingface_hub.dataclasses import type_validator
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from .checks.arguments import choice, factor, integer, number, plain, without_left_fields

COUPLINGS = ("none", "marginal", "latent")
CONDITIONINGS = ("latent", "copy")
FORMAT_VERSION = 2
MOST_LAYERS = 1 << 14
"""More than any backbone has; transformers makes layers and labels one by one."""
LEFT = {"structure": "dense", "evidence_dtype": None, "noise_conditioning": False}
"""Fields that are no more, each with the value that is the only one now."""
GONE = ("evidence_groups", "num_gate_groups", "transition_rank")
"""Fields of `format_version` 1 that ask for nothing by themselves."""
SIZES = {
    "vocab_size": (1,),
    "num_latents": (1,),
    "emission_rank": (1,),
    "copy_size": (1,),
    "context_size": (1,),
    "evidence_size": (0,),
    # No weights need be stored for positions, so that nothing else bounds their number.
    "window_length": (1, 1 << 16),
    "copy_length": (1, 1 << 16),
}
"""The least of each size, and the largest."""
OF_TRANSFORMERS = {
    *PreTrainedConfig().to_dict(),
    "_attn_implementation",
    "_commit_hash",
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "name_or_path",
    "num_labels",
    "quantization_config",
    "tie_word_embeddings",
    "torch_dtype",
    "use_cache",  # which the Trainer of transformers sets
}
"""Fields of any configuration. Not `transformers_weights`: no file says where weights are."""


def check_layers(fields: Mapping[str, Any]) -> None:
    """Raises a ValueError for more than `MOST_LAYERS` layers or labels."""
    for name, value in fields.items():
        if isinstance(value, dict):
            check_layers(value)
        elif name.endswith(("layer", "layers", "labels")) and type(value) in (int, float):
            number(name, value, most=MOST_LAYERS)


class _Configuration(PreTrainedConfig):
    """Checks the types of its fields whenever they are set, and knows all of them."""

    def __setattr__(self, name: str, value: Any) -> None:
        if (wanted := type(self).__annotations__.get(name)) is not None:
            value = plain(value)
            try:
                type_validator(name, value, wanted)
            except TypeError as error:
                wanted = wanted.__name__ if isinstance(wanted, type) else wanted
                raise ValueError(
                    f"`{name}` must be of type {wanted}, got {value!r:.100}."
                ) from error
        super().__setattr__(name, value)

    def __post_init__(self, **others: Any) -> None:
        for name, value in others.items():
            if name not in OF_TRANSFORMERS:
                raise ValueError(
                    f"`{name}` is no field of the configuration {type(self).__name__}, got "
                    f"{value!r:.100}: remove it or correct its name."
                )
        super().__post_init__(**others)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        # What a caller says in place of a file's fields is checked as those are.
        said = {name: kwargs.pop(name) for name in [*kwargs] if name in cls.__annotations__}
        return super().from_dict({**config_dict, **said}, **kwargs)

    def _check_tokens(self, vocab_size: int | None) -> None:
        ids = [self.mask_token_id or 0, *(self.forbidden_token_ids or [])]
        if beyond := [i for i in ids if i < 0 or (vocab_size is not None and i >= vocab_size)]:
            raise ValueError(
                f"`mask_token_id` and `forbidden_token_ids` must lie in [0, {vocab_size}), got "
                f"{beyond}."
            )


class CoDDHeadConfig(_Configuration):
    """Configuration of a [`CoDDHead`]: a circuit over a window of tokens.

    Args:
        vocab_size (`int`): number of tokens; must be the backbone's.
        num_latents (`int`, defaults to 1024): number of latent states `H`.
        window_length (`int`, defaults to 32): number of positions `L`.
        tie_transitions (`bool`, defaults to `True`): one transition matrix for all steps.
        tie_emissions (`bool`, defaults to `True`): one emission matrix for all positions.
        emission (`str`, defaults to `"dense"`): `"dense"`, a matrix `[H, V]`, or `"tied"` to the
            backbone's output embedding through a map of rank `emission_rank`.
        emission_rank (`int`, defaults to 128): rank of tied emissions.
        conditioning (`list[str]`, defaults to none): how the backbone's hidden states steer the
            circuit: any of `"latent"`, `"copy"`.
        copy_length (`int`, defaults to 256): how many tokens before the window `"copy"` can copy.
        copy_size (`int`, defaults to 64): size of its queries and keys.
        context_size (`int`, *optional*): the backbone's hidden size; needed with conditioning or
            tied emissions.
        evidence_size (`int`, *optional*): how many of a prediction's likeliest tokens the circuit
            reads in decoding; of the others it reads how much mass the tokens of each latent have.
            0 reads all exactly, the default unless the vocabulary is large. Emissions that are not
            tied are always read so.
        evidence_temperature (`float`, defaults to 1.0): what divided the backbone's logits when the
            head was fitted or tuned, and divides them wherever no other is named.
        alpha (`float`, defaults to 1.0): power of the token marginal by which the emissions are
            divided; 0 is the raw product of the paper.
        mask_token_id (`int`, *optional*): the backbone's mask token.
        forbidden_token_ids (`list[int]`, *optional*): tokens that are never generated, beside it.
        base_model_name_or_path (`str`, *optional*): the backbone that the head was fitted to.
        base_model_revision (`str`, *optional*): its revision.
        converted_from (`str`, *optional*): what a converted circuit was made of, for people.
        format_version (`int`, defaults to 2): version of the layout on disk.
    """

    model_type = "codd-head"
    has_no_defaults_at_init = True

    vocab_size: int
    num_latents: int = 1024
    window_length: int = 32
    tie_transitions: bool = True
    tie_emissions: bool = True
    emission: str = "dense"
    emission_rank: int = 128
    conditioning: list[str] | tuple[str, ...] | None = None
    copy_length: int = 256
    copy_size: int = 64
    context_size: int | None = None
    evidence_size: int | None = None
    evidence_temperature: float | int = 1.0
    alpha: float | int = 1.0
    mask_token_id: int | None = None
    forbidden_token_ids: list[int] | tuple[int, ...] | None = None
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    converted_from: str | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self, **others: Any) -> None:
        if self.format_version not in (1, FORMAT_VERSION):
            raise ValueError(
                f"`format_version` is {self.format_version!r:.100}; this version of codd-hf reads "
                f"up to {FORMAT_VERSION}: upgrade codd-hf."
            )
        others = without_left_fields(others, LEFT, "a head's configuration")
        if self.format_version == 1:
            others = self._upgraded(others)
        super().__post_init__(**others)
        self.conditioning = list(self.conditioning or [])
        self.validate()

    def _upgraded(self, others: dict[str, Any]) -> dict[str, Any]:
        """Turns `format_version` 1 into 2; returns what is left of `others`."""
        renamed = others.pop("evidence_top_k", None)
        if self.evidence_size is None:  # else a caller's, in place of the file's
            self.evidence_size = renamed
        self.format_version = FORMAT_VERSION
        return {name: value for name, value in others.items() if name not in GONE}

    def validate(self) -> None:
        """Checks the values, and that they go together."""
        for name, bounds in SIZES.items():
            if getattr(self, name) is not None:
                integer(name, getattr(self, name), *bounds)
        factor("evidence_temperature", self.evidence_temperature)
        number("alpha", self.alpha, least=0)
        self._check_tokens(self.vocab_size)
        choice("emission", self.emission, ("dense", "tied"))
        kinds = self.conditioning or []
        if len(set(kinds) & set(CONDITIONINGS)) < len(kinds):
            raise ValueError(
                f"`conditioning` must list some of {', '.join(CONDITIONINGS)}, each once, got "
                f"{kinds}."
            )
        if self.context_size is None and (kinds or self.emission == "tied"):
            raise ValueError(
                "`context_size` (the backbone's hidden size) is needed with `conditioning` or tied "
                "emissions."
            )
        if self.emission == "tied" and not self.tie_emissions:
            raise ValueError(
                "`emission` 'tied' is the same at all positions: set `tie_emissions` to true."
            )


class CoDDConfig(_Configuration):
    """Configuration of a [`CoDDModel`]: a backbone and a head.

    Args:
        text_config (`PreTrainedConfig` or `dict`): the backbone's configuration.
        head_config (`CoDDHeadConfig` or `dict`, *optional*): the head's; None is a bare backbone.
        coupling (`str`, defaults to `"none"`): what `logits` of a forward pass are if the call does
            not say: `"none"`, `"marginal"` or `"latent"`.
        mask_token_id (`int`, *optional*): defaults to the head's, then the backbone's.
        forbidden_token_ids (`list[int]`, *optional*): tokens that are never generated; defaults to
            the head's.
    """

    model_type = "codd"
    has_no_defaults_at_init = True
    # The head is left out: it has no attention, and a dtype of its own.
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012

    text_config: Any = None
    head_config: Any = None
    coupling: str = "none"
    mask_token_id: int | None = None
    forbidden_token_ids: list[int] | tuple[int, ...] | None = None

    def __post_init__(self, **others: Any) -> None:
        self.text_config = _made("text_config", self.text_config, CONFIG_MAPPING)
        if (head := self.head_config) is not None:
            if isinstance(head, dict):
                head = {"model_type": CoDDHeadConfig.model_type} | head
            known = {CoDDHeadConfig.model_type: CoDDHeadConfig}
            self.head_config = head = _made("head_config", head, known)
        # Unset, they would unset those of a backbone which is already built.
        others.setdefault("attn_implementation", self.text_config._attn_implementation)
        others.setdefault("experts_implementation", {})
        super().__post_init__(**others)
        for name in ("mask_token_id", "forbidden_token_ids"):
            if getattr(self, name) is None and head is not None:
                setattr(self, name, getattr(head, name))
        if self.mask_token_id is None:
            self.mask_token_id = getattr(self.text_config, "mask_token_id", None)
        self.tie_word_embeddings = getattr(self.text_config, "tie_word_embeddings", False)
        self.validate()

    def validate(self) -> None:
        """Checks that the coupling is a known one, and the tokens are the vocabulary's."""
        choice("coupling", self.coupling, COUPLINGS)
        text = getattr(self.text_config, "get_text_config", lambda: self.text_config)()
        self._check_tokens(getattr(text, "vocab_size", None))

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """Of the backbone's text part, which is the backbone unless it reads images too."""
        return self.text_config.get_text_config(*args, **kwargs)

    @property
    def vocab_size(self) -> int:
        """The backbone's."""
        return self.get_text_config().vocab_size

    @property
    def hidden_size(self) -> int:
        """The backbone's."""
        return self.get_text_config().hidden_size

    @property
    def eos_token_id(self) -> int | list[int] | None:
        """The backbone's."""
        return getattr(self.get_text_config(), "eos_token_id", None)

    @property
    def pad_token_id(self) -> int | None:
        """The backbone's."""
        return getattr(self.get_text_config(), "pad_token_id", None)

    @property
    def canvas_length(self) -> int | None:
        """The backbone's, if it denoises canvases of one length."""
        return getattr(self.text_config, "canvas_length", None)


def _made(name: str, config: Any, known: Mapping[str, type[PreTrainedConfig]]) -> PreTrainedConfig:
    if isinstance(config, PreTrainedConfig):
        return config
    if not isinstance(config, dict):
        raise ValueError(f"`{name}` must be a configuration or a dict, got {config!r}.")
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in known:
        raise ValueError(
            f"`{name}.model_type` must be one that is known here, got {model_type!r}; a "
            "backbone that brings its own code is loaded by transformers, and given with the head "
            "to `CoDDModel.from_backbone`."
        )
    check_layers(config)
    return known[model_type].from_dict(dict(config))


for _config in (CoDDConfig, CoDDHeadConfig):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
