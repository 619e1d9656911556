"""The misspecification gap: the loss of one parallel step, and the part that a circuit wins back.

Windows of held-out answers are masked at some ratios, as block decoding meets them: earlier windows
visible, later ones fully masked. Per ratio, nats per masked token of

- the factorized backbone, in one step;
- the backbone coupled with each head, in one step;
- the backbone revealing the true tokens one at a time, left to right ("sequential").

Gap closed is `(factorized - coupled) / (factorized - sequential)` (arXiv 2603.00045, Fig. 1-2).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..circuits import CoupledCategorical
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
from ..hub.defaults import default_model
from ..modeling_codd import CoDDModel
from ..modeling_head import CoDDHead
from ..pipelines.pipeline_codd import CoDDPipeline
from ..runtime.report import table
from .report import Report
from .settings import GapSettings
from .statistics import Estimate, mean

Method = tuple[CallHead, float]
"""A head, or none, and its evidence temperature."""

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

    @classmethod
    def of(cls, ratio: float, nats: dict[str, Estimate], heads: Iterable[str]) -> GapRow:
        gains = {name: nats["factorized"] - nats[name] for name in heads}
        closed = {}
        if "sequential" in nats:
            gap = (nats["factorized"] - nats["sequential"]).value
            closed = {n: g.value / gap if gap > SMALLEST_GAP else None for n, g in gains.items()}
        return cls(ratio, nats, gains, closed)

    def as_dict(self) -> dict[str, Any]:
        return {
            "ratio": self.ratio,
            "nats": {name: figure.value for name, figure in self.nats.items()},
            "standard_errors": {name: figure.error for name, figure in self.nats.items()},
            "gains": {name: figure.value for name, figure in self.gains.items()},
            "gain_errors": {name: figure.error for name, figure in self.gains.items()},
            "gap_closed": self.gap_closed,
        }


@torch.no_grad()
def measure_gap(
    model: CoDDModel,
    heads: Mapping[str, CoDDHead],
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[TokenizedExample],
    settings: GapSettings,
    progress: bool = True,
) -> list[GapRow]:
    """Measures the gap on one random full window of each example that has one.

    Args:
        model: the backbone (its own head is not used).
        heads: to couple it with, by name.
        tokenizer: the backbone's.
        examples: held-out text.
        settings: those of which windows, ratios and evidence are measured.
        progress: show a progress bar.

    Raises:
        ValueError: no example has a full window, or a likelihood is not finite.
    """
    length = model.window_length
    numbers = [i for i, example in enumerate(examples) if len(example.answer_ids) > length]
    if not numbers:
        raise ValueError(
            f"`examples` have no answer of at least {length} tokens (one full window)."
        )
    factorized = CallHead(None, None, length)
    methods = {"factorized": (factorized, 1.0), TEMPERED: (factorized, 1.0)}
    for name, head in heads.items():
        model.heads.bind(head)
        temperature = settings.evidence_temperature or head.config.evidence_temperature
        methods |= {TEMPERED: (factorized, temperature)}
        methods[name] = (CallHead(None, head, length).frozen(), temperature)
    if methods[TEMPERED] == methods["factorized"]:
        del methods[TEMPERED]
    batches = _windows(model, [examples[i] for i in numbers], tokenizer, settings)
    counts = [max(round(ratio * length), 1) for ratio in settings.ratios]
    passes = len(batches) * sum(1 + settings.sequential * count for count in counts)
    rows = []
    with tqdm(total=passes, desc="measuring the gap", unit="pass", disable=not progress) as bar:
        for ratio, count in zip(settings.ratios, counts, strict=True):
            scores = {name: [] for name in methods} | (
                {"sequential": []} if settings.sequential else {}
            )
            for batch in batches:
                masked = batch.rank < count
                laws = batch.laws(model, masked, methods)
                for name in methods:
                    scores[name].append(laws[name].log_prob(batch.truth))
                bar.update()
                if settings.sequential:
                    scores["sequential"].append(_one_by_one(model, batch, masked, methods, bar))
            nats = {name: -torch.cat(s).double().cpu() / count for name, s in scores.items()}
            for name, values in nats.items():
                if not values.isfinite().all():
                    bad = numbers[int((~values.isfinite()).long().argmax())]
                    raise ValueError(
                        f"`examples` must have finite likelihoods, but number {bad} (from 0) has "
                        f"none under {name!r} at the mask ratio {ratio:g}: leave it out."
                    )
            rows.append(GapRow.of(ratio, {n: mean(values) for n, values in nats.items()}, heads))
    return rows


@dataclass
class _Windows:
    """A window in each row of a batch; `rank` is the order in which its tokens are masked."""

    canvas: CanvasBatch
    columns: torch.Tensor  # [n, L]
    rank: torch.Tensor  # [n, L]

    def __post_init__(self) -> None:
        self.truth = self.canvas.input_ids.gather(1, self.columns)

    def laws(
        self, model: CoDDModel, masked: torch.Tensor, methods: Mapping[str, Method]
    ) -> dict[str, CoupledCategorical]:
        """By method, the distribution over the window, where `masked [n, L]` and all after it hide.

        One pass of the backbone.
        """
        canvas, columns = self.canvas, self.columns
        position = torch.arange(canvas.input_ids.shape[1], device=columns.device)
        later = (position > columns[:, -1:]) & (position < canvas.answer_end[:, None])
        hidden = later.scatter(1, columns, masked)
        ids = canvas.input_ids.masked_fill(hidden, model.config.mask_token_id)
        states = model.backbone_states(ids, canvas.attention_mask)
        return {
            name: model.window_distribution(
                states, ids, columns[:, 0], canvas.attention_mask, temperature=by, head=head
            )
            for name, (head, by) in methods.items()
        }


def _windows(
    model: CoDDModel,
    examples: Sequence[TokenizedExample],
    tokenizer: PreTrainedTokenizerBase,
    settings: GapSettings,
) -> list[_Windows]:
    """One random window of text (no end-of-text) of each example."""
    length, device = model.window_length, model.device
    generator = torch.Generator().manual_seed(settings.seed)
    whole = torch.tensor([(len(e.answer_ids) - 1) // length for e in examples])
    first = (torch.rand(len(examples), generator=generator) * whole).long() * length
    ranks = torch.rand(len(examples), length, generator=generator).argsort(1).argsort(1)
    batches = []
    for start in range(0, len(examples), settings.batch_size):
        rows = slice(start, start + settings.batch_size)
        canvas = collate(
            examples[rows],
            window_length=length,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=padding_token_id(tokenizer),
        )
        columns = (canvas.answer_start + first[rows])[:, None] + torch.arange(length)
        batches.append(_Windows(canvas.to(device), columns.to(device), ranks[rows].to(device)))
    return batches


def _one_by_one(
    model: CoDDModel,
    batch: _Windows,
    masked: torch.Tensor,
    methods: Mapping[str, Method],
    bar: tqdm,
) -> torch.Tensor:
    """Log-likelihood `[n]` of the masked tokens when each is revealed before the next, in order."""
    masked, total = masked.clone(), 0.0
    while masked.any():  # the rows have equally many
        first = torch.zeros_like(masked).scatter(1, masked.long().argmax(1, keepdim=True), True)
        laws = batch.laws(model, masked, {"factorized": methods["factorized"]})
        total = total + laws["factorized"].partial_log_prob(batch.truth, first)
        masked &= ~first
        bar.update()
    return total


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
    stage1 = settings.stage1 or Path(settings.model or default_model(), "stage1")
    if settings.stage1 or stage1.is_dir():
        for name, alpha in (("raw product", 0.0), ("corrected", 1.0)):
            heads[name] = CoDDHead.from_pretrained(stage1)
            heads[name].set_alpha(alpha)
    for entry in settings.head:
        name, _, path = entry.partition("=")
        heads[name] = CoDDHead.from_pretrained(path)
    heads["fitted"] = fitted = model.coupling_head
    for head in heads.values():
        head.to(model.device)
        if settings.evidence_size is not None:
            head.config.evidence_size = settings.evidence_size
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
        settings,
    )
    facts = {
        "examples": len(examples),
        "evidence_temperature": settings.evidence_temperature or fitted.config.evidence_temperature,
        "evidence_size": fitted.evidence_size,
        "seed": settings.seed,
    }
    return Report(gap_table(rows), facts, {"rows": [row.as_dict() for row in rows]})
