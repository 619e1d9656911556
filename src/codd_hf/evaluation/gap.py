"""The misspecification gap: the loss of one parallel step, and the part that a circuit wins back.

Windows of held-out answers are masked at some ratios, as block decoding meets them: earlier windows
visible, later ones fully masked. Per ratio, nats per masked token of

- the factorized backbone, in one step;
- the backbone coupled with each head, in one step;
- the backbone revealing the true tokens one at a time, left to right ("sequential").

Gap closed is `(factorized - coupled) / (factorized - sequential)` (arXiv 2603.00045, Fig. 1-2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..circuits.factorized import without_tokens
from ..coupling.heads import CallHead
from ..data.canvases import (
    CanvasBatch,
    TokenizedExample,
    collate,
    padding_token_id,
    tokenize_examples,
)
from ..data.rows import RowReport
from ..data.sources import Example
from ..modeling_codd import CoDDModel
from ..modeling_head import CoDDHead
from ..pipelines.pipeline_codd import CoDDPipeline
from ..runtime.report import table
from .report import Report
from .settings import GapSettings
from .statistics import Estimate, mean

SMALLEST_GAP = 0.05
"""Gap closed is left out where the gap is smaller than this, in nats."""

TEMPERED = "factorized, tempered"
"""The backbone at the evidence temperature, without a circuit: the effect of it alone."""


@dataclass
class GapRow:
    """One mask ratio.

    Attributes:
        ratio: share of the window that is masked.
        nats: per masked token, by method: `factorized`, the heads' names and `sequential`, and
            `factorized, tempered` where there is an evidence temperature.
        gains: per head, the paired differences `factorized - head`.
        gap_closed: per head; None where the gap does not exceed `SMALLEST_GAP`.
    """

    ratio: float
    nats: dict[str, Estimate]
    gains: dict[str, Estimate]
    gap_closed: dict[str, float | None]

    def as_dict(self) -> dict[str, Any]:
        return {
            "ratio": self.ratio,
            "nats": {name: figure.value for name, figure in self.nats.items()},
            "standard_errors": {name: figure.error for name, figure in self.nats.items()},
            "gains": {name: figure.value for name, figure in self.gains.items()},
            "gain_errors": {name: figure.error for name, figure in self.gains.items()},
            "gap_closed": self.gap_closed,
        }


class _Windows(NamedTuple):
    """A window in each row of a batch; `rank` is the order in which its tokens are masked."""

    canvas: CanvasBatch
    columns: torch.Tensor  # [n, L]
    rank: torch.Tensor  # [n, L]

    @property
    def truth(self) -> torch.Tensor:
        return self.canvas.input_ids.gather(1, self.columns)


@torch.no_grad()
def measure_gap(
    model: CoDDModel,
    heads: Mapping[str, CoDDHead],
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[TokenizedExample],
    *,
    ratios: Sequence[float] | None = None,
    sequential: bool = True,
    batch_size: int = 32,
    evidence_temperature: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> list[GapRow]:
    """Measures the gap on one random full window of each example that has one.

    Args:
        model: the backbone (its own head is not used).
        heads: to couple it with, by name.
        tokenizer: the backbone's.
        examples: held-out text.
        ratios: mask ratios in (0, 1]; default 0.1 to 1.
        sequential: also run the sequential ideal, which takes a pass per masked token.
        batch_size: windows at once.
        evidence_temperature: divides the backbone's logits before the circuits see them; default,
            each head's own. The factorized column is without; one more column shows the effect of
            the last head's temperature on it.
        seed: chooses windows and masks.
        progress: show a progress bar.

    Raises:
        ValueError: no example has a full window, a likelihood is not finite, or a ratio is outside
            (0, 1].
    """
    ratios = GapSettings().ratios if ratios is None else ratios
    if bad := [r for r in ratios if not 0 < r <= 1]:
        raise ValueError(f"`ratios` must lie in (0, 1], got {bad}.")
    for head in heads.values():
        model.heads.bind(head)
    temperatures = {
        name: evidence_temperature or head.config.evidence_temperature
        for name, head in heads.items()
    }
    length = model.window_length
    frozen = {name: CallHead(None, head, length).frozen() for name, head in heads.items()}
    numbers = [i for i, example in enumerate(examples) if len(example.answer_ids) > length]
    chosen = [examples[i] for i in numbers]
    if not chosen:
        raise ValueError(
            f"`examples` have no answer of at least {length} tokens (one full window)."
        )
    batches = _windows(model, chosen, tokenizer, batch_size, seed)
    counts = [max(round(ratio * length), 1) for ratio in ratios]
    passes = len(batches) * sum(1 + (count if sequential else 0) for count in counts)
    rows = []
    with tqdm(total=passes, desc="measuring the gap", unit="pass", disable=not progress) as bar:
        for ratio, count in zip(ratios, counts, strict=True):
            scores: dict[str, list[torch.Tensor]] = {}
            for batch in batches:
                masked = batch.rank < count
                scored = _one_step(model, frozen, temperatures, batch, masked)
                bar.update()
                if sequential:
                    scored["sequential"] = _sequential(model, batch, masked, bar)
                for name, value in scored.items():
                    scores.setdefault(name, []).append(value)
            nats = {name: -torch.cat(s).double().cpu() / count for name, s in scores.items()}
            for name, values in nats.items():
                if not values.isfinite().all():
                    bad = numbers[int((~values.isfinite()).long().argmax())]
                    raise ValueError(
                        f"`examples` must have finite likelihoods, but number {bad} (from 0) has "
                        f"none under {name!r} at the mask ratio {ratio:g}: leave it out."
                    )
            rows.append(_row(ratio, {name: mean(v) for name, v in nats.items()}, heads))
    return rows


def _windows(
    model: CoDDModel,
    examples: Sequence[TokenizedExample],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    seed: int,
) -> list[_Windows]:
    """One random window of text (no end-of-text) of each example."""
    length, generator = model.window_length, torch.Generator().manual_seed(seed)
    whole = torch.tensor([(len(e.answer_ids) - 1) // length for e in examples])
    first = (torch.rand(len(examples), generator=generator) * whole).long() * length
    ranks = torch.rand(len(examples), length, generator=generator).argsort(1).argsort(1)
    batches = []
    for start in range(0, len(examples), batch_size):
        rows = slice(start, start + batch_size)
        canvas = collate(
            examples[rows],
            window_length=length,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=padding_token_id(tokenizer),
        )
        columns = (canvas.answer_start + first[rows])[:, None] + torch.arange(length)
        device = model.device
        batches.append(_Windows(canvas.to(device), columns.to(device), ranks[rows].to(device)))
    return batches


def _noised(model: CoDDModel, batch: _Windows, masked: torch.Tensor) -> torch.Tensor:
    """Input ids with `masked [n, L]` of the window and everything after it hidden."""
    canvas, columns = batch.canvas, batch.columns
    position = torch.arange(canvas.input_ids.shape[1], device=columns.device)
    later = (position > columns[:, -1:]) & (position < canvas.answer_end[:, None])
    hidden = later.scatter(1, columns, masked)
    return canvas.input_ids.masked_fill(hidden, model.config.mask_token_id)


def _log_phi(model: CoDDModel, logits: torch.Tensor) -> torch.Tensor:
    """The backbone's log-probabilities over the tokens that may be generated."""
    config = model.config
    logits = without_tokens(logits.float(), config.mask_token_id, config.forbidden_token_ids)
    return logits.log_softmax(-1)


def _one_step(
    model: CoDDModel,
    heads: Mapping[str, CallHead],
    temperatures: Mapping[str, float],
    batch: _Windows,
    masked: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Log-likelihood `[n]` of the masked tokens under the factorized and the coupled models."""
    ids, truth = _noised(model, batch, masked), batch.truth
    states = model.backbone_states(ids, batch.canvas.attention_mask)
    rows = torch.arange(len(ids), device=ids.device)[:, None]
    logits = states.logits((rows, batch.columns))
    factorized = {"factorized": 1.0}
    if temperatures and (last := [*temperatures.values()][-1]) != 1:
        factorized[TEMPERED] = last
    scores = {}
    for name, temperature in factorized.items():
        log_phi = _log_phi(model, logits / temperature).gather(-1, truth[..., None])[..., 0]
        scores[name] = log_phi.masked_fill(~masked, 0).sum(1)
    for name, head in heads.items():
        distribution = model.window_distribution(
            states,
            ids,
            batch.columns[:, 0],
            batch.canvas.attention_mask,
            temperature=temperatures[name],
            head=head,
        )
        scores[name] = distribution.log_prob(truth)
    return scores


def _sequential(model: CoDDModel, batch: _Windows, masked: torch.Tensor, bar: tqdm) -> torch.Tensor:
    """Log-likelihood `[n]` of the masked tokens when each is revealed before the next, in order."""
    masked, total = masked.clone(), 0.0
    rows = torch.arange(len(masked), device=masked.device)
    while masked.any():  # the rows have equally many
        ids, first = _noised(model, batch, masked), masked.long().argmax(1)
        states = model.backbone_states(ids, batch.canvas.attention_mask)
        logits = states.logits((rows, batch.columns[rows, first]))
        truth = batch.truth[rows, first]
        total = total + _log_phi(model, logits).gather(1, truth[:, None])[:, 0]
        masked[rows, first] = False
        bar.update()
    return total


def _row(ratio: float, nats: dict[str, Estimate], heads: Mapping[str, CoDDHead]) -> GapRow:
    gains = {name: nats["factorized"] - nats[name] for name in heads}
    closed = {}
    if "sequential" in nats:
        gap = (nats["factorized"] - nats["sequential"]).value
        closed = {n: gain.value / gap if gap > SMALLEST_GAP else None for n, gain in gains.items()}
    return GapRow(ratio, nats, gains, closed)


def gap_table(rows: Sequence[GapRow]) -> str:
    """The rows as a table in Markdown."""
    return table(
        [
            {"mask ratio": f"{row.ratio:g}"}
            | {method: f"{figure:.3f}" for method, figure in row.nats.items()}
            | {f"gain, {head}": f"{figure:+.3f}" for head, figure in row.gains.items()}
            | {
                f"gap closed, {head}": None if share is None else f"{100 * share:.0f} %"
                for head, share in row.gap_closed.items()
            }
            for row in rows
        ]
    )


def evaluate(pipeline: CoDDPipeline, examples: Sequence[Example], settings: GapSettings) -> Report:
    """`codd-hf evaluate gap`: the raw and the corrected stage 1, other heads, and the model's."""
    model, heads = pipeline.model, {}
    if settings.stage1 is not None:
        for name, alpha in (("raw product", 0.0), ("corrected", 1.0)):
            heads[name] = CoDDHead.from_pretrained(settings.stage1)
            heads[name].set_alpha(alpha)
    for entry in settings.head:
        name, _, path = entry.partition("=")
        heads[name] = CoDDHead.from_pretrained(path)
    heads["fitted"] = fitted = model.coupling_head
    for head in heads.values():
        head.to(model.device)
        for name in ("evidence_size", "evidence_groups"):
            if (value := getattr(settings, name)) is not None:
                setattr(head.config, name, value)
    rows = measure_gap(
        model,
        heads,
        pipeline.tokenizer,
        tokenize_examples(
            examples,
            pipeline.tokenizer,
            mask_token_id=model.config.mask_token_id,
            never=model.config.forbidden_token_ids or (),
            report=RowReport(repr(settings.dataset), settings.skip_bad_rows),
        ),
        ratios=settings.ratios,
        sequential=settings.sequential,
        batch_size=settings.batch_size,
        evidence_temperature=settings.evidence_temperature,
        seed=settings.seed,
    )
    facts = {
        "examples": len(examples),
        "evidence_temperature": settings.evidence_temperature or fitted.config.evidence_temperature,
        "evidence_size": fitted.evidence_size,
        "evidence_groups": fitted.config.evidence_groups,
        "seed": settings.seed,
    }
    return Report(gap_table(rows), facts, {"rows": [row.as_dict() for row in rows]})
