"""When two numbers count as the same."""

from __future__ import annotations

import torch


def assert_logs_agree(ours: torch.Tensor, exact: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Within `tolerance`, relative where the logarithm exceeds one; -inf exactly."""
    ours, exact = ours.detach().double(), exact.detach().double()
    assert ours.shape == exact.shape
    assert not ours.isnan().any()
    assert torch.equal(ours == -torch.inf, exact == -torch.inf)
    finite = exact > -torch.inf
    error = (ours - exact)[finite].abs() / exact[finite].abs().clamp(min=1)
    assert error.numel() == 0 or float(error.max()) <= tolerance


def assert_probabilities_agree(
    ours: torch.Tensor, exact: torch.Tensor, tolerance: float = 1e-5
) -> None:
    assert ours.shape == exact.shape
    assert not ours.isnan().any()
    assert float((ours.double() - exact.double()).abs().max()) <= tolerance


def assert_drawn_from(counts: torch.Tensor, probabilities: torch.Tensor) -> None:
    """Chi-square test, with outcomes expected fewer than five times pooled into one."""
    from scipy.stats import chi2

    counts, probabilities = counts.double(), probabilities.double()
    expected = probabilities * counts.sum()
    assert counts[probabilities < 1e-12].sum() == 0, "an impossible outcome was drawn"
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    kept = expected >= 1  # the pool of rare outcomes may be all but empty
    statistic = ((observed - expected)[kept] ** 2 / expected[kept]).sum()
    freedom = int(kept.sum()) - 1
    assert observed[~kept].sum() <= 10
    if freedom:
        assert chi2.sf(float(statistic), freedom) > 1e-4


def counts_of(drawn: torch.Tensor, outcomes: torch.Tensor) -> torch.Tensor:
    """How often each row of `outcomes` `[X, n]` occurs in `drawn` `[N, n]`."""
    base = int(max(drawn.max(), outcomes.max())) + 1
    weights = base ** torch.arange(outcomes.shape[1])
    table = torch.full((int(base ** outcomes.shape[1]),), -1)
    table[(outcomes * weights).sum(1)] = torch.arange(len(outcomes))
    return torch.bincount(table[(drawn * weights).sum(1)], minlength=len(outcomes))
