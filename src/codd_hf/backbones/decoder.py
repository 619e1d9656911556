"""Decoder architectures (Llama, Qwen2) run with full instead of causal attention."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from .canvas_cache import CanvasCache, cache_argument
from .family import BackboneFamily, BackboneStates, execution_device


class DecoderFamily(BackboneFamily):
    """`is_causal = False` in the configuration makes transformers build bidirectional masks."""

    model_types = ("llama", "qwen2")

    def matches(self, config: PretrainedConfig) -> bool:
        return config.model_type in self.model_types

    def adopt(self, config: PretrainedConfig) -> None:
        config.is_causal = False

    def from_config(self, config: PretrainedConfig, **kwargs) -> PreTrainedModel:
        self.adopt(config)
        return AutoModelForCausalLM.from_config(config, **kwargs)

    def from_pretrained(
        self, name_or_path: str, config: PretrainedConfig, **kwargs
    ) -> PreTrainedModel:
        self.adopt(config)
        return AutoModelForCausalLM.from_pretrained(name_or_path, config=config, **kwargs)

    def make_cache(self, model: PreTrainedModel, num_rows: int) -> CanvasCache:
        implementation = model.config._attn_implementation or "eager"
        if implementation not in ("sdpa", "eager"):
            raise ValueError(
                "`cache` needs `attn_implementation` 'sdpa' or 'eager', got "
                f"{implementation!r}: load the backbone with one of them, or leave `cache` out."
            )
        if getattr(model.config, "sliding_window", None) is not None:
            raise ValueError(
                "`cache` needs attention to the whole sequence, got a backbone with "
                f"`sliding_window={model.config.sliding_window}`: leave `cache` out."
            )
        return CanvasCache(num_rows, execution_device(model))

    def run(self, model, input_ids, attention_mask, position_ids, cache=None) -> BackboneStates:
        if cache is not None and cache.positions is not None:
            position_ids = cache.positions
            input_ids = input_ids.gather(1, position_ids)
        elif cache is not None:
            # Left out, they would be counted from the end of what is kept.
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        decoder = model.get_decoder()
        cached = {} if cache is None else {cache_argument(decoder): cache}
        hidden = decoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=cache is not None,
            **cached,
        ).last_hidden_state.to(input_ids.device)
        if cache is not None:
            hidden = cache.keep(hidden)
        project = model.get_output_embeddings()

        def read_logits(index):
            # With a device map over several devices, the last layer is not where the tokens are.
            return project(hidden if index is None else hidden[index]).to(input_ids.device)

        return BackboneStates(hidden, read_logits)
