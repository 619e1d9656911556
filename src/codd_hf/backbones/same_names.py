"""Families whose weights have the names of a native class, and what their configurations omit."""

from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, LlamaConfig, PretrainedConfig, Qwen2Config

from .family import DecoderFamily
from .layout import CheckpointLayout


class FastDLLMLayout(CheckpointLayout):
    """Fast-dLLM v2 (arXiv 2509.26328): a Qwen2 in blocks, the last position of which predicts the
    first token of the next."""

    model_type = "Fast_dLLM_Qwen"
    config_class = Qwen2Config
    block_length = 32
    logit_shift = True
    decoding: ClassVar = {"strategy": "threshold", "threshold": 0.9, "block_length": 8}
    tokens: ClassVar = {
        size: {"mask_token_id": 151665, "eos_token_id": [151645, 151643]}
        for size in (151936, 152064)
    }
    tokenizer_class = "Qwen2Tokenizer"


class StableDiffCoderLayout(CheckpointLayout):
    """Stable-DiffCoder: a Llama in blocks, told by its architecture."""

    config_class = LlamaConfig
    block_length = 4
    decoding: ClassVar = {"strategy": "threshold", "threshold": 0.95}
    tokens: ClassVar = {155136: {"mask_token_id": 5}}

    def reads(self, config: dict[str, Any]) -> bool:
        """Its model type is Llama's, and the name of its class is in one of two places."""
        classes = [*(config.get("architectures") or ()), *(config.get("auto_map") or {}).values()]
        return any(str(name).endswith("iffcoderForCausalLM") for name in classes)


class ILLaDALayout(CheckpointLayout):
    """iLLaDA (arXiv 2606.25331): a Llama that sees everything, with one matrix for both ends."""

    config_class = LlamaConfig
    only: ClassVar = {"layer_norm_eps": None}  # it would be a LayerNorm then
    tokens: ClassVar = {155136: {"mask_token_id": 5}}

    def reads(self, config: dict[str, Any]) -> bool:
        """Told by its architecture."""
        return config.get("architectures") == ["ILLaDAForCausalLM"]

    def other_fields(self, config: dict[str, Any]) -> dict[str, Any]:
        """Tied, where it does not say otherwise."""
        return {"tie_word_embeddings": config.get("tie_word_embeddings", True)}


class A2DLayout(CheckpointLayout):
    """Autoregressive models that dllm made diffusion LMs of: `a2d-` and the model type of the base.

    Those of block diffusion do not say so: `block_length` is the user's (also in `config.json`).
    """

    def reads(self, config: dict[str, Any]) -> bool:
        """The base is a decoder that loads here."""
        prefix, _, base = str(config.get("model_type")).partition("a2d-")
        return not prefix and base in DecoderFamily.model_types

    def native_class(self, config: dict[str, Any]) -> type[PretrainedConfig]:
        """The base's."""
        return CONFIG_MAPPING[config["model_type"].removeprefix("a2d-")]
