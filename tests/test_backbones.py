"""Promises of the backbone families: full attention, unshifted logits, the state behind them."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, RoFormerConfig, RoFormerForMaskedLM

from codd_hf import CoDDModel
from codd_hf.backbones import family_of
from tiny import BACKBONES, tiny_backbone, tiny_model

IDS = torch.tensor([[5, 6, 2, 7, 2, 8], [9, 2, 3, 4, 2, 10]])


@pytest.mark.parametrize("kind", BACKBONES)
def test_every_position_sees_the_whole_sequence(kind):
    model = tiny_model(kind)
    reference = model(IDS).logits
    for changed_position in range(6):
        changed = IDS.clone()
        changed[:, changed_position] = 11
        difference = (model(changed).logits - reference).abs().amax((0, 2))
        assert (difference > 1e-4).all()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_decoder_given_as_an_object_is_switched_to_full_attention(kind, attention):
    backbone = tiny_backbone(kind, attn_implementation=attention)
    changed = IDS.clone()
    changed[:, -1] = 11
    assert torch.equal(backbone(IDS).logits[:, 0], backbone(changed).logits[:, 0])
    model = CoDDModel.from_backbone(backbone)
    assert (model(IDS).logits[:, 0] - model(changed).logits[:, 0]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["llama", "qwen2", "bert"])
def test_backbone_loaded_by_path_predicts_as_the_object_does(kind, tmp_path):
    backbone = tiny_backbone(kind)
    backbone.save_pretrained(tmp_path)
    by_path, by_object = CoDDModel.from_backbone(tmp_path), CoDDModel.from_backbone(backbone)
    assert torch.equal(by_path(IDS).logits, by_object(IDS).logits)


def test_backbone_is_loaded_in_the_dtype_asked_for(tmp_path):
    tiny_backbone().save_pretrained(tmp_path)
    model = CoDDModel.from_backbone(tmp_path, dtype=torch.bfloat16)
    assert model.backbone.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_hidden_state_of_a_position_is_the_one_that_gives_its_logits(kind):
    model = tiny_model(kind)
    output = model(IDS)
    projected = model.get_output_embeddings()(output.last_hidden_state)
    assert torch.allclose(projected, output.logits, atol=1e-5)


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("padded", [False, True])
def test_logits_read_at_some_positions_are_those_of_the_whole_pass(kind, padded):
    model = tiny_model(kind)
    attention_mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]]) if padded else None
    ids = IDS if attention_mask is None else IDS * attention_mask
    states = model.backbone_states(ids, attention_mask)
    at = (torch.tensor([0, 1, 1, 0]), torch.tensor([4, 1, 4, 2]))
    assert torch.allclose(states.logits(at), states.logits()[at], atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_given_positions_are_used_as_they_are(kind):
    model = tiny_model(kind)
    expected = model(IDS).logits
    counted = torch.arange(6).expand(2, -1)
    assert torch.allclose(model(IDS, position_ids=counted).logits, expected, atol=1e-5)
    spread = model(IDS, position_ids=3 * counted).logits
    assert (spread - expected).abs().max() > 1e-3


def test_positions_that_a_backbone_does_not_take_are_an_error_that_says_so():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RoFormerConfig(vocab_size=12, intermediate_size=16, **sizes)
    model = CoDDModel.from_backbone(RoFormerForMaskedLM(config).eval())
    assert model(IDS).logits.shape == (2, 6, 12)
    with pytest.raises(ValueError, match="`position_ids` cannot be given to RoFormerForMaskedLM"):
        model(IDS, position_ids=torch.arange(6).expand(2, -1))


def test_unknown_model_type_is_an_error_that_lists_what_works():
    with pytest.raises(ValueError, match=r"'gpt2'.*masked language model or one of llama, qwen2"):
        family_of(AutoConfig.for_model("gpt2"))
