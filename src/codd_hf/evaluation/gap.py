"""The misspecification gap: the loss of one parallel step, and the part that a circuit wins back.

Windows of held-out answers (of block-causal backbones, blocks) are masked at some ratios, as block
decoding meets them: earlier ones visible, later ones fully masked. Per ratio, nats per masked
token of

- the factorized backbone, in one step;
- the backbone coupled with each head, in one step;
- the backbone revealing the true tokens one at a time, left to right ("sequential").

Of uniform noise, which is not told from text, the ratio is the share of random tokens, and all
tokens of a window are predicted, and revealed.

Gap closed is `(factorized - coupled) / (factorized - sequential)` (arXiv 2603.00045, Fig. 1-2).
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..backbones import block_length_of, noise_of
from ..circuits import CoupledCategorical
from ..coupling.heads import CallHead
from ..coupling.windows import stretch_at
from ..data.canvases import TokenizedExample, collate, tokenize_examples
from ..data.sources import Example, RowReport
from ..hub.repositories import default_model
from ..modeling_codd import CoDDModel
from ..modeling_head import CoDDHead
from ..pipelines.pipeline_codd import CoDDPipeline
from ..runtime.report import Report
from ..schedulers.scheduling_codd import uniform_tokens
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
        never={model.config.mask_token_id, *(model.config.forbidden_token_ids or ())},
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
        scores: dict[str, list[torch.Tensor]] = {}
        for window in batches:
            count = (ratio * window.size).round().clamp(min=1)
            truth, masked = window.truth, window.order < count[:, None]
            left = masked
            if window.predicted is not None:
                count, left = window.size, window.order < window.size[:, None]
            for name, distribution in window.distributions(model, masked, methods).items():
                scores.setdefault(name, []).append(distribution.log_prob(truth).double() / count)
            if settings.sequential:
                total = torch.zeros(len(truth), device=truth.device)
                while left.any():
                    next_one = left.long().argmax(1, keepdim=True)
                    first = torch.zeros_like(left).scatter(1, next_one, True) & left
                    (step,) = window.distributions(model, masked, alone).values()
                    total += step.partial_log_prob(truth, first)
                    masked, left = masked & ~first, left & ~first
                scores.setdefault(SEQUENTIAL, []).append(total.double() / count)
        nats = {name: mean(-torch.cat(s).cpu()) for name, s in scores.items()}
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


class _Windows(NamedTuple):
    """A batch of windows.

    Attributes:
        ids: `[n, T]`, the tokens of the canvases, noise from where nothing is known.
        seen: `[n, T]`, the attention mask: no padding, nothing that decoding does not see.
        start: `[n]`, where the windows begin.
        truth: `[n, L]`, their tokens.
        order: `[n, L]`, the order in which they are masked; never, if `size` or more.
        size: `[n]`, how many are.
        noise: `[n, L]`, mask tokens or random ones.
        predicted: `[n, T]` bool, where uniform noise may be; None of masks.
    """

    ids: torch.Tensor
    seen: torch.Tensor
    start: torch.Tensor
    truth: torch.Tensor
    order: torch.Tensor
    size: torch.Tensor
    noise: torch.Tensor
    predicted: torch.Tensor | None

    def distributions(
        self, model: CoDDModel, masked: torch.Tensor, methods: Mapping[str, tuple[CallHead, float]]
    ) -> dict[str, CoupledCategorical]:
        """By method, the distribution over the windows, of which `masked [n, L]` is hidden."""
        columns = self.start[:, None] + torch.arange(masked.shape[1], device=masked.device)
        known = F.pad(self.ids, (0, masked.shape[1])).scatter(
            1, columns, torch.where(masked, self.noise, self.truth)
        )
        ids = known[:, : self.ids.shape[1]]
        where = model.backbone_states(ids, self.seen), ids, self.start, self.seen
        return {
            name: model.window_distribution(
                *where, temperature=by, head=head, predicted=self.predicted
            )
            for name, (head, by) in methods.items()
        }


def _windows(
    model: CoDDModel,
    examples: Sequence[TokenizedExample],
    tokenizer: PreTrainedTokenizerBase,
    settings: GapSettings,
) -> Iterator[_Windows]:
    """One random window of each example, as decoding meets it, in batches."""
    length, device, config = model.window_length, model.device, model.config.text_config
    generator = torch.Generator().manual_seed(settings.seed)
    whole = torch.tensor([-(-len(e.answer_ids) // length) for e in examples])
    unit = length if block_length_of(config) is None else 1
    first = (torch.rand(len(examples), generator=generator) * whole * (length // unit)).long()
    draws = torch.rand(len(examples), length, generator=generator)
    for at in range(0, len(examples), settings.batch_size):
        rows = slice(at, at + settings.batch_size)
        canvas = collate(examples[rows], tokenizer, length)
        start, end = canvas.answer_start, canvas.answer_end
        found = stretch_at(start + first[rows] * unit, start, end, length, config)
        place = found.window[:, None] + torch.arange(length)
        inside = (place >= found.begin[:, None]) & (place < found.stop[:, None])
        order = draws[rows].masked_fill(~inside, 2).argsort(1).argsort(1)
        position = torch.arange(canvas.input_ids.shape[1])
        later = (position >= found.stop[:, None]) & (position < end[:, None])
        seen = canvas.attention_mask * (position < found.end[:, None])
        padded, predicted = F.pad(canvas.input_ids, (0, length)), None
        if noise_of(config) == "uniform":
            noise = uniform_tokens(padded.shape, model.config.vocab_size, generator)
            predicted = (position >= found.begin[:, None]).to(device)
        else:
            noise = torch.full_like(padded, model.mask_token_id)
        ids = torch.where(later, noise[:, : len(position)], canvas.input_ids)
        truth, noise = padded.gather(1, place), noise.gather(1, place)
        parts = ids, seen, found.window, truth, order, inside.sum(1), noise
        yield _Windows._make([*(part.to(device) for part in parts), predicted])
