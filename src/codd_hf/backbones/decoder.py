"""Decoder architectures (Llama, Qwen2) run with full instead of causal attention."""

from __future__ import annotations

from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from .family import BackboneFamily, BackboneStates


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

    def run(self, model, input_ids, attention_mask, position_ids) -> BackboneStates:
        hidden = model.get_decoder()(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
        ).last_hidden_state.to(input_ids.device)
        project = model.get_output_embeddings()

        def read_logits(index):
            # With a device map over several devices, the last layer is not where the tokens are.
            return project(hidden if index is None else hidden[index]).to(input_ids.device)

        return BackboneStates(hidden, read_logits)
