"""`marginals`, `latent_posterior` and `logits_given` against enumeration."""

import pytest
import torch
from agreement import assert_logs_agree, assert_probabilities_agree
from cases import ALL, AWKWARD, STRUCTURED, STRUCTURES, impossible_case, random_case

EXACT = pytest.mark.parametrize("name", ALL)
DTYPE = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["fp32", "fp64"]
)


def is_active(case, row):
    return "active" not in case.options or bool(case.options["active"][row])


def rounding(case, row, dtype, tolerance):
    return max(tolerance, case.enumerate(row).rounding) if dtype == torch.float32 else tolerance


@EXACT
@DTYPE
def test_marginals_are_the_sums_of_the_joint(name, dtype, tolerance):
    case = ALL[name]
    ours = case.distribution(dtype).marginals
    assert_probabilities_agree(ours.sum(-1), torch.ones(ours.shape[:-1]))
    for row in range(len(case)):
        exact = case.enumerate(row)
        if exact.positions:
            close = rounding(case, row, dtype, tolerance)
            assert_probabilities_agree(ours[row, exact.positions], exact.marginals, close)


@EXACT
@DTYPE
def test_latent_posterior_is_exact(name, dtype, tolerance):
    case = ALL[name]
    ours = case.distribution(dtype).latent_posterior
    for row in range(len(case)):
        exact = case.enumerate(row)
        if exact.positions and is_active(case, row):
            close = rounding(case, row, dtype, tolerance)
            assert_probabilities_agree(ours[row, exact.positions], exact.latent_posterior, close)
        absent = [i for i in range(exact.length) if i not in exact.positions]
        assert (ours[row, absent] == 0).all()


@EXACT
def test_logits_given_latents_are_the_law_of_each_token(name):
    case = ALL[name]
    ours = case.distribution()
    g = torch.Generator().manual_seed(0)
    batch, length, _ = case.logits.shape
    latents = torch.randint(len(case.initial), (6, batch, length), generator=g)
    logits = ours.logits_given(latents)
    assert logits.shape == (6, *case.logits.shape)
    for row in range(batch):
        exact = case.enumerate(row)
        for sample, path in zip(logits[:, row], latents[:, row], strict=True):
            law = exact.law_given(path)
            if exact.positions and not law.isnan().any():
                close = rounding(case, row, torch.float32, 1e-5)
                assert_probabilities_agree(sample.exp()[exact.positions], law, close)


def test_logits_given_an_impossible_latent_are_the_backbones():
    case = random_case(70, batch=1, observed="none")
    case.emission = torch.full_like(case.emission, -torch.inf)
    ours = case.distribution().logits_given(torch.zeros(1, 4, dtype=torch.long))
    assert_logs_agree(ours, case.logits.log_softmax(-1))


@EXACT
def test_marginals_of_given_tokens_are_those_of_all_tokens(name):
    case = ALL[name]
    ours = case.distribution()
    g = torch.Generator().manual_seed(0)
    value = torch.randint(case.logits.shape[-1], case.logits.shape[:2], generator=g)
    for tokens in (value, ours.sample(generator=g)):
        expected = ours.marginals.gather(-1, tokens[..., None])[..., 0]
        close = max(rounding(case, row, torch.float32, 1e-5) for row in range(len(case)))
        found = ours.marginal_probs_of(tokens)
        assert_probabilities_agree(found[ours.present], expected[ours.present], close)


def test_marginals_are_one_hot_at_observed_positions():
    case = random_case(71)
    observed = case.options["observed"]
    marginals = case.distribution().marginals[observed]
    expected = torch.nn.functional.one_hot(case.options["tokens"][observed], 4)
    assert torch.equal(marginals, expected.float())


def test_marginals_are_the_backbones_where_absent_inactive_or_impossible():
    case = random_case(
        72, batch=2, observed="none", present="interior", active=torch.tensor([False, True])
    )
    phi = case.logits.softmax(-1)
    ours = case.distribution().marginals
    assert_probabilities_agree(ours[0], phi[0])
    assert_probabilities_agree(ours[1, 1], phi[1, 1])
    case = impossible_case()
    assert_probabilities_agree(case.distribution().marginals[0], case.logits[0].softmax(-1))


def test_forbidden_tokens_have_no_probability():
    marginals = ALL["forbidden token"].distribution().marginals
    assert (marginals[..., 1] == 0).all()


def test_factorized_logits_are_the_backbone_alone():
    case = random_case(73, temperature=0.5)
    ours = case.distribution().factorized_logits.exp()
    observed = case.options["observed"]
    expected = (case.logits / 0.5).softmax(-1)
    one_hot = torch.nn.functional.one_hot(case.options["tokens"], 4).float()
    assert_probabilities_agree(ours, torch.where(observed[..., None], one_hot, expected))


def test_an_impossible_row_gives_no_nan():
    ours = impossible_case().distribution()
    assert not ours.marginals.isnan().any()
    assert not ours.latent_posterior.isnan().any()


@pytest.mark.parametrize(
    "name",
    ["absent anywhere", "one-hot evidence by temperature", *AWKWARD, *STRUCTURES, *STRUCTURED],
)
def test_a_row_does_not_depend_on_its_batchmates(name):
    case = ALL[name]
    together = case.distribution()
    for row in range(len(case)):
        alone = case.rows([row]).distribution()
        assert_probabilities_agree(alone.marginals[0], together.marginals[row])
        assert_probabilities_agree(alone.latent_posterior[0], together.latent_posterior[row])
