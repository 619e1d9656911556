"""`log_partition`, `log_prob` and `coupling_gain` against the sum over all completions."""

import pytest
import torch
from agreement import assert_logs_agree
from cases import ALL, AWKWARD, STRUCTURED, STRUCTURES, impossible_case, random_case, underflow_case

EXACT = pytest.mark.parametrize("name", ALL)
DTYPE = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-11)], ids=["fp32", "fp64"]
)


def every_completion(case, row):
    """`[X, B, L]`: the completions of one row, with the other rows repeating what they hold."""
    exact = case.enumerate(row)
    batch, length, _ = case.logits.shape
    value = torch.zeros(len(exact.tokens), batch, length, dtype=torch.long)
    value[:, row] = exact.on_canvas(exact.tokens)
    return value


@EXACT
@DTYPE
def test_log_partition_is_the_sum_over_all_completions_and_paths(name, dtype, tolerance):
    case = ALL[name]
    active = case.options.get("active", torch.ones(len(case), dtype=torch.bool))
    rows = [r for r in range(len(case)) if active[r] and case.enumerate(r).positions]
    exact = torch.stack([case.enumerate(row).log_partition for row in rows])
    ours = case.distribution(dtype).log_partition
    assert ours.dtype == dtype
    assert_logs_agree(ours[rows], exact, tolerance)


@EXACT
@DTYPE
def test_log_prob_of_every_completion_is_exact(name, dtype, tolerance):
    case = ALL[name]
    ours = case.distribution(dtype)
    for row in range(len(case)):
        exact = case.enumerate(row)
        log_prob = ours.log_prob(every_completion(case, row))[:, row]
        # A log-probability is a difference, so its error is relative to what is subtracted.
        scale = max(exact.rounding / 1e-5 if dtype == torch.float32 else 1, 1)
        assert_logs_agree(log_prob, exact.log_prob, scale * tolerance)


@EXACT
def test_probabilities_of_all_completions_sum_to_one(name):
    case = ALL[name]
    ours = case.distribution()
    for row in range(len(case)):
        total = ours.log_prob(every_completion(case, row))[:, row].double().exp().sum()
        tolerance = max(1e-5, case.enumerate(row).rounding)
        assert float((total - 1).abs()) <= tolerance


@EXACT
def test_coupling_gain_is_the_circuit_likelihood_over_the_partition(name):
    case = ALL[name]
    ours = case.distribution()
    for row in range(len(case)):
        exact = case.enumerate(row)
        possible = (exact.log_factorized > -torch.inf) | (exact.log_circuit > -torch.inf).any(1)
        gain = ours.coupling_gain(every_completion(case, row))[:, row]
        if exact.positions:
            scale = max(exact.rounding / 1e-5, 1)
            assert_logs_agree(gain[possible], exact.coupling_gain[possible], scale * 1e-5)
        else:
            assert_logs_agree(gain, torch.zeros(1))


def test_coupling_gain_is_zero_where_the_circuit_is_not_active():
    case = random_case(60, active=torch.zeros(3, dtype=torch.bool), context=2.0)
    value = torch.randint(4, (5, 3, 4), generator=torch.Generator().manual_seed(0))
    assert_logs_agree(case.distribution().coupling_gain(value), torch.zeros(5, 3))


def test_log_prob_of_tokens_that_contradict_the_observed_ones_is_minus_infinity():
    case = random_case(61)
    observed = case.options["observed"]
    value = torch.where(observed, case.options["tokens"], 0)
    assert case.distribution().log_prob(value).isfinite().all()
    row, position = observed.nonzero()[0].tolist()
    value[row, position] = (value[row, position] + 1) % 4
    log_prob = case.distribution().log_prob(value)
    assert log_prob[row] == -torch.inf
    assert log_prob[[r for r in range(3) if r != row]].isfinite().all()


def test_log_prob_ignores_what_stands_at_absent_positions():
    case = random_case(62, observed="none", present="interior")
    value = torch.ones(3, 4, dtype=torch.long)
    other = torch.where(case.options["present"], value, -100)
    ours = case.distribution()
    assert torch.equal(ours.log_prob(value), ours.log_prob(other))


def test_log_prob_keeps_leading_sample_dimensions():
    ours = random_case(63, observed="none").distribution()
    value = torch.randint(4, (2, 5, 3, 4), generator=torch.Generator().manual_seed(0))
    log_prob = ours.log_prob(value)
    assert log_prob.shape == (2, 5, 3)
    assert_logs_agree(log_prob[1, 2], ours.log_prob(value[1, 2]))


def test_an_impossible_row_is_reported_by_its_number():
    ours = impossible_case().distribution()
    assert ours.log_partition[0] == -torch.inf
    assert ours.log_partition[1].isfinite()
    with pytest.raises(ValueError, match=r"`log_partition` is -inf for rows \[0\].*`with_active`"):
        ours.log_prob(torch.zeros(2, 4, dtype=torch.long))


def test_an_impossible_row_can_be_left_factorized():
    case = impossible_case()
    factorized = case.distribution().with_active(torch.tensor([False, True]))
    log_prob = factorized.log_prob(torch.tensor([[0, 1, 3, 2]] * 2))
    expected = case.logits[0].log_softmax(-1)[torch.arange(4), torch.tensor([0, 1, 3, 2])].sum()
    assert_logs_agree(log_prob[:1], expected[None])


def test_a_circuit_without_any_possible_path_can_be_left_factorized():
    case = random_case(64, batch=1, observed="none")
    case.transition = torch.full_like(case.transition, -torch.inf)
    assert case.distribution().log_partition[0] == -torch.inf
    factorized = case.distribution().with_active(torch.tensor([False]))
    value = torch.tensor([[0, 1, 3, 2]])
    expected = case.logits.log_softmax(-1).gather(-1, value[..., None]).sum()
    assert_logs_agree(factorized.log_prob(value), expected[None])


@pytest.mark.parametrize(
    "name",
    ["absent anywhere", "one-hot evidence by temperature", *AWKWARD, *STRUCTURES, *STRUCTURED],
)
def test_a_row_does_not_depend_on_its_batchmates(name):
    case = ALL[name]
    together = case.distribution()
    for row in range(len(case)):
        alone = case.rows([row]).distribution()
        assert_logs_agree(alone.log_partition, together.log_partition[row : row + 1])


def test_the_order_of_rows_does_not_matter():
    case = underflow_case()
    order = [2, 0, 3, 1]
    ours = case.distribution().log_partition[order]
    assert_logs_agree(case.rows(order).distribution().log_partition, ours)


def test_half_precision_logits_are_worked_on_in_float32():
    ours = random_case(65, dtype=torch.bfloat16).distribution()
    assert ours.log_partition.dtype == torch.float32
    assert ours.marginals.dtype == torch.float32
