"""Decoder architectures (Llama, Qwen2) run with full instead of causal attention."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from .canvas_cache import CanvasCache, cache_argument
from .family import BackboneFamily, BackboneStates, Index, execution_device


class DecoderFamily(BackboneFamily):
    """`is_causal = False` in the configuration makes transformers build bidirectional masks."""

    auto_class = AutoModelForCausalLM
    model_types = ("llama", "qwen2")
    bidirectional = {"is_causal": False}  # noqa: RUF012

    def make_cache(self, model: PreTrainedModel, num_rows: int) -> CanvasCache:
        """Needs attention by a mask over the whole canvas."""
        implementation = model.config._attn_implementation or "eager"
        window = getattr(model.config, "sliding_window", None)
        if implementation not in ("sdpa", "eager") or window is not None:
            raise ValueError(
                "`cache` needs `attn_implementation` 'sdpa' or 'eager' and no sliding window, got "
                f"{implementation!r} with `sliding_window={window}`: leave `cache` out."
            )
        return CanvasCache(num_rows, execution_device(model))

    def run(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: CanvasCache | None = None,
    ) -> BackboneStates:
        """Runs the decoder, and projects where logits are read."""
        decoder, project = model.get_decoder(), model.get_output_embeddings()
        cached: dict[str, Any] = {}
        if cache is not None:
            cached = {"use_cache": True, cache_argument(decoder): cache}
            position_ids = cache.positions
            if position_ids is None:  # left out, they would be counted from the end of the cache
                position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
            else:
                input_ids = input_ids.gather(1, position_ids)
        hidden = decoder(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **cached
        ).last_hidden_state.to(input_ids.device)
        if cache is not None:
            hidden = cache.keep(hidden)

        def read_logits(index: Index | None) -> torch.Tensor:
            # With a device map over several devices, the last layer is not where the tokens are.
            return project(hidden if index is None else hidden[index]).to(input_ids.device)

        return BackboneStates(hidden, read_logits)
