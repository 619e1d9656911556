"""Promises of the benchmarks: they run, their figures are sane, and the baseline is right."""

from __future__ import annotations

import json
import math

import pytest
import torch

from codd_hf.benchmarks import BENCHMARKS, Options
from codd_hf.benchmarks.end_to_end import BLOCK, BLOCK_CAUSAL, FACTORIZED
from codd_hf.benchmarks.head_case import QUICK, HeadCase
from codd_hf.benchmarks.timing import Rates, median_seconds
from codd_hf.circuits.reference import plain_step
from codd_hf.cli import main
from tiny import random_head as tiny_head

COLUMNS = {
    "overhead": "overhead, %",
    "head-step": "times faster",
    "end-to-end": "tokens/s",
    "memory": "emission matrices",
    "scaling": "exact / limit",
    "fitting": "ms",
}


def tiny_case(seed: int = 0):
    """A random circuit and windows `[3, 4]`, some tokens observed, all of one row masked."""
    head = tiny_head(vocab_size=7)
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(3, 4, 7, generator=generator)
    logits[..., 2] = -torch.inf
    tokens = torch.randint(3, 7, (3, 4), generator=generator)
    observed = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 1], [0, 1, 1, 0]]).bool()
    return head, logits, tokens, observed


def plain(head, *given, **options):
    with torch.no_grad():
        return plain_step((head.initial, head.transition, head.emission), *given, **options)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmark_runs_and_its_figures_are_sane(name, capsys, tmp_path):
    path = tmp_path / "figures.json"
    argv = ["bench", name, "--quick", "--repeats", "1", "--batch-size", "2"]
    assert main([*argv, "--output", str(path)]) == 0
    text = capsys.readouterr().out
    assert f"### {name}" in text
    assert "| ---" in text
    result = json.loads(path.read_text())
    assert result["environment"]["threads"] == torch.get_num_threads()
    report = result["benchmarks"][name]
    assert report["sizes"]
    for row in report["rows"]:
        numbers = [v for v in row.values() if isinstance(v, float)]
        assert all(math.isfinite(v) and v >= 0 for v in numbers)
        assert row[COLUMNS[name]] > 0
    if name != "end-to-end":
        return
    # Where both pipelines read the same they find the same tokens.
    rows = {(row["block"], row["pipeline"]): row for row in report["rows"]}
    for key in ((64, FACTORIZED), (BLOCK, "CoDDPipeline" + BLOCK_CAUSAL)):
        assert rows[key]["tokens as LLaDA2Pipeline's, %"] == 100
        assert rows[key]["passes"] == 4
    assert rows[BLOCK, FACTORIZED]["tokens as LLaDA2Pipeline's, %"] < 100  # it reads more


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_plain_paper_and_the_library_have_the_same_normaliser(temperature):
    head, logits, tokens, observed = tiny_case()
    distribution = head(logits, tokens=tokens, observed=observed, temperature=temperature)
    step = plain(head, logits, tokens, observed, temperature)
    torch.testing.assert_close(step.log_partition, distribution.log_partition)


def test_plain_paper_and_the_library_give_the_same_token_laws_for_the_same_latents():
    head, logits, tokens, observed = tiny_case()
    step = plain(head, logits, tokens, observed)
    expected = head(logits, tokens=tokens, observed=observed).logits_given(step.latents)
    masked = ~observed
    torch.testing.assert_close(step.log_probs[masked], expected[masked])


def test_plain_paper_draws_latents_from_the_exact_posterior():
    head, logits, tokens, observed = tiny_case()
    generator = torch.Generator().manual_seed(3)
    number = 1500
    row = [x[1:2].repeat(number, *[1] * (x.ndim - 1)) for x in (logits, tokens, observed)]
    latents = plain(head, *row, generator=generator).latents
    posterior = head(logits, tokens=tokens, observed=observed).latent_posterior[1]
    shares = torch.nn.functional.one_hot(latents, head.config.num_latents).float().mean(0)
    assert (shares - posterior).abs().max() < 4 * math.sqrt(0.25 / number)
    pairs = latents[:, 1:3].unique(dim=0, return_counts=True)
    exact = head(*row[:1], tokens=row[1], observed=row[2]).sample_latents(
        torch.Generator().manual_seed(4)
    )
    for pair, count in zip(*pairs, strict=True):
        other = (exact[:, 1:3] == pair).all(1).sum()
        assert abs(int(count - other)) < 5 * math.sqrt(2 * max(int(count), int(other)))


def test_random_head_is_normalised_and_its_predictions_exclude_the_mask_token():
    case = HeadCase(QUICK, Options(quick=True))
    for parameter in (case.head.initial, case.head.transition, case.head.emission):
        torch.testing.assert_close(parameter.logsumexp(-1), torch.zeros(parameter.shape[:-1]))
    assert case.logits[..., case.head.config.mask_token_id].isneginf().all()


def test_sides_are_timed_in_turns():
    order = []
    sides = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    seconds = median_seconds(sides, repeats=2, warmups=1)
    assert order == ["a", "b"] * 3
    assert all(value >= 0 for value in seconds.values())


def test_physical_limit_is_the_slower_of_moving_and_computing():
    rates = Rates(copy=10.0, product=100.0, scattered=5.0, new=10.0, cached=20.0)
    assert rates.limit(100, copy=20, cached=20) == 3
    assert rates.limit(1000, copy=20) == 10


@pytest.mark.parametrize("option", ["--repeats", "--batch-size", "--threads"])
def test_option_that_cannot_be_is_bad_usage_that_names_it(option, capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["bench", "head-step", "--quick", option, "0"])
    assert leaving.value.code == 2
    assert option[2:].replace("-", "_") in capsys.readouterr().err.replace("--threads", "threads")
