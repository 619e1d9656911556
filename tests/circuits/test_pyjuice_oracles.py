"""Circuits saved by PyJuice: our numbers within 1e-4 of PyJuice's own (see `tests/fixtures`)."""

from pathlib import Path

import pytest
import torch
from agreement import assert_drawn_from
from safetensors.torch import load_file

from codd_hf.circuits import CoupledCategorical, Potentials

FIXTURES = Path(__file__).parent.parent / "fixtures"
ORACLES = {
    name: load_file(FIXTURES / f"{name}.safetensors")
    for name in ("cat_hmm", "cat_hmm_blocks", "ext_hmm_v20")
}
EVIDENCE = ORACLES["ext_hmm_v20"]
VERSION = pytest.mark.parametrize("version", ["pyjuice241", "pyjuice263"])


def circuit(oracle) -> Potentials:
    return Potentials(oracle["init"].log(), oracle["trans"].log(), oracle["emit"].log())


def assert_close(ours: torch.Tensor, *theirs: torch.Tensor) -> None:
    for each in theirs:
        assert ours.shape == each.shape
        assert float((ours.double() - each.double()).abs().max()) < 1e-4


def coupled(masked: bool) -> CoupledCategorical:
    """The product of the saved circuit and the saved evidence."""
    observed = EVIDENCE["observed_mask"] if masked else None
    return CoupledCategorical(
        EVIDENCE["evidence_logp"], circuit(EVIDENCE), EVIDENCE["tokens"], observed=observed
    )


def log_sum(masked: bool) -> torch.Tensor:
    """`[B]`: PyJuice's evidence is not normalised over the vocabulary, as ours is.

    At observed positions it also counts the evidence of the token.
    """
    scale = EVIDENCE["evidence_logp"].logsumexp(-1)
    if masked:
        token = EVIDENCE["evidence_logp"].gather(-1, EVIDENCE["tokens"][..., None])[..., 0]
        scale = torch.where(EVIDENCE["observed_mask"], token, scale)
    return coupled(masked).log_partition + scale.sum(-1)


@pytest.mark.parametrize("name", ["cat_hmm", "cat_hmm_blocks"])
@pytest.mark.parametrize(("observed", "key"), [("all", "ll"), ("observed_mask", "ll_missing")])
@VERSION
def test_log_likelihood_of_tokens_some_of_them_missing_is_pyjuices(name, observed, key, version):
    oracle = ORACLES[name]
    seen = oracle.get(observed, torch.ones_like(oracle["tokens"], dtype=torch.bool))
    vocab = oracle["emit"].shape[-1]
    logits = torch.zeros(*seen.shape, vocab)
    ours = CoupledCategorical(logits, circuit(oracle), oracle["tokens"], seen).log_partition
    # A flat prediction weighs each token 1 / V, where a sum over missing tokens weighs it 1.
    ours = ours + (~seen).sum(-1) * torch.tensor(float(vocab)).log()
    assert_close(ours, oracle[f"{version}.{key}"], oracle[f"brute_f64.{key}"])


@VERSION
def test_normalising_constant_and_unnormalised_likelihoods_are_pyjuices(version):
    whole = coupled(masked=False).log_prob(EVIDENCE["tokens"]) + log_sum(masked=False)
    for key, ours in (
        ("normalizing_constant", log_sum(masked=False)),
        ("unnormalized_ll", whole),
        ("unnormalized_ll_masked", log_sum(masked=True)),
    ):
        assert_close(ours, EVIDENCE[f"{version}.{key}"], EVIDENCE[f"brute_f64.{key}"])


@VERSION
@pytest.mark.parametrize("masked", [False, True])
def test_likelihoods_with_emissions_normalised_by_evidence_are_pyjuices(version, masked):
    """PyJuice's `normalized` divides each observed emission by its state's soft evidence."""
    tokens, length = EVIDENCE["tokens"], EVIDENCE["tokens"].shape[1]
    vocab, mask = EVIDENCE["emit"].shape[-1], EVIDENCE["observed_mask"]
    observed = mask if masked else torch.ones_like(mask)
    weighted = EVIDENCE["emit"].log() + EVIDENCE["evidence_logp"][:, :, None]  # [B, L, H, V]
    emission = torch.where(observed[..., None, None], weighted.log_softmax(-1), weighted)
    ours = [
        CoupledCategorical(
            torch.zeros(1, length, vocab),
            Potentials(EVIDENCE["init"].log(), EVIDENCE["trans"].log(), emission[row]),
            tokens[row : row + 1],
            observed[row : row + 1],
        ).log_partition
        for row in range(len(tokens))
    ]
    flat = (~observed).sum(-1) * torch.tensor(float(vocab)).log()
    key = "normalized_ll_masked" if masked else "normalized_ll"
    oracles = (EVIDENCE[f"{source}.{key}"] for source in (version, "brute_f64"))
    assert_close(torch.cat(ours) + flat, *oracles)


@VERSION
def test_token_marginals_and_latent_samples_are_pyjuices(version):
    oracles = (f"{source}.product_token_marginals" for source in (version, "autograd_f64"))
    assert_close(coupled(masked=False).marginals, *(EVIDENCE[key] for key in oracles))
    posterior = coupled(masked=True).latent_posterior[3]
    assert_close(posterior, EVIDENCE["exact_f64.latent_posterior_row3"])
    samples = EVIDENCE[f"{version}.cond_samples_row3"]
    assert samples.shape == (1024, 6)
    for position, law in enumerate(posterior):
        assert_drawn_from(torch.bincount(samples[:, position], minlength=8), law)


@VERSION
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_logits_given_latents_are_those_of_the_reference_code(version, temperature):
    window = slice(*EVIDENCE["reference.start_end"].tolist())
    logits = EVIDENCE["reference.in_logits"][:, window]
    ids = EVIDENCE["reference.input_ids"][:, window]
    run = f"reference.{version}.T{temperature}"
    latents, theirs = EVIDENCE[f"{run}.sampled_latents"], EVIDENCE[f"{run}.out_logits"][:, window]
    masked = ids == EVIDENCE["reference.mask_id"]
    given = {"temperature": temperature}
    ours = CoupledCategorical(logits, circuit(EVIDENCE), **given).logits_given(latents)
    assert_close(ours, theirs.log_softmax(-1))
    partly = CoupledCategorical(logits, circuit(EVIDENCE), ids, ~masked, **given)
    assert_close(partly.logits_given(latents)[masked], theirs[masked].log_softmax(-1))
