"""`viterbi` against the maximum over all pairs of tokens and latents."""

import pytest
import torch
from agreement import assert_logs_agree
from cases import ALL, impossible_case, random_case


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_viterbi_finds_the_best_pair_of_tokens_and_latents(name, dtype):
    case = ALL[name]
    path = case.distribution(dtype).viterbi()
    for row in range(len(case)):
        exact = case.enumerate(row)
        if not exact.positions or not bool(case.options.get("active", torch.ones(9))[row]):
            continue
        close = max(1e-5, exact.rounding) if dtype == torch.float32 else 1e-10
        assert_logs_agree(path.log_prob[row], exact.best, close)
        pair = exact.pair_log_prob(path.tokens[row], path.latents[row])
        assert_logs_agree(pair, exact.best, close)


def test_viterbi_keeps_observed_tokens():
    case = random_case(90)
    observed = case.options["observed"]
    tokens = case.distribution().viterbi().tokens
    assert torch.equal(tokens[observed], case.options["tokens"][observed])


def test_viterbi_is_the_argmax_of_the_backbone_where_the_circuit_is_not_active():
    case = random_case(91, observed="none", active=torch.tensor([True, False, False]))
    tokens = case.distribution().viterbi().tokens
    assert torch.equal(tokens[1:], case.logits[1:].argmax(-1))


def test_viterbi_of_an_impossible_row_is_not_nan():
    path = impossible_case().distribution().viterbi()
    assert not path.log_prob.isnan().any()
    assert path.log_prob[1].isfinite()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_best_latents_are_the_most_probable_path_whatever_the_tokens(name, dtype):
    case = ALL[name]
    latents = case.distribution(dtype).best_latents()
    for row in range(len(case)):
        exact = case.enumerate(row)
        if not exact.positions or not bool(case.options.get("active", torch.ones(9))[row]):
            continue
        if exact.log_partition == -torch.inf:
            continue
        close = max(1e-5, exact.rounding) if dtype == torch.float32 else 1e-10
        probs = exact.path_prob
        ours = (exact.latents == latents[row, exact.positions]).all(-1)
        assert_logs_agree(probs[ours].log()[0], probs.max().log(), close)
