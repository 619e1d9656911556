"""Promises of `CoDDHead` and `CoDDModel`, on tiny random backbones."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from codd_hf import CoDDHead, CoDDModel, CoDDOutput, CoupledCategorical, Potentials
from codd_hf.circuits import token_marginal
from tiny import enumerate_window, head_config, random_head, tiny_backbone, tiny_model

MASK = 2
IDS = torch.tensor([[5, 6, 7, MASK, 8, MASK, MASK], [9, 4, MASK, MASK, 3, MASK, 10]])


def same_weights(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def random_circuit(vocab_size: int = 12, latents: int = 3) -> Potentials:
    generator = torch.Generator().manual_seed(4)
    shapes = ((latents,), (1, latents, latents), (1, latents, vocab_size))
    return Potentials(
        *(torch.randn(shape, generator=generator).log_softmax(-1) for shape in shapes)
    )


@pytest.mark.parametrize("tied", [True, False])
def test_head_comes_back_from_disk_bit_equal(tied, tmp_path):
    head = random_head(tie_transitions=tied, tie_emissions=tied)
    head.set_potentials(random_circuit(), alpha=0.7)
    head.save_pretrained(tmp_path)
    loaded = CoDDHead.from_pretrained(tmp_path)
    assert same_weights(head, loaded)
    assert loaded.config.alpha == 0.7
    assert set(load_file(tmp_path / "model.safetensors")) == {
        "initial",
        "transition",
        "emission",
        "token_marginal",
    }


@pytest.mark.parametrize("kind", ["llama", "qwen2", "bert"])
def test_model_comes_back_from_disk_bit_equal_with_the_same_logits(kind, tmp_path):
    model = tiny_model(kind)
    model.save_pretrained(tmp_path)
    loaded = CoDDModel.from_pretrained(tmp_path)
    assert same_weights(model, loaded)
    for coupling in ("none", "marginal"):
        assert torch.equal(
            model(IDS, coupling=coupling).logits, loaded(IDS, coupling=coupling).logits
        )


def test_tied_embeddings_are_stored_once_and_tied_again_when_loaded(tmp_path):
    backbone = tiny_backbone("llama", tie_word_embeddings=True)
    model = CoDDModel.from_backbone(backbone, random_head())
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert sum(tensor.shape == (12, 16) for tensor in stored.values()) == 1
    loaded = CoDDModel.from_pretrained(tmp_path)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert torch.equal(model(IDS).logits, loaded(IDS).logits)


def test_head_loaded_alone_or_with_its_backbone_stays_in_float32(tmp_path):
    tiny_backbone().save_pretrained(tmp_path / "backbone")
    head = random_head(base_model_name_or_path=str(tmp_path / "backbone"))
    head.save_pretrained(tmp_path / "head")
    assert same_weights(head, CoDDHead.from_pretrained(tmp_path / "head", dtype=torch.bfloat16))
    model = CoDDModel.from_pretrained(tmp_path / "head", dtype=torch.bfloat16)
    assert model.backbone.dtype == torch.bfloat16
    assert same_weights(head, model.coupling_head)
    distribution = model(IDS, return_distribution=True).distribution
    assert distribution.marginals.dtype == torch.float32
    assert torch.allclose(distribution.marginals.sum(-1), torch.ones(2, 4), atol=1e-5)


@pytest.mark.parametrize("backbone", ["object", "path"])
@pytest.mark.parametrize("head", ["object", "path", "config"])
def test_backbone_and_head_join_as_objects_paths_or_a_configuration(backbone, head, tmp_path):
    parts = {"backbone": tiny_backbone(), "head": random_head()}
    for name, part in parts.items():
        part.save_pretrained(tmp_path / name)
    given_backbone = parts["backbone"] if backbone == "object" else tmp_path / "backbone"
    given_head = {
        "object": parts["head"],
        "path": str(tmp_path / "head"),
        "config": head_config(),
    }[head]
    model = CoDDModel.from_backbone(given_backbone, given_head)
    assert not model.training
    assert same_weights(model.backbone, parts["backbone"])
    expected = CoDDHead(head_config()) if head == "config" else parts["head"]
    assert same_weights(model.coupling_head, expected)
    assert model.config.mask_token_id == MASK


def test_head_repository_loads_with_the_backbone_that_it_names(tmp_path):
    backbone = tiny_backbone()
    backbone.save_pretrained(tmp_path / "backbone")
    head = random_head(base_model_name_or_path=str(tmp_path / "backbone"))
    head.save_pretrained(tmp_path / "head")
    model = CoDDModel.from_pretrained(tmp_path / "head")
    assert same_weights(model.backbone, backbone)
    assert same_weights(model.coupling_head, head)
    expected = CoDDModel.from_backbone(backbone, head)
    assert torch.equal(
        model(IDS, coupling="marginal").logits, expected(IDS, coupling="marginal")[0]
    )


def test_head_repository_that_names_no_backbone_is_an_error_that_says_what_to_do(tmp_path):
    random_head().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"names no backbone.*`CoDDModel.from_backbone"):
        CoDDModel.from_pretrained(tmp_path)


def test_untrained_head_changes_nothing():
    model = CoDDModel.from_backbone(tiny_backbone(), head_config())
    distribution = model(IDS, return_distribution=True).distribution
    difference = distribution.marginals - distribution.factorized_logits.exp()
    assert difference.abs().max() < 1e-5
    assert distribution.coupling_gain(distribution.sample()).abs().max() < 1e-5


def test_corrected_head_holds_the_circuit_divided_by_its_marginal():
    circuit, head = random_circuit(), CoDDHead(head_config())
    head.set_potentials(circuit, alpha=0.5)
    marginal = token_marginal(circuit, 4)
    assert torch.allclose(head.token_marginal, marginal)
    assert head.token_marginal.sum() == pytest.approx(1, abs=1e-5)
    assert torch.allclose(head.emission, circuit.tensors()[2][0] - 0.5 * marginal.log(), atol=1e-6)
    assert torch.equal(head.transition, circuit.tensors()[1][0])


@pytest.mark.parametrize("tied", [True, False])
def test_alpha_zero_gives_the_raw_circuit_and_alpha_one_the_correction_back(tied):
    circuit = random_circuit()
    head = CoDDHead(head_config(tie_transitions=tied, tie_emissions=tied))
    head.set_potentials(circuit)
    corrected = head.emission.clone()
    head.set_alpha(0.0)
    assert head.config.alpha == 0.0
    assert torch.allclose(head.potentials.tensors()[2], circuit.tensors()[2], atol=1e-5)
    assert not torch.allclose(head.emission, corrected, atol=0.1)
    head.set_alpha(1.0)
    assert torch.allclose(head.emission, corrected, atol=1e-5)


def test_logits_stay_the_backbones_without_coupling():
    backbone = tiny_backbone("bert")
    model = CoDDModel.from_backbone(backbone, random_head())
    output = model(IDS)
    assert torch.equal(output.logits, backbone(IDS).logits)
    assert output.last_hidden_state.shape == (2, 7, 16)
    assert output.distribution is None
    assert output.loss is None


def test_marginal_coupling_gives_the_exact_marginals_of_the_trailing_window_alone():
    model = tiny_model()
    plain, coupled = model(IDS), model(IDS, coupling="marginal").logits
    assert torch.equal(coupled[:, :3], plain.logits[:, :3])
    assert torch.equal(coupled[0, 4], plain.logits[0, 4])
    for row in range(2):
        window = IDS[row, 3:]
        values, probabilities = enumerate_window(
            model.coupling_head, plain.logits[row, 3:], window, MASK
        )
        for i in (window == MASK).nonzero()[:, 0].tolist():
            exact = torch.zeros(12, dtype=torch.float64).index_add(0, values[:, i], probabilities)
            assert torch.allclose(coupled[row, 3 + i].exp().double(), exact, atol=1e-5)


def test_window_start_moves_the_coupled_window_row_by_row():
    model = tiny_model()
    plain = model(IDS).logits
    coupled = model(IDS, coupling="marginal", window_start=torch.tensor([0, 2])).logits
    changed = (coupled != plain).any(-1)
    expected = torch.zeros(2, 7, dtype=torch.bool)
    expected[0, 3] = expected[1, 2] = expected[1, 3] = expected[1, 5] = True
    assert torch.equal(changed, expected)


def test_trailing_window_ends_at_the_last_real_token_of_each_row():
    model = tiny_model()
    padded = torch.cat((IDS, torch.zeros(2, 2, dtype=torch.long)), 1)
    attention_mask = (torch.arange(9) < 7).long().expand(2, -1)
    coupled = model(padded, attention_mask, coupling="marginal").logits[:, :7]
    expected = model(IDS, coupling="marginal").logits
    assert torch.allclose(coupled.softmax(-1), expected.softmax(-1), atol=1e-5)


def test_latent_coupling_gives_logits_of_one_latent_path_that_the_generator_decides():
    model = tiny_model()

    def run(seed: int) -> CoDDOutput:
        generator = torch.Generator().manual_seed(seed)
        return model(IDS, coupling="latent", generator=generator, return_distribution=True)

    first = run(0)
    latents = first.distribution.sample_latents(torch.Generator().manual_seed(0))
    expected = first.distribution.logits_given(latents)
    masked = first.distribution.masked
    assert torch.allclose(first.logits[:, 3:][masked], expected[masked])
    assert torch.equal(first.logits, run(0).logits)
    assert any(not torch.equal(first.logits, run(seed).logits) for seed in range(1, 6))


def test_mean_of_the_latent_couplings_is_the_marginal_coupling():
    model = tiny_model()
    many = IDS[:1].expand(4000, -1)
    generator = torch.Generator().manual_seed(0)
    latent = model(many, coupling="latent", generator=generator).logits.exp().mean(0)
    marginal = model(IDS[:1], coupling="marginal").logits[0].exp()
    masked = (IDS[0] == MASK) & (torch.arange(7) >= 3)
    assert torch.allclose(latent[masked], marginal[masked], atol=0.03)


def test_coupling_without_a_known_mask_token_is_an_error_that_says_what_to_give():
    model = CoDDModel.from_backbone(tiny_backbone())
    with pytest.raises(ValueError, match="`mask_token_id` is not known"):
        model(IDS, coupling="marginal")


def test_distribution_comes_only_when_asked_for_and_covers_the_window():
    model = tiny_model()
    distribution = model(IDS, return_distribution=True).distribution
    assert isinstance(distribution, CoupledCategorical)
    assert distribution.batch_shape == (2,)
    assert distribution.event_shape == (4,)
    assert torch.equal(distribution.masked, IDS[:, 3:] == MASK)
    assert model(IDS, coupling="marginal").distribution is None


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "bert", "roberta"])
def test_padding_leaves_the_logits_of_real_tokens_as_they_are(kind, side):
    model = tiny_model(kind)
    expected = model(IDS)
    padding = torch.zeros(2, 3, dtype=torch.long)
    real = torch.ones_like(IDS)
    parts = (
        ((padding, IDS), (padding, real)) if side == "left" else ((IDS, padding), (real, padding))
    )
    ids, attention_mask = (torch.cat(part, 1) for part in parts)
    output = model(ids, attention_mask)
    at = slice(3, None) if side == "left" else slice(0, 7)
    assert (output.logits[:, at] - expected.logits).abs().max() < 1e-5
    assert (output.last_hidden_state[:, at] - expected.last_hidden_state).abs().max() < 1e-5


def test_loss_is_the_negative_log_probability_per_masked_token_of_the_joint_windows():
    model = tiny_model()
    truth = torch.where(IDS == MASK, torch.tensor([4, 5, 6, 7, 8, 9, 3]), IDS)
    labels = truth.clone()
    labels[:, :2] = -100
    logits = model(IDS).logits
    total, count = 0.0, 0
    for row in range(2):
        for start, end in ((2, 6), (6, 7)):
            window = IDS[row, start:end]
            masked = int((window == MASK).sum())
            if masked:
                values, probabilities = enumerate_window(
                    model.coupling_head, logits[row, start:end], window, MASK
                )
                right = (values == truth[row, start:end]).all(1)
                total, count = total - probabilities[right].log().sum().item(), count + masked
    assert model(IDS, labels=labels).loss.item() == pytest.approx(total / count, abs=1e-5)


def test_loss_of_partly_supervised_masks_sums_the_others_out():
    model = tiny_model()
    ids = torch.tensor([[5, 9, MASK, MASK, 4, MASK]])
    labels = torch.tensor([[-100, -100, 6, -100, 4, 7]])
    values, probabilities = enumerate_window(
        model.coupling_head, model(ids).logits[0, 2:], ids[0, 2:], MASK
    )
    right = (values[:, 0] == 6) & (values[:, 3] == 7)
    assert right.sum() == 12
    expected = -probabilities[right].sum().log().item() / 2
    assert model(ids, labels=labels).loss.item() == pytest.approx(expected, abs=1e-5)


def test_loss_without_a_head_is_the_factorized_cross_entropy():
    model = CoDDModel.from_backbone(tiny_backbone(), mask_token_id=MASK, forbidden_token_ids=[0])
    labels = torch.where(IDS == MASK, 6, -100)
    logits = model(IDS).logits.index_fill(-1, torch.tensor([0, MASK]), -torch.inf)
    expected = torch.nn.functional.cross_entropy(logits[IDS == MASK], labels[IDS == MASK])
    assert model(IDS, labels=labels).loss.item() == pytest.approx(expected.item(), abs=1e-5)


def test_loss_does_not_depend_on_padding():
    model = tiny_model()
    labels = torch.where(IDS == MASK, 6, -100)
    left = torch.zeros(2, 3, dtype=torch.long)
    ids, padded_labels = torch.cat((left, IDS), 1), torch.cat((left - 100, labels), 1)
    attention_mask = torch.cat((left, torch.ones_like(IDS)), 1)
    loss = model(ids, attention_mask, labels=padded_labels).loss
    assert loss.item() == pytest.approx(model(IDS, labels=labels).loss.item(), abs=1e-5)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_gradients_of_the_loss_are_finite_and_reach_head_and_backbone(kind):
    model = tiny_model(kind)
    model(IDS, labels=torch.where(IDS == MASK, 6, -100)).loss.backward()
    for part in (model.backbone, model.coupling_head):
        gradients = [p.grad for p in part.parameters() if p.grad is not None]
        assert all(g.isfinite().all() for g in gradients)
        assert any(g.abs().max() > 0 for g in gradients)


def test_nothing_supervised_is_a_loss_of_zero():
    loss = tiny_model()(IDS, labels=torch.full_like(IDS, -100)).loss
    assert loss.item() == 0
