"""Circuits saved by PyJuice: our numbers within 1e-4 of PyJuice's own (see `tests/fixtures`)."""

from pathlib import Path

import pytest
import torch
from agreement import assert_drawn_from
from safetensors.torch import load_file

from codd_hf.circuits import CoupledCategorical, Potentials

FIXTURES = Path(__file__).parent.parent / "fixtures"
NAMES = ["cat_hmm", "cat_hmm_blocks", "ext_hmm_v20"]
ORACLES = {name: load_file(FIXTURES / f"{name}.safetensors") for name in NAMES}
VERSIONS = ["pyjuice241", "pyjuice263"]
BOTH_VERSIONS = pytest.mark.parametrize("version", VERSIONS)
CATEGORICAL = pytest.mark.parametrize("name", ["cat_hmm", "cat_hmm_blocks"])


def circuit(oracle) -> Potentials:
    return Potentials(oracle["init"].log(), oracle["trans"].log(), oracle["emit"].log())


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert float((ours.double() - theirs.double()).abs().max()) < 1e-4


def evidence_mass(oracle) -> torch.Tensor:
    """`[B, L]`: PyJuice's evidence is not normalised over the vocabulary; ours is."""
    return oracle["evidence_logp"].logsumexp(-1)


def coupled(masked: bool) -> CoupledCategorical:
    """The product of the saved circuit and the saved evidence."""
    oracle = ORACLES["ext_hmm_v20"]
    observed = oracle["observed_mask"] if masked else None
    return CoupledCategorical(
        oracle["evidence_logp"], circuit(oracle), oracle["tokens"], observed=observed
    )


def token_evidence(oracle) -> torch.Tensor:
    """`[B, L]` log of the evidence of the given tokens."""
    return oracle["evidence_logp"].gather(-1, oracle["tokens"][..., None])[..., 0]


def log_sum_over_masked(oracle) -> torch.Tensor:
    """Soft evidence at masked positions; emission and token evidence at observed ones."""
    observed = oracle["observed_mask"]
    return coupled(masked=True).log_partition + torch.where(
        observed, token_evidence(oracle), evidence_mass(oracle)
    ).sum(-1)


def log_sum_over_all(oracle) -> torch.Tensor:
    return coupled(masked=False).log_partition + evidence_mass(oracle).sum(-1)


@CATEGORICAL
@BOTH_VERSIONS
def test_log_likelihood_of_tokens_is_pyjuices(name, version):
    oracle = ORACLES[name]
    logits = torch.zeros(*oracle["tokens"].shape, oracle["emit"].shape[-1])
    given = torch.ones_like(oracle["tokens"], dtype=torch.bool)
    ours = CoupledCategorical(logits, circuit(oracle), oracle["tokens"], observed=given)
    assert_close(ours.log_partition, oracle[f"{version}.ll"])
    assert_close(ours.log_partition, oracle["brute_f64.ll"])


@CATEGORICAL
@BOTH_VERSIONS
def test_log_likelihood_with_missing_tokens_is_pyjuices(name, version):
    oracle = ORACLES[name]
    vocab = oracle["emit"].shape[-1]
    logits = torch.zeros(*oracle["tokens"].shape, vocab)
    observed = oracle["observed_mask"]
    ours = CoupledCategorical(logits, circuit(oracle), oracle["tokens"], observed=observed)
    # A flat prediction weighs each token 1 / V, where a sum over missing tokens weighs it 1.
    missing = (~observed).sum(-1) * torch.tensor(float(vocab)).log()
    assert_close(ours.log_partition + missing, oracle[f"{version}.ll_missing"])
    assert_close(ours.log_partition + missing, oracle["brute_f64.ll_missing"])


@BOTH_VERSIONS
def test_normalising_constant_is_pyjuices(version):
    oracle = ORACLES["ext_hmm_v20"]
    assert_close(log_sum_over_all(oracle), oracle[f"{version}.normalizing_constant"])
    assert_close(log_sum_over_all(oracle), oracle["brute_f64.normalizing_constant"])


@BOTH_VERSIONS
def test_unnormalised_likelihoods_are_pyjuices(version):
    oracle = ORACLES["ext_hmm_v20"]
    whole = coupled(masked=False).log_prob(oracle["tokens"]) + log_sum_over_all(oracle)
    masked = log_sum_over_masked(oracle)
    assert_close(whole, oracle["brute_f64.unnormalized_ll"])
    assert_close(masked, oracle["brute_f64.unnormalized_ll_masked"])
    assert_close(whole, oracle[f"{version}.unnormalized_ll"])
    assert_close(masked, oracle[f"{version}.unnormalized_ll_masked"])


@BOTH_VERSIONS
@pytest.mark.parametrize("masked", [False, True])
def test_likelihoods_with_emissions_normalised_by_evidence_are_pyjuices(version, masked):
    """PyJuice's `normalized` divides each observed emission by its state's soft evidence."""
    oracle = ORACLES["ext_hmm_v20"]
    batch, length, vocab = oracle["evidence_logp"].shape
    everywhere = torch.ones(batch, length, dtype=torch.bool)
    observed = oracle["observed_mask"] if masked else everywhere
    weighted = oracle["emit"].log() + oracle["evidence_logp"][:, :, None]  # [B, L, H, V]
    emission = torch.where(observed[..., None, None], weighted.log_softmax(-1), weighted)
    tables = (oracle["init"].log(), oracle["trans"].log())
    ours = [
        CoupledCategorical(
            torch.zeros(1, length, vocab),
            Potentials(*tables, emission[row]),
            oracle["tokens"][row : row + 1],
            observed=observed[row : row + 1],
        ).log_partition
        for row in range(batch)
    ]
    flat = (~observed).sum(-1) * torch.tensor(float(vocab)).log()
    key = "normalized_ll_masked" if masked else "normalized_ll"
    assert_close(torch.cat(ours) + flat, oracle[f"{version}.{key}"])
    assert_close(torch.cat(ours) + flat, oracle[f"brute_f64.{key}"])


@BOTH_VERSIONS
def test_token_marginals_of_the_product_are_pyjuices(version):
    oracle = ORACLES["ext_hmm_v20"]
    ours = coupled(masked=False).marginals
    assert_close(ours, oracle[f"{version}.product_token_marginals"])
    assert_close(ours, oracle["autograd_f64.product_token_marginals"])


def test_latent_posterior_is_the_exact_one():
    oracle = ORACLES["ext_hmm_v20"]
    ours = coupled(masked=True).latent_posterior[3]
    assert_close(ours, oracle["exact_f64.latent_posterior_row3"])


@BOTH_VERSIONS
def test_pyjuices_latent_samples_are_consistent_with_our_posterior(version):
    oracle = ORACLES["ext_hmm_v20"]
    ours = coupled(masked=True).latent_posterior[3]
    samples = oracle[f"{version}.cond_samples_row3"]
    assert samples.shape == (1024, 6)
    for position in range(6):
        counts = torch.bincount(samples[:, position], minlength=8)
        assert_drawn_from(counts, ours[position])


@BOTH_VERSIONS
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_logits_given_latents_are_those_of_the_reference_code(version, temperature):
    oracle = ORACLES["ext_hmm_v20"]
    start, end = oracle["reference.start_end"].tolist()
    logits, ids = oracle["reference.in_logits"], oracle["reference.input_ids"]
    run = f"reference.{version}.T{temperature}"
    latents, theirs = oracle[f"{run}.sampled_latents"], oracle[f"{run}.out_logits"]
    window = slice(start, end)
    ours = CoupledCategorical(logits[:, window], circuit(oracle), temperature=temperature)
    assert_close(ours.logits_given(latents), theirs[:, window].log_softmax(-1))

    masked = ids[:, window] == oracle["reference.mask_id"]
    partly = CoupledCategorical(
        logits[:, window],
        circuit(oracle),
        ids[:, window],
        observed=~masked,
        temperature=temperature,
    )
    ours = partly.logits_given(latents)[masked]
    assert_close(ours, theirs[:, window][masked].log_softmax(-1))
    assert_close(logits[:, :start], theirs[:, :start])
