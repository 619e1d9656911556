"""Promises of `CoDDHead` in every combination of structures and conditionings."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from codd_hf import CoDDHead, CoDDHeadConfig, CoDDModel, Potentials
from codd_hf.circuits import (
    ListedEvidence,
    Preceding,
    TiedEmission,
)
from tiny import random_head, tiny_backbone

MASK = 2
IDS = torch.tensor([[5, 6, 7, MASK, 8, MASK, MASK], [9, 4, MASK, MASK, 3, MASK, 10]])
BATCH, LENGTH, VOCAB, LATENTS, SIZE = 2, 3, 7, 4, 5
CONDITIONINGS = {
    "unconditioned": {},
    "latent": {"conditioning": ["latent"]},
    "copy": {"conditioning": ["copy"]},
    "all": {"conditioning": ["latent", "copy"]},
}
COMBINATIONS = {
    f"{emission} emission, {name}": {"emission": emission} | conditioning
    for emission, (name, conditioning) in product(("dense", "tied"), CONDITIONINGS.items())
} | {
    "untied steps and emissions, latent": {
        "tie_transitions": False,
        "tie_emissions": False,
        "conditioning": ["latent"],
    },
    "untied steps, tied emission": {"emission": "tied", "tie_transitions": False},
}
EVERYTHING = COMBINATIONS["tied emission, all"]
COMBINATION = pytest.mark.parametrize("name", COMBINATIONS)


def config_of(name: str = "", **changes) -> CoDDHeadConfig:
    sizes = {
        "vocab_size": VOCAB,
        "num_latents": LATENTS,
        "window_length": LENGTH,
        "emission_rank": 4,
        "context_size": SIZE,
        "mask_token_id": MASK,
    }
    return CoDDHeadConfig(**(sizes | COMBINATIONS.get(name, {}) | changes))


def embedding(seed: int = 5) -> torch.Tensor:
    return torch.randn(VOCAB, SIZE, generator=torch.Generator().manual_seed(seed))


def fresh_head(name: str = "", **changes) -> CoDDHead:
    torch.manual_seed(0)
    head = CoDDHead(config_of(name, **changes))
    if head.config.emission == "tied":
        head.bind(embedding())
    return head


@torch.no_grad()
def shaken_head(name: str = "", scale: float = 0.7, seed: int = 1, **changes) -> CoDDHead:
    """A head whose every number is random."""
    head = fresh_head(name, **changes)
    generator = torch.Generator().manual_seed(seed)
    for parameter in head.parameters():
        parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    marginal = torch.randn(head.token_marginal.shape, generator=generator).softmax(-1)
    head.token_marginal.copy_(marginal)
    return head


def window(seed: int = 2, scale: float = 1.0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "logits": 2 * torch.randn(BATCH, LENGTH, VOCAB, generator=g),
        "tokens": torch.randint(3, VOCAB, (BATCH, LENGTH), generator=g),
        "observed": torch.rand(BATCH, LENGTH, generator=g) < 0.3,
        "last_hidden_state": scale * torch.randn(BATCH, LENGTH, SIZE, generator=g),
        "preceding": Preceding(
            torch.randint(VOCAB, (BATCH, 4), generator=g),
            torch.tensor([[True, True, True, True], [False, True, True, True]]),
            scale * torch.randn(BATCH, 4, SIZE, generator=g),
        ),
    }


def row_of(given: dict, row: int) -> dict:
    """One row of what a head is given."""
    rows = torch.tensor([row])
    preceding = Preceding(*(t[rows] for t in vars(given["preceding"]).values()))
    return {k: v[rows] for k, v in given.items() if k != "preceding"} | {"preceding": preceding}


def normalised_circuit(steps: int = 1, emissions: int = 1, seed: int = 4) -> Potentials:
    g = torch.Generator().manual_seed(seed)
    shapes = ((LATENTS,), (steps, LATENTS, LATENTS), (emissions, LATENTS, VOCAB))
    return Potentials(*(torch.randn(s, generator=g).log_softmax(-1) for s in shapes))


def same_state(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@COMBINATION
@pytest.mark.parametrize("scale", [0.0, 1.0, 1000.0])
def test_an_untrained_head_changes_nothing_whatever_the_hidden_states(name, scale):
    distribution = fresh_head(name)(**window(scale=scale))
    factorized = distribution.factorized_logits.exp()
    assert (distribution.marginals - factorized).abs().max() < 1e-6
    assert distribution.coupling_gain(distribution.sample((20,))).abs().max() < 1e-5


@pytest.mark.parametrize(
    "name", [n for n in COMBINATIONS if "unconditioned" not in n and "untied" not in n]
)
def test_fresh_conditioning_leaves_a_trained_circuit_as_it_was(name):
    plain = shaken_head(name, conditioning=None).double()
    head = fresh_head(name).double()
    assert not head.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    given = window(scale=9.0)
    for name in ("logits", "last_hidden_state"):
        given[name] = given[name].double()
    expected, ours = plain(**given), head(**given)
    value = expected.sample((50,), generator=torch.Generator().manual_seed(0))
    # A copy state starts with a mass of exp(-16.5), times what its token is rarer than the circuit
    # has it.
    close = 1e-5 if "copy" in head.config.conditioning else 1e-12
    assert (ours.log_prob(value) - expected.log_prob(value)).abs().max() < close


def test_conditioning_can_be_added_to_a_saved_circuit(tmp_path):
    plain = shaken_head()
    plain.save_pretrained(tmp_path)
    loaded = CoDDHead.from_pretrained(tmp_path, conditioning=["latent"])
    assert loaded.context_maps.latent.weight.abs().max() == 0
    value = window()["tokens"]
    expected, ours = plain(**window()).log_prob(value), loaded(**window()).log_prob(value)
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6)


@COMBINATION
def test_every_parameter_of_a_new_head_can_be_trained(name):
    head = fresh_head(name)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
    given = window()
    given["observed"] = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    before = {k: v.clone() for k, v in head.named_parameters()}
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():  # from an exactly uniform circuit there is no way to tell states apart
        for parameter in head.parameters(recurse=False):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    losses = []
    for _ in range(10):
        loss = -head(**given).log_prob(given["tokens"]).sum()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    unchanged = [k for k, v in head.named_parameters() if torch.equal(v, before[k])]
    assert unchanged == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"emission": "low"}, r"`emission` must be one of dense, tied, got 'low'"),
        ({"conditioning": ["gates"]}, r"`conditioning` must list some of latent, copy"),
        ({"conditioning": ["copy", "copy"]}, r"each once, got \['copy', 'copy'\]"),
        ({"conditioning": ["latent"], "context_size": None}, r"`context_size` .* is needed"),
        ({"emission": "tied", "context_size": None}, r"`context_size` .* is needed"),
        ({"emission": "tied", "tie_emissions": False}, r"set `tie_emissions` to true"),
        ({"context_size": 0}, r"`context_size` must be at least 1, got 0"),
        ({"emission_rank": 0}, r"`emission_rank` must be at least 1, got 0"),
    ],
)
def test_a_structure_that_cannot_be_is_an_error_that_names_the_field(changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        config_of(**changes)


@COMBINATION
def test_a_head_comes_back_from_disk_bit_equal_and_in_float32(name, tmp_path):
    head = shaken_head(name)
    head.save_pretrained(tmp_path)
    loaded = CoDDHead.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert same_state(head, loaded)
    assert {t.dtype for t in loaded.state_dict().values()} == {torch.float32}
    for field in ("emission", "conditioning", "context_size"):
        assert getattr(loaded.config, field) == getattr(head.config, field)
    if loaded.config.emission == "tied":
        loaded.bind(embedding())
    ours, expected = loaded(**window()), head(**window())
    torch.testing.assert_close(ours.log_partition, expected.log_partition)


@pytest.mark.parametrize("top_k", [0, 3])
def test_gradients_reach_the_logits_of_a_frozen_head_that_was_used_in_inference_mode(top_k):
    head = random_head().requires_grad_(False)
    logits = torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = head(logits, top_k=top_k).log_partition.clone()
    logits.requires_grad_()
    found = head(logits, top_k=top_k).log_partition
    found.sum().backward()
    torch.testing.assert_close(found, expected.clone())
    assert logits.grad.abs().sum() > 0


def tied_model(**changes) -> CoDDModel:
    sizes = {"num_latents": 4, "emission_rank": 3, "context_size": 16}
    head = random_head(**(EVERYTHING | sizes | changes))
    return CoDDModel.from_backbone(tiny_backbone(), head)


def test_a_tied_head_that_is_not_bound_says_how_to_bind_it():
    head = CoDDHead(config_of(emission="tied"))
    for use in (lambda: head.potentials, lambda: head(**window())):
        with pytest.raises(ValueError, match=r"tied to a backbone's output embedding: join them"):
            use()
    with pytest.raises(ValueError, match=r"tied to a backbone's output embedding: join them"):
        head.set_potentials(normalised_circuit())


def test_a_head_for_another_hidden_size_is_refused_by_the_backbone():
    with pytest.raises(ValueError, match="hidden states of size 8, but the backbone has 16"):
        tied_model(context_size=8)


def test_a_model_with_a_tied_head_comes_back_from_disk_and_stores_the_embedding_once(tmp_path):
    model = tied_model()
    output = model(IDS, coupling="marginal", return_distribution=True)
    changed = output.logits - model(IDS, coupling="none").logits
    assert changed[:, -4:].abs().max() > 0.1
    model.save_pretrained(tmp_path / "model")
    model.coupling_head.save_pretrained(tmp_path / "head")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    output_embedding = model.get_output_embeddings().weight
    assert sum(torch.equal(t, output_embedding) for t in stored.values()) == 1
    assert all(
        t.shape != (12, 16) for t in load_file(tmp_path / "head" / "model.safetensors").values()
    )
    half = CoDDModel.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert {p.dtype for p in half.backbone.parameters()} == {torch.bfloat16}
    assert same_state(model.coupling_head, half.coupling_head)
    distribution = half(IDS, return_distribution=True).distribution
    assert distribution.log_partition.dtype == torch.float32
    loaded = CoDDModel.from_pretrained(tmp_path / "model")
    assert same_state(model, loaded)
    # Not bit by bit: loaded tensors lie elsewhere, and products depend on how memory is aligned.
    torch.testing.assert_close(
        loaded(IDS, coupling="marginal").logits, output.logits, rtol=1e-4, atol=1e-4
    )
    joined = CoDDModel.from_backbone(tiny_backbone(), tmp_path / "head")
    torch.testing.assert_close(
        joined(IDS, coupling="marginal").logits, output.logits, rtol=1e-4, atol=1e-4
    )


def test_a_tied_head_follows_its_backbones_output_embedding():
    model = tied_model()
    with torch.no_grad():
        before = model(IDS, return_distribution=True).distribution
        old = before.potentials.emission.dense()
        model.get_output_embeddings().weight.mul_(0.5)
        new = model(IDS, return_distribution=True).distribution.potentials.emission.dense()
        bias = model.coupling_head.emission_bias
        torch.testing.assert_close(new - bias, 0.5 * (old - bias))


@pytest.mark.parametrize("grad", [True, False])
def test_autocast_does_not_reach_the_head(grad):
    name = "tied emission, all"
    with torch.set_grad_enabled(grad):
        expected = shaken_head(name)(**window())
        head = shaken_head(name)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours = head(**window())
            assert torch.equal(ours.log_partition, expected.log_partition)
            assert torch.equal(ours.marginals, expected.marginals)
        assert torch.equal(head(**window()).log_partition, expected.log_partition)


@pytest.mark.parametrize("hidden", [None, torch.zeros(BATCH, LENGTH, SIZE + 1)])
def test_a_conditioned_head_without_fitting_hidden_states_is_an_error(hidden):
    head = fresh_head(conditioning=["latent"])
    given = window() | {"last_hidden_state": hidden}
    with pytest.raises(ValueError, match=r"`last_hidden_state`.* must"):
        head(**given)
    listed = ListedEvidence.from_logits(given["logits"], 3, forbidden=head.forbidden)
    with pytest.raises(ValueError, match=r"`last_hidden_state`.* must"):
        head(**(given | {"logits": listed}))


def test_a_conditioned_head_reads_lists_as_tensors_and_names_what_is_neither():
    head = shaken_head("dense emission, all")
    given = window() | {"present": torch.tensor([[True, True, False]] * 2)}
    lists = {name: given[name].tolist() for name in ("tokens", "observed", "present")}
    assert torch.equal(head(**(given | lists)).log_partition, head(**given).log_partition)
    for name in ("logits", "observed", "present"):
        with pytest.raises(TypeError, match=f"`{name}` must be"):
            head(**(given | {name: 3 if name == "logits" else IDS[:, :3]}))


def test_a_head_that_copies_without_the_preceding_tokens_is_an_error():
    head = fresh_head(conditioning=["copy"])
    with pytest.raises(ValueError, match=r"`preceding` must be given"):
        head(**(window() | {"preceding": None}))


def test_an_unconditioned_head_needs_no_hidden_states():
    given = window() | {"last_hidden_state": None}
    assert fresh_head()(**given).log_partition.isfinite().all()


def test_the_context_is_what_its_formulas_say():
    head = shaken_head("dense emission, all", scale=3.0)
    present = torch.tensor([[True, True, True], [True, True, False]])
    given = window()
    given["observed"] = torch.tensor([[True, False, False], [False, True, False]])
    context = head(**given, present=present).context
    hidden = given["last_hidden_state"]
    x = hidden / hidden.square().mean(-1, keepdim=True).sqrt()
    latent = head.context_maps.latent
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(context.latent, F.linear(x, latent.weight) + latent.bias, **close)

    copies = context.copies
    preceding, maps = given["preceding"], head.context_maps
    hidden = preceding.hidden
    y = hidden / hidden.square().mean(-1, keepdim=True).sqrt()

    def scores(query, key, bias):
        queries, keys = F.linear(x, query.weight), F.linear(y, key.weight)
        score = torch.einsum("bld,bjd->blj", queries, keys) + bias
        return 4 - F.softplus(4 - score)

    start = scores(maps.query, maps.key, maps.copy_bias).clamp(min=-16.5)
    start[1, :, 0] = -torch.inf  # that row's first token is absent
    torch.testing.assert_close(copies.start, start, **close)
    follow = scores(maps.follow_query, maps.follow_key, maps.follow_bias)
    follow[1, :, 1] = -torch.inf
    torch.testing.assert_close(copies.follow[..., 1:], follow[..., 1:], **close)
    left = torch.full((*preceding.tokens.shape, LATENTS), -torch.inf)
    for row, place in product(range(2), range(preceding.tokens.shape[1])):
        token = preceding.tokens[row, place]
        states = maps.suggested[token].long()
        left[row, place, states] = maps.log_suggested[token]
    torch.testing.assert_close(copies.left, left, **close)
    log_marginal = head.token_marginal.log()[preceding.tokens][..., None]
    emitted = left + log_marginal - maps.log_occupancy
    torch.testing.assert_close(copies.emitted, emitted.clamp(-10, 0), **close)
    weight = -head.config.alpha * head.token_marginal.log()[preceding.tokens]
    torch.testing.assert_close(copies.weight, weight.clamp(max=12), **close)


def test_gaps_before_a_window_are_packed_without_joining_what_they_part():
    head, given = shaken_head("copy"), window()
    present = torch.tensor([[True, False, False, True], [True, True, False, False]])
    preceding = Preceding(given["preceding"].tokens, present, given["preceding"].hidden)
    packed = preceding.packed()
    assert packed.present.tolist() == [[True, False, True], [True, True, False]]
    expected, found = (
        head(**(given | {"preceding": p})).log_partition for p in (preceding, packed)
    )
    torch.testing.assert_close(found, expected)
    nothing = Preceding(preceding.tokens, torch.zeros_like(present), preceding.hidden)
    assert nothing.packed().tokens.shape == (BATCH, 1)


@COMBINATION
def test_a_window_does_not_depend_on_its_batchmates(name):
    head = shaken_head(name)
    given = window()
    for logits in (given["logits"], ListedEvidence.from_logits(given["logits"], 3)):
        together = head(**(given | {"logits": logits}))
        for row in range(BATCH):
            alone = head(**row_of(given | {"logits": logits}, row))
            torch.testing.assert_close(alone.log_partition[0], together.log_partition[row])
            torch.testing.assert_close(alone.marginals[0], together.marginals[row])


@COMBINATION
@torch.no_grad()
def test_a_frozen_head_gives_the_same_bits_and_derives_once(name):
    head, given = shaken_head(name), window()
    frozen = head.frozen()
    for top_k in (0, 3):
        ours, expected = frozen(**given, top_k=top_k), head(**given, top_k=top_k)
        assert torch.equal(ours.log_partition, expected.log_partition)
        assert torch.equal(ours.marginals, expected.marginals)
        assert ours.potentials is frozen.potentials
        assert expected.potentials is not frozen.potentials
    assert frozen.config is head.config


@COMBINATION
def test_potentials_follow_every_change_and_gradients_reach_all_of_them(name):
    head = shaken_head(name)
    for change in (
        lambda: head.set_potentials(normalised_circuit()),
        lambda: head.temper(0.5, 0.5),
        lambda: head.set_alpha(0.3),
        lambda: head.load_state_dict(shaken_head(name, seed=7).state_dict()),
        lambda: head.emission_bias.data.mul_(2) if head.config.emission == "tied" else None,
        lambda: head.token_marginal.copy_(head.token_marginal.flip(-1)),
    ):
        with torch.no_grad():
            _ = head(**window(), top_k=3).log_partition
            change()
            fresh = CoDDHead(head.config)
            fresh.load_state_dict(head.state_dict())
            if head.config.emission == "tied":
                fresh.bind(embedding())
            for top_k in (0, 3):
                ours, expected = (m(**window(), top_k=top_k).log_partition for m in (head, fresh))
                assert torch.equal(ours, expected)
    head(**window()).log_partition.sum().backward()
    assert all(p.grad is not None for p in head.parameters(recurse=False))


def test_a_tied_head_takes_over_emissions_that_it_can_hold_exactly():
    head = fresh_head(emission="tied", emission_rank=LATENTS)
    g = torch.Generator().manual_seed(3)
    tied = TiedEmission(
        torch.randn(LATENTS, 3, generator=g),
        embedding() @ torch.randn(SIZE, 3, generator=g),
        torch.randn(VOCAB, generator=g),
    )
    circuit = normalised_circuit()
    potentials = Potentials(circuit.initial, circuit.transition, tied.dense())
    head.set_potentials(potentials, torch.full((VOCAB,), 1 / VOCAB), alpha=0.0)
    torch.testing.assert_close(head.potentials.emission.dense(), tied.dense(), rtol=1e-4, atol=1e-4)


def test_a_tied_head_of_low_rank_takes_over_the_closest_emissions():
    errors = []
    for rank in (1, 2, 4):
        head = fresh_head(emission="tied", emission_rank=rank)
        circuit, uniform = normalised_circuit(), torch.full((VOCAB,), 1 / VOCAB)
        head.set_potentials(circuit, uniform, alpha=0.0)
        error = head.potentials.emission.dense() - circuit.emission.dense()
        errors.append(error.square().mean().item())
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize(
    "name",
    [
        "tied emission, latent",
        "untied steps, tied emission",
        "untied steps and emissions, latent",
    ],
)
def test_alpha_changes_the_power_of_the_marginal_and_nothing_else(name):
    head = shaken_head(name)
    head.set_potentials(normalised_circuit())
    corrected = [tensor.clone() for tensor in head.potentials.tensors()]
    head.set_alpha(0.25)
    assert head.config.alpha == 0.25
    initial, transition, emission = head.potentials.tensors()
    shift = 0.75 * head.token_marginal.log().reshape(-1, 1, VOCAB)
    torch.testing.assert_close(emission, (corrected[2] + shift)[: len(emission)])
    assert torch.equal(initial, corrected[0])
    assert torch.equal(transition, corrected[1])
    head.set_alpha(1.0)
    torch.testing.assert_close(head.potentials.tensors()[2], corrected[2])


def test_alpha_can_be_changed_where_only_the_steps_are_untied():
    head = fresh_head(tie_transitions=False)
    circuit = normalised_circuit(steps=LENGTH - 1)
    head.set_potentials(circuit)
    head.set_alpha(0.0)
    torch.testing.assert_close(head.potentials.emission.dense(), circuit.emission.dense())


@COMBINATION
def test_tempering_raises_emissions_to_a_power_and_normalises_steps(name):
    head = shaken_head(name)
    head.set_potentials(normalised_circuit())
    before = [t.clone() for t in head.potentials.tensors()]
    head.temper(1.0, 1.0)
    for ours, expected in zip(head.potentials.tensors(), before, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    head.temper(0.5, 0.7)
    initial, transition, emission = head.potentials.tensors()
    torch.testing.assert_close(emission, 0.5 * before[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(initial, (0.7 * before[0]).log_softmax(-1))
    assert torch.allclose(transition.exp().sum(-1), torch.ones(()), atol=1e-5)
    torch.testing.assert_close(transition, (0.7 * before[1]).log_softmax(-1))


@torch.no_grad()
def test_what_a_copied_token_suggests_is_bayes_rule_on_the_generative_circuit():
    head = fresh_head(conditioning=["copy"], num_latents=12)
    generator = torch.Generator().manual_seed(3)
    law = torch.randn(12, VOCAB, generator=generator).mul(3).log_softmax(-1)
    occupancy = torch.randn(12, generator=generator).softmax(-1)
    head.context_maps.start(law, occupancy)
    joint = law.exp() * occupancy[:, None]
    posterior = (joint / joint.sum(0)).T  # [V, H]
    for token in range(VOCAB):
        states = head.context_maps.suggested[token].long()
        assert set(states.tolist()) == set(posterior[token].topk(8).indices.tolist())
        expected = posterior[token, states] / posterior[token, states].sum()
        torch.testing.assert_close(head.context_maps.log_suggested[token].exp(), expected)
