"""One small window, enumerated, and how often a step draws each of its completions."""

from __future__ import annotations

import torch
from scipy.stats import chi2

from codd_hf.circuits import CoupledCategorical
from codd_hf.decoding.call import DecodingCall
from codd_hf.decoding.layout import lay_out
from codd_hf.decoding.step import CanvasReader, Stage
from codd_hf.schedulers.scheduling_codd import CoDDScheduler
from tiny import enumerate_window, random_head

VOCAB, MASK, LENGTH = 5, 2, 4
HEAD = random_head(VOCAB, mask_token_id=MASK)
with torch.no_grad():
    for parameter in HEAD.parameters():  # no completion shall be all but sure
        parameter.mul_(0.6)
LOGITS = torch.randn(LENGTH, VOCAB, generator=torch.Generator().manual_seed(3))


def window(tokens: list[int], rows: int = 1, windows: int = 1) -> CoupledCategorical:
    """The same window of `tokens` (`MASK` where masked) many times."""
    number = rows * windows
    tokens = torch.tensor(tokens).expand(number, -1)
    return HEAD(LOGITS.expand(number, -1, -1), tokens=tokens, observed=tokens != MASK)


def law(tokens: list[int], temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """All completions `[N, L]` and their probabilities `[N]`, by definition."""
    with torch.no_grad():
        return enumerate_window(HEAD, LOGITS / temperature, torch.tensor(tokens), MASK)


def one_step(tokens: list[int], rows: int = 1, steps: int = 1, seed: int = 0, **settings):
    """The output of one step, with `steps` left, on many rows of the same window."""
    scheduler = CoDDScheduler(**settings)
    scheduler.set_timesteps(steps)
    sample = torch.tensor(tokens).expand(rows, -1)
    generator = torch.Generator().manual_seed(seed)
    return scheduler.step(window(tokens, rows), 1.0, sample, generator=generator)


def reader_of(model, tokens: torch.Tensor, mask: torch.Tensor, **call) -> CanvasReader:
    """Of rows `[batch, n]` in which every mask token is to be generated."""
    kwargs = {"gen_length": 1, "block_length": 4, "infill": True, **call}
    call = DecodingCall(model, CoDDScheduler(), len(tokens), **kwargs)
    return CanvasReader(model, lay_out(model, call, tokens, mask))


def stage_of(block: torch.Tensor) -> Stage:
    """Of a block `[batch, n]`, in which everything is read."""
    end = torch.full((len(block),), block.shape[1])
    return Stage(block, torch.ones_like(end), end)


def read(reader: CanvasReader, tokens: torch.Tensor, rows: range):
    """What the reader reads of some rows when these are the tokens of all."""
    reader.canvas.tokens = tokens
    return reader.read(torch.tensor(rows))


def assert_follows(
    drawn: torch.Tensor, outcomes: torch.Tensor, probabilities: torch.Tensor
) -> None:
    """Chi-square test of drawn rows `[n, k]` against the law of outcomes `[N, k]`.

    Equal outcomes are added up; those expected fewer than five times are pooled.
    """
    places = VOCAB ** torch.arange(drawn.shape[1])
    size = VOCAB ** drawn.shape[1]
    codes = (outcomes * places).sum(-1)
    expected = torch.zeros(size, dtype=torch.float64).index_add(0, codes, probabilities)
    counts = torch.bincount((drawn * places).sum(-1), minlength=size).double()
    assert counts[expected < 1e-12].sum() == 0, "an impossible outcome was drawn"
    expected = expected * len(drawn)
    rare = expected < 5
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
    kept = expected >= 1
    statistic = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    assert chi2.sf(float(statistic), int(kept.sum()) - 1) > 1e-4
