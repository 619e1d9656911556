"""BERT-like denoisers: any model that `AutoModelForMaskedLM` can load."""

from __future__ import annotations

import inspect

from transformers import AutoModelForMaskedLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from .family import BackboneFamily, BackboneStates


class MaskedLMFamily(BackboneFamily):
    """Already bidirectional and unshifted; their heads differ, so logits are read off."""

    def matches(self, config: PretrainedConfig) -> bool:
        return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES

    def from_config(self, config: PretrainedConfig, **kwargs) -> PreTrainedModel:
        return AutoModelForMaskedLM.from_config(config, **kwargs)

    def from_pretrained(self, name_or_path: str, config: PretrainedConfig, **kwargs):
        return AutoModelForMaskedLM.from_pretrained(name_or_path, config=config, **kwargs)

    def states(self, model, input_ids, attention_mask=None, position_ids=None) -> BackboneStates:
        kwargs = {}
        if position_ids is not None:
            if "position_ids" not in inspect.signature(model.forward).parameters:
                raise ValueError(
                    f"`position_ids` cannot be given to {type(model).__name__}: leave them out."
                )
            kwargs["position_ids"] = position_ids
        output = model(
            input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True, **kwargs
        )
        logits = output.logits
        return BackboneStates(
            output.hidden_states[-1], lambda index: logits if index is None else logits[index]
        )
