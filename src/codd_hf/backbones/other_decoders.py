"""Decoders that transformers has and nobody has named here."""

import warnings

import torch
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..checks.errors import reason
from .family import DecoderFamily, execution_device


class OtherDecoderFamily(DecoderFamily):
    """Run as the named ones are, if a short pass shows that they heed `is_causal = False`."""

    model_types = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    def check(self, model: PreTrainedModel) -> None:
        """Raises a ValueError unless the first position sees the last; warns of what is assumed."""
        kind, length = model.config.model_type, 4
        ids = torch.ones(2, length, dtype=torch.long, device=execution_device(model))
        ids[1, -1] = 0
        try:
            with torch.no_grad():
                first, other = self.run(model.eval(), ids, None, None).last_hidden_state[:, 0]
        except Exception as error:
            raise ValueError(
                f"A model of type {kind!r} cannot be run as a decoder that sees both ways: "
                f"{reason(error)}."
            ) from error
        if torch.allclose(first, other, rtol=1e-5, atol=1e-7):
            raise ValueError(
                f"A model of type {kind!r} is causal whatever `is_causal` says, so that it cannot "
                "fill masks: take a decoder of another type, or a masked language model."
            )
        warnings.warn(
            f"The model type {kind!r} has not been compared with a published diffusion LM: assumed "
            "are attention to the whole row (else give `block_length`), logits of a position's own "
            "token (else `logit_shift=True`), and a mask token that is given or the tokenizer's.",
            stacklevel=3,
        )
