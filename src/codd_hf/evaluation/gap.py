"""The misspecification gap: the loss of one parallel step, and the part that a circuit wins back.

Windows of held-out answers are masked at some ratios, as block decoding meets them: earlier windows
visible, later ones fully masked. Per ratio, nats per masked token of

- the factorized backbone, in one step;
- the backbone coupled with each head, in one step;
- the backbone revealing the true tokens one at a time, left to right ("sequential").

Gap closed is `(factorized - coupled) / (factorized - sequential)` (arXiv 2603.00045, Fig. 1-2).
"""

from collections.abc import Iterator, Mapping, Sequence
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
    tokenize_examples,
)
from ..data.sources import Example, RowReport
from ..hub.repositories import default_model
from ..modeling_codd import CoDDModel
from ..modeling_head import CoDDHead
from ..pipelines.pipeline_codd import CoDDPipeline
from ..runtime.report import Report
from . import FACTORIZED, GapSettings
from .statistics import mean

SMALLEST_GAP = 0.05
"""Gap closed is left out where the gap is smaller than this, in nats."""

TEMPERED = "factorized, tempered"
"""The backbone at the evidence temperature, without a circuit: the effect of it alone."""
SEQUENTIAL = "sequential"


def measure(pipeline: CoDDPipeline, examples: Sequence[Example], settings: GapSettings) -> Report:
    """`codd-hf evaluate gap`: the raw and the corrected circuit, other heads, and the model's."""
    model, fitted, heads = pipeline.model, pipeline.model.coupling_head, {}
    assert fitted is not None
    circuit = Path(settings.model or default_model(), "generative")
    for name, alpha in (("raw product", 0.0), ("corrected", 1.0)) if circuit.is_dir() else ():
        heads[name] = CoDDHead.from_pretrained(circuit)
        heads[name].set_alpha(alpha)
    for entry in settings.head:
        name, _, path = entry.partition("=")
        heads[name] = CoDDHead.from_pretrained(path)
    heads["fitted"] = fitted
    for head in heads.values():
        head.to(model.device)
        if settings.evidence_size is not None:
            head.config.evidence_size = settings.evidence_size
    tokenized = tokenize_examples(
        examples,
        pipeline.tokenizer,
        never={model.mask_token_id, *(model.config.forbidden_token_ids or ())},
        report=RowReport(repr(settings.dataset), settings.skip_bad_rows),
    )
    facts = {
        "examples": len(examples),
        "evidence_temperature": settings.evidence_temperature or fitted.config.evidence_temperature,
        "evidence_size": fitted.evidence_size,
        "seed": settings.seed,
    }
    rows = measure_gap(model, heads, pipeline.tokenizer, tokenized, settings)
    return Report(facts, {"rows": rows})


@torch.no_grad()
def measure_gap(
    model: CoDDModel,
    heads: Mapping[str, CoDDHead],
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[TokenizedExample],
    settings: GapSettings,
) -> list[dict[str, Any]]:
    """Measures the gap on one random window of each example, in which end-of-text follows the text.

    The backbone is coupled with each of the heads in turn, not with its own.

    Returns:
        A row for each ratio: the nats of each method, each head's gain over `factorized` and, where
        the gap exceeds `SMALLEST_GAP`, the share of it that the head closes, in percent.
    """
    length = model.window_length
    bare = CallHead("", None, length)
    alone = {FACTORIZED: (bare, 1.0)}
    methods = dict(alone)
    for name, head in heads.items():
        model.bind_head(head)
        temperature = settings.evidence_temperature or head.config.evidence_temperature
        if temperature != 1:
            methods[TEMPERED] = (bare, temperature)
        methods[name] = (CallHead("", head, length).frozen(), temperature)
    batches, rows = list(_windows(model, examples, tokenizer, settings)), []
    for ratio in tqdm(settings.ratios, "measuring the gap", unit="ratio", disable=None):
        count = max(round(ratio * length), 1)
        scores: dict[str, list[torch.Tensor]] = {}
        for canvas, columns, order in batches:
            truth, masked = canvas.input_ids.gather(1, columns), order < count
            by_method = _distributions(model, canvas, columns, masked, methods)
            for name, distribution in by_method.items():
                scores.setdefault(name, []).append(distribution.log_prob(truth))
            if settings.sequential:
                total = torch.zeros(len(truth), device=truth.device)
                while masked.any():  # the rows have equally many
                    next_one = masked.long().argmax(1, keepdim=True)
                    first = torch.zeros_like(masked).scatter(1, next_one, True)
                    (step,) = _distributions(model, canvas, columns, masked, alone).values()
                    total, masked = total + step.partial_log_prob(truth, first), masked & ~first
                scores.setdefault(SEQUENTIAL, []).append(total)
        nats = {name: mean(-torch.cat(s).double().cpu() / count) for name, s in scores.items()}
        gains = {name: nats[FACTORIZED] - nats[name] for name in heads}
        row = {
            "mask ratio": ratio,
            **nats,
            **{f"gain, {name}": gain for name, gain in gains.items()},
        }
        if SEQUENTIAL in nats:
            gap = (nats[FACTORIZED] - nats[SEQUENTIAL]).value
            for name, gain in gains.items():
                closed = 100 * gain.value / gap if gap > SMALLEST_GAP else None
                row[f"gap closed, {name}, %"] = closed
        rows.append(row)
    return rows


def _distributions(
    model: CoDDModel,
    canvas: CanvasBatch,
    columns: torch.Tensor,
    masked: torch.Tensor,
    methods: Mapping[str, tuple[CallHead, float]],
) -> dict[str, CoupledCategorical]:
    """By method, the distribution over the window, where `masked [n, L]` and all after it hide."""
    position = torch.arange(canvas.input_ids.shape[1], device=columns.device)
    later = (position > columns[:, -1:]) & (position < canvas.answer_end[:, None])
    hidden = later.scatter(1, columns, masked)
    ids = canvas.input_ids.masked_fill(hidden, model.mask_token_id)
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
) -> Iterator[tuple[CanvasBatch, torch.Tensor, torch.Tensor]]:
    """One random window of each example, as decoding meets it, in batches.

    Canvases, columns `[n, L]` of the windows, and the order `[n, L]` in which they are masked.
    """
    length, device = model.window_length, model.device
    generator = torch.Generator().manual_seed(settings.seed)
    whole = torch.tensor([-(-len(e.answer_ids) // length) for e in examples])
    first = (torch.rand(len(examples), generator=generator) * whole).long() * length
    order = torch.rand(len(examples), length, generator=generator).argsort(1).argsort(1)
    for start in range(0, len(examples), settings.batch_size):
        rows = slice(start, start + settings.batch_size)
        canvas = collate(examples[rows], tokenizer, length)
        columns = (canvas.answer_start + first[rows])[:, None] + torch.arange(length)
        yield canvas.to(device), columns.to(device), order[rows].to(device)
