"""BERT-like denoisers: any model that `AutoModelForMaskedLM` can load."""

from typing import Any

import torch
from transformers import AutoModelForMaskedLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from .family import BackboneFamily


class MaskedLMFamily(BackboneFamily):
    """Already bidirectional and unshifted."""

    auto_class = AutoModelForMaskedLM
    model_types = MODEL_FOR_MASKED_LM_MAPPING_NAMES
    # Pretraining added them for pairs of sentences.
    unused_weights = r"(^|\.)(pooler|pooler_transform|seq_relationship|sop_classifier|nsp_cls)\."

    def max_positions(self, model: PreTrainedModel) -> int | None:
        """Fewer than are stored where, as in RoBERTa, positions begin behind padding's."""
        limits = [super().max_positions(model)]
        for module in model.modules():
            table = getattr(getattr(module, "position_embeddings", None), "weight", None)
            first: Any = getattr(module, "padding_idx", -1)
            if isinstance(table, torch.Tensor) and first is None:
                raise ValueError(
                    "`pad_token_id` must be set in the configuration of a backbone of type "
                    f"{model.config.model_type!r}, whose positions are counted from it."
                )
            if isinstance(table, torch.Tensor):
                limits.append(len(table) - first - 1)
        return min((limit for limit in limits if limit is not None), default=None)
