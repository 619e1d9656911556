"""Backbones: one short file per family of diffusion language models, and how they are found.

A *family* runs models of an architecture (`DecoderFamily`, `MaskedLMFamily`, and for decoders that
nobody has named `OtherDecoderFamily`); objects whose class is not of transformers are run by the
conventions that all have in common (`BackboneFamily`). Of several, the one added last counts.
A *layout* reads checkpoints whose own code does not run here as models of a family (`LLaDALayout`,
`DreamLayout`). `load_backbone` goes from a name to a model, `family_of` from a model's
configuration to its family.

**Adding an architecture that transformers has.** Name its model types, let each position see the
whole sequence (`bidirectional`), and read the hidden state and the logits computed at each
position (`run`). For a decoder that heeds `is_causal`, the model type is all:

    from codd_hf.backbones import FAMILIES, DecoderFamily


    class OlmoFamily(DecoderFamily):
        model_types = ("olmo2",)


    FAMILIES.append(OlmoFamily())

Padding, block-causal attention (`config.block_length`) and logits that are of the next token
(`config.logit_shift`) are common to all families, and need nothing.

**Adding a checkpoint layout.** Recognise its `config.json`, give the fields of the native
configuration that have another name, and map the names of weights. Use patterns with at most one
group, anchored at the start; `converters` splits or joins matrices (`LLaDA2Layout`). A field that
neither the native configuration nor the layout knows is refused where its name tells of mathematics
(`CheckpointLayout.read` lists those that are known):

    from transformers import LlamaConfig
    from codd_hf.backbones import LAYOUTS, CheckpointLayout


    class AcmeLayout(CheckpointLayout):
        model_type = "acme-diffusion"
        config_class = LlamaConfig
        key_mapping = {
            r"^embed\\.": "model.embed_tokens.",
            r"^head\\.": "lm_head.",
            r"^final_norm\\.": "model.norm.",
            r"^layer(\\d+)\\.": r"model.layers.\\1.",
        }

        def other_fields(self, config):
            return {"num_hidden_layers": config["depth"], "mask_token_id": config["mask"]}


    LAYOUTS.append(AcmeLayout())

Then compare with logits of the original code, padded rows included, as `tests/test_backbones_*.py`
do, and check that a causal control differs.
"""

from .diffusion_gemma import DiffusionGemmaFamily
from .dream import DreamLayout, DreamReasonerLayout
from .family import (
    FAMILIES,
    LAYOUTS,
    BackboneFamily,
    BackboneStates,
    DecoderFamily,
    block_length_of,
    decoding_of,
    execution_device,
    family_of,
    is_known,
    noise_of,
    shifts_logits,
)
from .layout import CheckpointLayout
from .llada import LLaDALayout
from .llada2 import LLaDA2Layout
from .llada_moe import LLaDAMoELayout
from .loading import load_backbone, load_tokenizer
from .masked_lm import MaskedLMFamily
from .other_decoders import OtherDecoderFamily
from .same_names import A2DLayout, FastDLLMLayout, ILLaDALayout, StableDiffCoderLayout
from .sdar import SDARLayout

FAMILIES += [OtherDecoderFamily(), MaskedLMFamily(), DecoderFamily(), DiffusionGemmaFamily()]
LAYOUTS += [LLaDALayout(), DreamLayout(), DreamReasonerLayout(), SDARLayout()]
LAYOUTS += [LLaDAMoELayout(), LLaDA2Layout(), FastDLLMLayout(), StableDiffCoderLayout()]
LAYOUTS += [ILLaDALayout(), A2DLayout()]

__all__ = [
    "FAMILIES",
    "LAYOUTS",
    "BackboneFamily",
    "BackboneStates",
    "CheckpointLayout",
    "DecoderFamily",
    "LLaDALayout",
    "block_length_of",
    "decoding_of",
    "execution_device",
    "family_of",
    "is_known",
    "load_backbone",
    "load_tokenizer",
    "noise_of",
    "shifts_logits",
]
