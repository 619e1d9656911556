"""Promises of several heads on one backbone: named, switched, disabled, deleted as adapters are."""

from __future__ import annotations

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


def coupled(model: CoDDModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, coupling="marginal").logits.softmax(-1)


@pytest.fixture
def model():
    model = CoDDModel.from_backbone(tiny_backbone(), random_head())
    for name, changes in OTHERS.items():
        model.load_head(random_head(**changes), name)
    return model


@pytest.mark.parametrize("name", OTHERS)
def test_each_head_gives_what_it_gives_alone(model, name):
    alone = CoDDModel.from_backbone(tiny_backbone(), random_head(**OTHERS[name]))
    before = coupled(model)
    model.set_head(name)
    assert (model.active_head, model.window_length) == (name, alone.window_length)
    assert torch.equal(coupled(model), coupled(alone))
    assert model.config.to_dict()["head_config"] == alone.config.to_dict()["head_config"]
    tokens = {"max_new_tokens": 7, "sampling": "marginal"}
    assert torch.equal(model.generate(IDS[:1, :3], **tokens), alone.generate(IDS[:1, :3], **tokens))
    model.set_head("default")
    assert torch.equal(coupled(model), before)


def test_heads_are_listed_and_loading_one_more_leaves_the_active_one(model):
    assert model.heads == ["default", *OTHERS]
    assert model.active_head == "default"
    assert CoDDModel.from_backbone(tiny_backbone()).heads == []


def test_first_head_of_a_bare_backbone_becomes_active(tmp_path):
    random_head().save_pretrained(tmp_path)
    bare = CoDDModel.from_backbone(tiny_backbone())
    assert bare.active_head is None
    bare.load_head(tmp_path, "first")
    assert (bare.active_head, bare.config.mask_token_id) == ("first", MASK)
    assert torch.equal(
        coupled(bare), coupled(CoDDModel.from_backbone(tiny_backbone(), random_head()))
    )


@pytest.mark.parametrize("as_context", [True, False])
def test_disabled_head_leaves_predictions_factorized_until_it_is_set(model, as_context):
    bare = CoDDModel.from_backbone(tiny_backbone(), mask_token_id=MASK)
    on, tokens = coupled(model), {"max_new_tokens": 8, "block_length": 4}
    if as_context:
        with model.disable_head():
            off, active = coupled(model), model.active_head
            generated = model.generate(IDS[:1, :2], **tokens)
        assert model.active_head == "default"
    else:
        model.disable_head()
        off, active = coupled(model), model.active_head
        generated = model.generate(IDS[:1, :2], **tokens)
        assert torch.equal(coupled(model), off)
        model.set_head("default")
    assert active is None
    assert (on - off).abs().max() > 0.01
    expected = bare(IDS).logits.index_fill(-1, torch.tensor([MASK]), -torch.inf).softmax(-1)
    masked = (IDS == MASK) & (torch.arange(7) >= 3)
    assert torch.allclose(off[masked], expected[masked], atol=1e-6)
    assert torch.equal(generated, bare.generate(IDS[:1, :2], **tokens))
    assert torch.equal(coupled(model), on)


def test_inner_disabling_does_not_end_the_outer_one(model):
    with model.disable_head():
        with model.disable_head():
            pass
        assert model.active_head is None
    assert model.active_head == "default"


def test_saved_model_has_the_active_head_alone_disabled_or_not(model, tmp_path):
    model.set_head("longer")
    expected = coupled(model)
    model.disable_head()
    model.save_pretrained(tmp_path)
    loaded = CoDDModel.from_pretrained(tmp_path)
    assert (loaded.heads, loaded.window_length) == (["default"], 6)
    assert torch.equal(coupled(loaded), expected)


def test_parameters_are_those_of_the_active_head(model):
    own = {id(p) for p in model.coupling_head.parameters()}
    model.set_head("larger")
    there = {id(p) for p in model.parameters()}
    assert not own & there
    assert {id(p) for p in model.coupling_head.parameters()} <= there


def test_deleted_head_is_gone_and_the_active_one_leaves_the_model_factorized(model):
    model.delete_head("tied")
    assert model.heads == ["default", "longer", "larger", "conditioned"]
    model.delete_head("default")
    assert (model.active_head, model.coupling_head, model.config.head_config) == (None, None, None)
    model.set_head("longer")
    assert model.active_head == "longer"


@pytest.mark.parametrize("method", ["set_head", "delete_head"])
def test_unknown_name_is_an_error_that_lists_the_heads(model, method):
    with pytest.raises(ValueError, match=r"no head 'maths': the model's heads are 'default', 'lon"):
        getattr(model, method)("maths")


def test_name_that_is_taken_is_an_error_that_says_what_to_do(model):
    with pytest.raises(ValueError, match=r"'tied' is taken: choose another.*delete_head\('tied'\)"):
        model.load_head(random_head(), "tied")


def test_head_that_does_not_fit_is_refused_and_leaves_the_model_as_it_was(model):
    with pytest.raises(ValueError, match="vocabulary of 13 tokens, but the backbone's has 12"):
        model.load_head(random_head(13), "wrong")
    with pytest.raises(ValueError, match="hidden states of size 8"):
        model.load_head(head_config(conditioning=["latent"], context_size=8), "wrong")
    assert "wrong" not in model.heads


def test_head_that_does_not_know_the_mask_token_learns_it_from_the_model(model):
    model.load_head(CoDDHead(head_config(mask_token_id=None)), "new")
    model.set_head("new")
    assert model.coupling_head.config.mask_token_id == MASK
    assert coupled(model)[0, 3, MASK] == 0


def test_model_without_a_head_has_none_to_save(tmp_path):
    with pytest.raises(ValueError, match="no head to save"):
        CoDDModel.from_backbone(tiny_backbone()).save_head(tmp_path)


@pytest.mark.parametrize("name", [3, "", None])
def test_name_of_a_head_must_be_a_text(model, name):
    with pytest.raises(TypeError, match="`name` must be a text that is not empty"):
        model.load_head(random_head(), name)


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
        lambda: model(IDS, labels=IDS),
        lambda: model.score([[5]], [[6, 7]]),
    ):
        with pytest.raises(ValueError, match=r"of 12 tokens, .* now of 16: .*`head=False`"):
            call()
    with model.disable_head():
        assert model(IDS, coupling="marginal").logits.shape[-1] == 16
    model.load_head(random_head(16), "fitting")
    model.set_head("fitting")
    assert coupled(model).shape[-1] == 16


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
def test_circuit_stays_in_float32_whatever_the_model_is_cast_to(lower):
    model = CoDDModel.from_backbone(tiny_backbone(), random_head(**OTHERS["conditioned"]))
    expected = {k: v.clone() for k, v in model.coupling_head.state_dict().items()}
    model.to(lower)
    assert {p.dtype for p in model.backbone.parameters()} == {lower}
    state = model.coupling_head.state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert {p.dtype for p in model.double().coupling_head.parameters()} == {torch.float64}
