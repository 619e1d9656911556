"""BERT-like denoisers: any model that `AutoModelForMaskedLM` can load."""

from __future__ import annotations

from transformers import AutoModelForMaskedLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from .family import BackboneFamily, BackboneStates
from .whole_model import run_whole_model


class MaskedLMFamily(BackboneFamily):
    """Already bidirectional and unshifted."""

    # What pretraining added for pairs of sentences.
    unused_weights = r"(^|\.)(pooler|pooler_transform|seq_relationship|sop_classifier|nsp_cls)\."

    def matches(self, config: PretrainedConfig) -> bool:
        return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES

    def from_config(self, config: PretrainedConfig, **kwargs) -> PreTrainedModel:
        return AutoModelForMaskedLM.from_config(config, **kwargs)

    def from_pretrained(
        self, name_or_path: str, config: PretrainedConfig, **kwargs
    ) -> PreTrainedModel:
        return AutoModelForMaskedLM.from_pretrained(name_or_path, config=config, **kwargs)

    def max_positions(self, model: PreTrainedModel) -> int | None:
        """Fewer than are stored where, as in RoBERTa, positions begin behind the padding token's.

        Raises:
            ValueError: they do, and there is no padding token.
        """
        most = super().max_positions(model)
        for module in model.modules():
            table = getattr(getattr(module, "position_embeddings", None), "weight", None)
            if table is None:
                continue
            first = 0
            if hasattr(module, "padding_idx"):
                if module.padding_idx is None:
                    raise ValueError(
                        "`pad_token_id` must be set in the configuration of a backbone of type "
                        f"{model.config.model_type!r}, whose positions are counted from it."
                    )
                first = module.padding_idx + 1
            held = len(table) - first
            most = held if most is None else min(most, held)
        return most

    def run(self, model, input_ids, attention_mask, position_ids) -> BackboneStates:
        return run_whole_model(model, input_ids, attention_mask, position_ids)
