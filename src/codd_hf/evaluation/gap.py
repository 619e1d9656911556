"""The misspecification gap: what one parallel step loses, and how much of it a circuit wins back.

Windows of held-out answers are masked at given ratios, as block decoding meets them: earlier
windows visible, later ones fully masked. Per ratio, nats per masked token of

- the factorized backbone, in one step;
- the backbone coupled with each head, in one step;
- the backbone revealing the true tokens one at a time, left to right ("sequential").

Gap closed is `(factorized - coupled) / (factorized - sequential)` (arXiv 2603.00045, Fig. 1-2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..circuits.factorized import without_tokens
from ..coupling.heads import CallHead
from ..data.canvases import CanvasBatch, TokenizedExample, collate, padding_token_id
from ..modeling_codd import CoDDModel
from ..modeling_head import CoDDHead

RATIOS = tuple(i / 10 for i in range(1, 11))
SMALLEST_GAP = 0.05
"""Gap closed is not given where the gap is smaller than this, in nats."""

TEMPERED = "factorized, tempered"
"""The backbone at the evidence temperature, without a circuit: what the temperature alone does."""


@dataclass
class GapRow:
    """One mask ratio: nats per masked token and standard errors, by method.

    Attributes:
        ratio: share of the window that is masked.
        nats: mean per method; the methods are `factorized`, the heads' names and `sequential`, and
            `factorized, tempered` where there is an evidence temperature.
        standard_errors: of those means; None for a single example.
        gains: per head, mean of `factorized - head`.
        gain_errors: standard errors of these paired differences.
        gap_closed: per head, where the gap exceeds `SMALLEST_GAP`.
    """

    ratio: float
    nats: dict[str, float] = field(default_factory=dict)
    standard_errors: dict[str, float | None] = field(default_factory=dict)
    gains: dict[str, float] = field(default_factory=dict)
    gain_errors: dict[str, float | None] = field(default_factory=dict)
    gap_closed: dict[str, float | None] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))


@torch.no_grad()
def measure_gap(
    model: CoDDModel,
    heads: Mapping[str, CoDDHead],
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[TokenizedExample],
    *,
    ratios: Sequence[float] = RATIOS,
    sequential: bool = True,
    batch_size: int = 32,
    evidence_temperature: float = 1.0,
    seed: int = 0,
    progress: bool = True,
) -> list[GapRow]:
    """Measures the gap on one random full window of each example that has one.

    Args:
        model: the backbone (its own head is not used).
        heads: what to couple it with, by name.
        tokenizer: the backbone's.
        examples: held-out text.
        ratios: mask ratios in (0, 1].
        sequential: also run the sequential ideal, which takes a pass per masked token.
        batch_size: windows at once.
        evidence_temperature: divides the backbone's logits before the circuits see them; the
            factorized column is without, and one more shows what it does there.
        seed: chooses windows and masks.
        progress: show a progress bar.

    Raises:
        ValueError: no example has a full window, one has a token that the model never generates, a
            likelihood is not finite, or a ratio is outside (0, 1].
    """
    if bad := [r for r in ratios if not 0 < r <= 1]:
        raise ValueError(f"`ratios` must lie in (0, 1], got {bad}.")
    for head in heads.values():
        model.bind(head)
    length = model.window_length
    generator = torch.Generator().manual_seed(seed)
    canvas, starts, numbers = _full_windows(examples, tokenizer, length, generator)
    _check_tokens(model, examples, numbers)
    order = torch.rand(len(starts), length, generator=generator).argsort(1).argsort(1)
    batches = list(torch.arange(len(starts)).split(batch_size))
    counts = [max(round(r * length), 1) for r in ratios]
    passes = len(batches) * sum(1 + (c if sequential else 0) for c in counts)
    bar = tqdm(total=passes, desc="measuring the gap", unit="pass", disable=not progress)
    rows = []
    for ratio, count in zip(ratios, counts, strict=True):
        scores: dict[str, list[torch.Tensor]] = {}
        for batch in batches:
            masked = order[batch] < count
            part = _select(canvas, batch)
            one_step = _one_step(model, heads, part, starts[batch], masked, evidence_temperature)
            for name, value in one_step.items():
                scores.setdefault(name, []).append(value)
            bar.update()
            if sequential:
                value = _sequential(model, part, starts[batch], masked, bar)
                scores.setdefault("sequential", []).append(value)
        nats = {name: -torch.cat(values).double().cpu() / count for name, values in scores.items()}
        for name, values in nats.items():
            if not values.isfinite().all():
                bad = numbers[int((~values.isfinite()).long().argmax())]
                raise ValueError(
                    f"`examples` must have finite likelihoods, but number {bad} (from 0) has none "
                    f"under {name!r} at the mask ratio {ratio:g}: leave it out."
                )
        rows.append(_summary(ratio, nats, list(heads)))
    bar.close()
    return rows


def _full_windows(
    examples: Sequence[TokenizedExample],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    generator: torch.Generator,
) -> tuple[CanvasBatch, torch.Tensor, list[int]]:
    """Canvases `[N, T]`, the start `[N]` of one window of text (no end-of-text) in each, and which
    examples they are of.
    """
    counts = [len(e.answer_ids[:-1]) // length for e in examples]
    numbers = [i for i, count in enumerate(counts) if count > 0]
    chosen = [(examples[i], counts[i]) for i in numbers]
    if not chosen:
        raise ValueError(
            f"`examples` have no answer of at least {length} tokens (one full window)."
        )
    canvas = collate(
        [e for e, _ in chosen],
        window_length=length,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=padding_token_id(tokenizer),
    )
    draws = torch.rand(len(chosen), generator=generator)
    window = (draws * torch.tensor([n for _, n in chosen])).long()
    return canvas, canvas.answer_start + window * length, numbers


def _check_tokens(
    model: CoDDModel, examples: Sequence[TokenizedExample], numbers: Sequence[int]
) -> None:
    """Refuses text that the model can not have written.

    Raises:
        ValueError: an example holds such a token.
    """
    config = model.config
    never = {config.mask_token_id, *(config.forbidden_token_ids or [])}
    for i in numbers:
        if outside := never.intersection(examples[i].answer_ids):
            raise ValueError(
                f"`examples` must not hold tokens that the model never generates, got "
                f"{min(outside)} in the answer of number {i} (from 0)."
            )


def _select(canvas: CanvasBatch, rows: torch.Tensor) -> CanvasBatch:
    length = int(canvas.answer_end[rows].max())
    return CanvasBatch(
        canvas.input_ids[rows, :length],
        canvas.attention_mask[rows, :length],
        canvas.answer_start[rows],
        canvas.answer_end[rows],
    )


def _noised(model: CoDDModel, canvas: CanvasBatch, starts: torch.Tensor, masked: torch.Tensor):
    """Input ids with `masked [n, L]` of the window and everything after it hidden."""
    length = masked.shape[1]
    position = torch.arange(canvas.input_ids.shape[1])
    later = (position >= starts[:, None] + length) & (position < canvas.answer_end[:, None])
    rows, columns = masked.nonzero(as_tuple=True)
    hidden = later.index_put((rows, starts[rows] + columns), torch.tensor(True))
    device = model.device
    ids = canvas.input_ids.masked_fill(hidden, model.config.mask_token_id).to(device)
    return ids, canvas.attention_mask.to(device)


def _log_phi(model: CoDDModel, logits: torch.Tensor) -> torch.Tensor:
    """The backbone's log-probabilities over the tokens that may be generated."""
    config = model.config
    logits = without_tokens(logits.float(), config.mask_token_id, config.forbidden_token_ids)
    return logits.log_softmax(-1)


def _one_step(model, heads, canvas, starts, masked, temperature) -> dict[str, torch.Tensor]:
    """Log-likelihood `[n]` of the masked tokens under the factorized and the coupled models."""
    ids, attention_mask = _noised(model, canvas, starts, masked)
    states = model.backbone_states(ids, attention_mask)
    columns = (starts[:, None] + torch.arange(masked.shape[1])).to(ids.device)
    truth = canvas.input_ids.to(ids.device).gather(1, columns)
    rows = torch.arange(len(ids), device=ids.device)[:, None]
    logits = states.logits((rows, columns))
    observed = ~masked.to(ids.device)
    scores = {}
    for name, divisor in {"factorized": 1.0, TEMPERED: temperature}.items():
        if name == TEMPERED and temperature == 1:
            continue
        log_phi = _log_phi(model, logits / divisor).gather(-1, truth[..., None])[..., 0]
        scores[name] = log_phi.masked_fill(observed, 0).sum(1)
    for name, head in heads.items():
        distribution = model.window_distribution(
            states,
            ids,
            starts.to(ids.device),
            attention_mask,
            temperature=temperature,
            head=CallHead(None, head, masked.shape[1]),
        )
        scores[name] = distribution.log_prob(truth)
    return scores


def _sequential(model, canvas, starts, masked, bar) -> torch.Tensor:
    """Log-likelihood `[n]` of the masked tokens when each is revealed before the next, in order."""
    masked = masked.clone()
    total = torch.zeros(len(starts))
    rows = torch.arange(len(starts))
    while masked.any():
        ids, attention_mask = _noised(model, canvas, starts, masked)
        first = masked.long().argmax(1)
        columns = starts + first
        states = model.backbone_states(ids, attention_mask)
        logits = states.logits((rows.to(ids.device), columns.to(ids.device)))
        log_probs = _log_phi(model, logits).cpu()
        total += log_probs.gather(1, canvas.input_ids[rows, columns][:, None])[:, 0]
        masked[rows, first] = False
        bar.update()
    return total


def _summary(ratio: float, nats: dict[str, torch.Tensor], heads: list[str]) -> GapRow:
    row = GapRow(ratio)
    for name, values in nats.items():
        row.nats[name], row.standard_errors[name] = _mean_and_error(values)
    for name in heads:
        row.gains[name], row.gain_errors[name] = _mean_and_error(nats["factorized"] - nats[name])
        if "sequential" in nats:
            gap = row.nats["factorized"] - row.nats["sequential"]
            row.gap_closed[name] = row.gains[name] / gap if gap > SMALLEST_GAP else None
    return row


def _mean_and_error(values: torch.Tensor) -> tuple[float, float | None]:
    if len(values) == 1:
        return values.item(), None
    return values.mean().item(), values.std().item() / math.sqrt(len(values))


def gap_table(rows: Sequence[GapRow]) -> str:
    """The rows as a table in Markdown."""
    methods = list(rows[0].nats)
    closed_by = list(rows[0].gap_closed)
    heads = list(rows[0].gains)
    header = ["mask ratio", *methods, *(f"gain, {head}" for head in heads)]
    header += [f"gap closed, {head}" for head in closed_by]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for row in rows:
        cells = [f"{row.ratio:g}"]
        cells += [f"{row.nats[m]:.3f}{plus_minus(row.standard_errors[m])}" for m in methods]
        cells += [f"{row.gains[h]:+.3f}{plus_minus(row.gain_errors[h])}" for h in heads]
        closed = [row.gap_closed[head] for head in closed_by]
        cells += ["-" if share is None else f"{100 * share:.0f} %" for share in closed]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plus_minus(error: float | None) -> str:
    """A standard error after its mean; nothing where there is none."""
    return "" if error is None else f" ± {error:.3f}"
