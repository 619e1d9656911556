"""Promises of several heads on one backbone, which calls name."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from accelerate import cpu_offload

from codd_hf import CoDDHead, CoDDModel
from tiny import head_config, random_head, tiny_backbone

MASK = 2
IDS = torch.tensor([[5, 6, 7, MASK, 8, MASK, MASK], [9, 4, MASK, MASK, 3, MASK, 10]])
OTHERS = {
    "longer": {"window_length": 6, "seed": 2},
    "larger": {"num_latents": 4, "seed": 3},
    "conditioned": {"conditioning": ["latent", "copy"], "context_size": 16, "seed": 4},
    "tied": {"emission": "tied", "emission_rank": 4, "context_size": 16, "seed": 5},
}


def coupled(model: CoDDModel, head: str | bool | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, coupling="marginal", head=head).logits.softmax(-1)


@pytest.fixture
def model():
    model = CoDDModel.from_backbone(tiny_backbone(), random_head())
    for name, changes in OTHERS.items():
        model.load_head(random_head(**changes), name)
    return model


@pytest.mark.parametrize("name", OTHERS)
def test_call_gets_from_the_head_that_it_names_what_that_gives_alone(model, name, tmp_path):
    alone = CoDDModel.from_backbone(tiny_backbone(), random_head(**OTHERS[name]))
    before = coupled(model)
    assert torch.equal(coupled(model, name), coupled(alone))
    tokens = {"max_new_tokens": 7, "sampling": "marginal"}
    found = model.generate(IDS[:1, :3], **tokens, head=name)
    assert torch.equal(found, alone.generate(IDS[:1, :3], **tokens))
    assert torch.equal(coupled(model), before)
    model.save_head(tmp_path, name)
    saved = CoDDModel.from_backbone(tiny_backbone(), tmp_path)
    assert torch.equal(coupled(saved), coupled(alone))


def test_default_head_couples_calls_that_name_none_and_alone_is_saved(model, tmp_path):
    assert [*model.heads] == ["default", *OTHERS]
    own = {id(p) for p in model.coupling_head.parameters()}
    assert own <= {id(p) for p in model.parameters()}
    assert not {id(p) for p in model.heads["tied"].parameters()} & {
        id(p) for p in model.parameters()
    }
    model.save_pretrained(tmp_path)
    loaded = CoDDModel.from_pretrained(tmp_path)
    assert [*loaded.heads] == ["default"]
    assert torch.equal(coupled(loaded), coupled(model))


def test_model_that_is_let_go_frees_its_memory_at_once():
    model = CoDDModel.from_backbone(tiny_backbone(), random_head())
    backbone = weakref.ref(model.backbone)
    gc.disable()
    try:
        del model
        assert backbone() is None
    finally:
        gc.enable()


def test_bare_backbone_gets_a_default_head(tmp_path):
    random_head().save_pretrained(tmp_path)
    bare = CoDDModel.from_backbone(tiny_backbone())
    assert [*bare.heads] == []
    with pytest.raises(ValueError, match="got 'default'"):
        bare.save_head(tmp_path)
    bare.load_head(tmp_path)
    assert ([*bare.heads], bare.config.mask_token_id) == (["default"], MASK)
    whole = CoDDModel.from_backbone(tiny_backbone(), random_head())
    assert torch.equal(coupled(bare), coupled(whole))
    assert bare.config.head_config is bare.coupling_head.config


def test_call_without_a_head_is_factorized(model):
    bare = CoDDModel.from_backbone(tiny_backbone(), mask_token_id=MASK)
    off, tokens = coupled(model, False), {"max_new_tokens": 8, "block_length": 4}
    expected = bare(IDS).logits.index_fill(-1, torch.tensor([MASK]), -torch.inf).softmax(-1)
    masked = (IDS == MASK) & (torch.arange(7) >= 3)
    assert torch.allclose(off[masked], expected[masked], atol=1e-6)
    assert (coupled(model) - off).abs().max() > 0.01
    generated = model.generate(IDS[:1, :2], **tokens, head=False)
    assert torch.equal(generated, bare.generate(IDS[:1, :2], **tokens))


def test_deleted_head_is_gone_and_without_the_default_one_predictions_are_factorized(model):
    off = coupled(model, False)
    model.delete_head("tied")
    assert [*model.heads] == ["default", "longer", "larger", "conditioned"]
    model.delete_head("default")
    assert (model.coupling_head, model.config.head_config) == (None, None)
    window = slice(3, 7)
    assert torch.allclose(coupled(model)[:, window], off[:, window], atol=1e-6)
    model.load_head(random_head(**OTHERS["tied"]))
    assert next(iter(model.heads)) == "default"


def test_names_of_heads_are_checked(model):
    for call in (model.delete_head, lambda name: model(IDS, head=name), model.head_of_call):
        with pytest.raises(ValueError, match=r"got 'maths': the model's heads are 'default', '"):
            call("maths")
    with pytest.raises(ValueError, match="not the name of a head, got 'tied'"):
        model.load_head(random_head(), "tied")
    for name in (3, "", None):
        with pytest.raises(ValueError, match="`name` must be a text"):
            model.load_head(random_head(), name)


def test_head_that_does_not_fit_is_refused_and_leaves_the_model_as_it_was(model):
    with pytest.raises(ValueError, match=r"a vocabulary of 13 tokens, but the backbone has 12"):
        model.load_head(random_head(13), "wrong")
    with pytest.raises(ValueError, match="hidden states of size 8, but the backbone has 16"):
        model.load_head(head_config(conditioning=["latent"], context_size=8), "wrong")
    assert "wrong" not in model.heads


def test_head_that_does_not_know_the_mask_token_learns_it_from_the_model(model):
    model.load_head(CoDDHead(head_config(mask_token_id=None)), "new")
    assert model.heads["new"].config.mask_token_id == MASK
    assert coupled(model, "new")[0, 3, MASK] == 0


@pytest.mark.parametrize("head", ["tied", "conditioned"])
def test_head_couples_while_the_weights_of_the_backbone_are_offloaded(head):
    expected = coupled(CoDDModel.from_backbone(tiny_backbone(), random_head(**OTHERS[head])))
    model = CoDDModel.from_backbone(tiny_backbone(), random_head(**OTHERS[head]))
    cpu_offload(model.backbone, execution_device=torch.device("cpu"))
    assert model.get_output_embeddings().weight.is_meta
    for _ in range(2):
        assert torch.equal(coupled(model), expected)


def test_head_of_another_vocabulary_than_a_resized_backbone_is_an_error(model):
    plain = CoDDModel.from_backbone(tiny_backbone(), mask_token_id=MASK)
    before = plain(IDS).logits
    model.resize_token_embeddings(16)
    assert torch.allclose(model(IDS).logits[..., :12], before, atol=1e-6)
    for call in (
        lambda: model(IDS, coupling="marginal"),
        lambda: model(IDS, labels=torch.where(IDS == MASK, 5, -100)),
        lambda: model.score([[5]], [[6, 7]]),
    ):
        with pytest.raises(ValueError, match=r"must have shape .batch, length, 12."):
            call()
    assert coupled(model, False).shape[-1] == 16
    model.load_head(random_head(16), "fitting")
    assert coupled(model, "fitting").shape[-1] == 16


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
def test_circuits_stay_in_float32_whatever_the_model_is_cast_to(model, lower):
    heads = model.coupling_head, model.heads["conditioned"]
    expected = [{k: v.clone() for k, v in head.state_dict().items()} for head in heads]
    model.to(lower)
    assert {p.dtype for p in model.backbone.parameters()} == {lower}
    for head, values in zip(heads, expected, strict=True):
        assert all(torch.equal(head.state_dict()[name], values[name]) for name in values)
    model.double()
    assert {p.dtype for head in heads for p in head.parameters()} == {torch.float64}
