"""Promises of the backbone families: full or block-causal attention, states and their logits."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoConfig,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    RoFormerConfig,
    RoFormerForMaskedLM,
)

from codd_hf import CoDDModel
from codd_hf.backbones import family_of
from codd_hf.backbones.canvas_cache import cache_argument
from tiny import BACKBONES, tiny_backbone, tiny_model

IDS = torch.tensor([[5, 6, 2, 7, 2, 8, 3], [9, 2, 3, 4, 2, 10, 11]])
BLOCK = 3
DECODERS = pytest.mark.parametrize("kind", ["llama", "qwen2"])


def padded(side: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """`IDS`, of which the first row ends or begins with two positions of padding, and the mask."""
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    if side is not None:
        mask[0, slice(0, 2) if side == "left" else slice(5, 7)] = 0
        ids[0, mask[0].bool()] = IDS[0, :5]
    return ids * mask, mask


@pytest.mark.parametrize("kind", BACKBONES)
def test_every_position_sees_the_whole_sequence_also_as_one_block(kind):
    model = tiny_model(kind)
    reference = model(IDS).logits
    for changed_position in range(7):
        changed = IDS.clone()
        changed[:, changed_position] = torch.where(changed[:, changed_position] == 11, 5, 11)
        difference = (model(changed).logits - reference).abs().amax((0, 2))
        assert (difference > 1e-4).all()
    one_block = CoDDModel.from_backbone(tiny_backbone(kind, block_length=7))
    assert torch.allclose(one_block(IDS).logits, reference, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@DECODERS
def test_decoder_given_as_an_object_is_switched_to_full_attention(kind, attention):
    backbone = tiny_backbone(kind, attn_implementation=attention)
    changed = IDS.clone()
    changed[0, -1] = 11
    assert torch.equal(backbone(IDS).logits[:, 0], backbone(changed).logits[:, 0])
    model = CoDDModel.from_backbone(backbone)
    assert (model(IDS).logits[0, 0] - model(changed).logits[0, 0]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_backbone_loaded_by_path_predicts_as_the_object_does_in_the_dtype_asked_for(kind, tmp_path):
    backbone = tiny_backbone(kind)
    backbone.save_pretrained(tmp_path)
    by_path, by_object = CoDDModel.from_backbone(tmp_path), CoDDModel.from_backbone(backbone)
    assert torch.equal(by_path(IDS).logits, by_object(IDS).logits)
    half = CoDDModel.from_backbone(tmp_path, dtype=torch.bfloat16)
    assert half.backbone.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("side", [None, "left"])
def test_hidden_states_and_single_logits_are_those_of_the_whole_pass(kind, side):
    model = tiny_model(kind)
    ids, mask = padded(side)
    states = model.backbone_states(ids, None if side is None else mask)
    at = (torch.tensor([0, 1, 1, 0]), torch.tensor([4, 1, 4, 2]))
    assert torch.allclose(states.logits(at), states.logits()[at], atol=1e-5)
    if kind in ("llama", "qwen2"):
        projected = model.get_output_embeddings()(states.last_hidden_state)
        assert torch.allclose(projected, states.logits(), atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_given_positions_are_used_as_they_are(kind):
    model = tiny_model(kind)
    expected, counted = model(IDS).logits, torch.arange(7).expand(2, -1)
    assert torch.allclose(model(IDS, position_ids=counted).logits, expected, atol=1e-5)
    assert (model(IDS, position_ids=3 * counted).logits - expected).abs().max() > 1e-3


def test_positions_that_a_backbone_does_not_take_are_an_error_that_says_so():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RoFormerConfig(vocab_size=12, intermediate_size=16, **sizes)
    model = CoDDModel.from_backbone(RoFormerForMaskedLM(config).eval())
    assert model(IDS).logits.shape == (2, 7, 12)
    with pytest.raises(ValueError, match="RoFormerForMaskedLM takes no `position_ids`"):
        model(IDS, position_ids=torch.arange(7).expand(2, -1))


def test_unknown_model_type_is_an_error_that_lists_what_works(tmp_path):
    for kind, told in (
        ("t5", r"'t5'.*masked .* llama, qwen2, .* a LLaDA, Dream or SDAR"),
        ("nemotron_labs_diffusion", r"does not load here.*depends on where decoding stands"),
    ):
        (tmp_path / "config.json").write_text(f'{{"model_type": "{kind}"}}')
        with pytest.raises(ValueError, match=told):
            CoDDModel.from_backbone(tmp_path)
    with pytest.raises(ValueError, match="'t5'"):
        family_of(AutoConfig.for_model("t5"))


def test_decoder_that_nobody_has_named_loads_and_says_what_it_assumes(tmp_path):
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.4}
    GPT2LMHeadModel(GPT2Config(vocab_size=12, **sizes)).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"'gpt2' has not been compared.*`logit_shift=True`"):
        model = CoDDModel.from_backbone(tmp_path, mask_token_id=2)
    assert model.config.mask_token_id == 2
    changed = IDS.clone()
    changed[:, -1] = torch.where(changed[:, -1] == 11, 5, 11)
    assert ((model(changed).logits - model(IDS).logits).abs().amax((0, 2)) > 1e-4).all()


def test_decoder_that_stays_causal_is_refused():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    backbone = MambaForCausalLM(MambaConfig(vocab_size=12, **sizes))
    with pytest.raises(ValueError, match=r"type 'mamba' (is causal|cannot be run)"):
        CoDDModel.from_backbone(backbone)


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize(("kind", "attention"), [("llama", "sdpa"), ("qwen2", "eager")])
def test_block_causal_decoder_is_the_one_run_block_by_block_on_a_cache(kind, attention, side):
    backbone = tiny_backbone(kind, attn_implementation=attention, block_length=BLOCK)
    model = CoDDModel.from_backbone(backbone)
    ids, mask = padded(side)
    found = model(ids, attention_mask=None if side is None else mask).logits
    for row, real in enumerate(mask.bool()):
        cache, blocks = DynamicCache(), []
        for block in ids[row : row + 1, real].split(BLOCK, dim=1):
            seen = cache.get_seq_length() + block.shape[1]
            everything = torch.zeros(1, 1, block.shape[1], seen)
            seen_before = {cache_argument(backbone): cache}
            blocks.append(backbone(block, attention_mask=everything, **seen_before).logits)
        assert torch.allclose(found[row, real], torch.cat(blocks, 1)[0], atol=1e-5)
    full = CoDDModel.from_backbone(tiny_backbone(kind))
    assert (full(IDS).logits - model(IDS).logits).abs().max() > 1e-2


def test_blocks_are_counted_over_real_tokens_with_given_positions_too():
    model = CoDDModel.from_backbone(tiny_backbone(block_length=BLOCK))
    ids, mask = padded("left")
    counted = (mask.cumsum(1) - 1).clamp(min=0)
    found = model(ids, attention_mask=mask, position_ids=counted).logits
    assert torch.allclose(found[0, 2:], model(IDS[:1, :5]).logits[0], atol=1e-5)
    assert torch.isfinite(found).all()


def test_block_length_is_kept_with_the_model_and_must_be_one(tmp_path):
    tiny_backbone().save_pretrained(tmp_path / "backbone")
    model = CoDDModel.from_backbone(tmp_path / "backbone", block_length=BLOCK)
    model.save_pretrained(tmp_path / "model")
    loaded = CoDDModel.from_pretrained(tmp_path / "model")
    assert loaded.config.text_config.block_length == BLOCK
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    model.backbone.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match=r"must be 'sdpa' or 'eager' for block-causal"):
        model(IDS)
    for length in (0, "8"):
        with pytest.raises((TypeError, ValueError), match="`block_length` must be"):
            CoDDModel.from_backbone(tiny_backbone(block_length=length))(IDS)
        with pytest.raises((TypeError, ValueError), match="`block_length` must be"):
            CoDDModel.from_backbone(tiny_backbone(block_length=length), mask_token_id=2).generate(
                torch.tensor([[3, 4]]), max_new_tokens=4
            )
