"""What the frozen backbone says of noised windows: computed once, read at every step of the fit.

The backbone is by far the dearest part of a step and does not change, so it runs over the data a
few times, each with other noise. Kept of a window are its tokens, which of them were hidden, the
hidden states that predicted them, and of each masked position the `k` likeliest tokens with the log
of the remaining mass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..circuits import CoupledCategorical, DenseEvidence, Preceding, TopKEvidence
from ..modeling_codd import CoDDModel
from ..modeling_head import CoDDHead, forbidden_tokens
from .data import CanvasBatch, TokenizedExample, batch_indices, collate
from .noise import Noise, sample_noise

DENSE_VOCABULARY = 16384
"""Up to this many tokens evidence is laid out in full: one product is faster than many gathers."""


@dataclass
class WindowCache:
    """`N` noised windows of length `L`, with `M` masked positions in all.

    Attributes:
        tokens: `[N, L]` int32, the true tokens.
        masked: `[N, L]` bool, the positions that were hidden from the backbone.
        level: `[N]`, the probability with which they were.
        hidden: `[N, L, d]` bfloat16, the hidden states that predict the window's tokens; None for
            a head without conditioning.
        preceding_tokens: `[N, C]` int32, the visible tokens before the window, -1 where there is
            none; None for a head without "copy" conditioning.
        preceding_hidden: `[N, C, d]` bfloat16, the hidden states that predict them.
        indices: `[M, k]` int32, likeliest tokens of the masked positions, window by window.
        log_probs: `[M, k]` half precision, their log-probabilities.
        log_rest: `[M]`, log of the remaining mass.
        temperature: the evidence temperature of the predictions.
    """

    tokens: torch.Tensor
    masked: torch.Tensor
    level: torch.Tensor
    hidden: torch.Tensor | None
    preceding_tokens: torch.Tensor | None
    preceding_hidden: torch.Tensor | None
    indices: torch.Tensor
    log_probs: torch.Tensor
    log_rest: torch.Tensor
    temperature: float = 1.0

    def __post_init__(self):
        counts = self.masked.sum(1)
        self.first = counts.cumsum(0) - counts

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def size(self) -> int:
        """Bytes held."""
        held = (getattr(self, f.name) for f in fields(self))
        return sum(t.nbytes for t in held if isinstance(t, torch.Tensor))

    def distribution(self, head: CoDDHead, rows: torch.Tensor) -> CoupledCategorical:
        """The coupled distributions of some windows `rows [B]`, on the head's device."""
        device = head.device
        masked = self.masked[rows]
        window, column = masked.nonzero(as_tuple=True)
        order = masked.cumsum(1) - 1  # the how-manieth masked position of its window
        at = self.first[rows][window] + order[window, column]
        shape = (*masked.shape, self.indices.shape[1])
        indices = torch.zeros(shape, dtype=torch.long)
        log_probs = torch.zeros(shape)
        log_rest = torch.full(masked.shape, -torch.inf)
        # Half precision costs a prediction its normalisation.
        kept = torch.cat((self.log_probs[at], self.log_rest[at, None]), -1).float().log_softmax(-1)
        indices[window, column] = self.indices[at].long()
        log_probs[window, column] = kept[:, :-1]
        log_rest[window, column] = kept[:, -1]
        evidence = TopKEvidence(
            indices.to(device), log_probs.to(device), log_rest.to(device), self.temperature
        )
        if head.config.vocab_size <= DENSE_VOCABULARY:
            dense = evidence.spread_by(head.log_spread).dense()
            evidence = DenseEvidence(dense, self.temperature)
        hidden = None if self.hidden is None else self.hidden[rows].to(device)
        preceding = None
        if self.preceding_tokens is not None:
            before = self.preceding_tokens[rows].long().to(device)
            preceding = Preceding(
                before.clamp(min=0), before >= 0, self.preceding_hidden[rows].to(device)
            )
        return head(
            evidence,
            tokens=self.tokens[rows].long().to(device),
            observed=~masked.to(device),
            last_hidden_state=hidden,
            temperature=self.temperature,
            preceding=preceding,
        )


def draw_windows(
    examples: Sequence[TokenizedExample],
    tokenizer: PreTrainedTokenizerBase,
    window_length: int,
    max_extra_windows: int,
    generator: torch.Generator,
) -> tuple[CanvasBatch, Noise, torch.Tensor]:
    """Canvases with one noised window a row, earlier ones visible and later ones masked.

    Returns:
        canvases, noise, and `[batch]` the start of each row's window.
    """
    extra = torch.randint(max_extra_windows + 1, (len(examples),), generator=generator)
    canvas = collate(
        examples,
        window_length=window_length,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        extra_windows=extra.tolist(),
    )
    noise = sample_noise(
        canvas, window_length=window_length, generator=generator, window_probability=1.0
    )
    return canvas, noise, noise.span.long().argmax(1)


@torch.no_grad()
def cache_windows(
    model: CoDDModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[TokenizedExample],
    *,
    num_draws: int = 1,
    max_extra_windows: int = 1,
    top_k: int = 512,
    temperature: float = 1.0,
    tokens_per_batch: int = 8192,
    mixed_precision: str = "no",
    seed: int = 0,
    progress: bool = True,
) -> WindowCache:
    """Runs the backbone over noised examples, one window of each a draw.

    Args:
        model: the backbone; hidden states are kept if its head is conditioned.
        tokenizer: its tokenizer.
        examples: the examples.
        num_draws: how often each example is drawn, every time with another window and other noise.
        max_extra_windows: canvases end with up to this many windows of end-of-text.
        top_k: tokens kept of a prediction; all of them if the vocabulary has no more.
        temperature: the evidence temperature.
        tokens_per_batch: tokens that the backbone reads at once.
        mixed_precision: `"no"` or `"bf16"`, for the backbone.
        seed: of windows and noise.
        progress: show a progress bar.
    """
    device, config = model.device, model.config
    length, vocab_size = model.window_length, config.vocab_size
    maps = None if model.coupling_head is None else model.coupling_head.context_maps
    copies = maps is not None and maps.copies
    forbidden = forbidden_tokens(
        vocab_size, config.mask_token_id, config.forbidden_token_ids, device
    )
    lengths = [len(e.prompt_ids) + -(-len(e.answer_ids) // length) * length for e in examples]
    offsets = torch.arange(length)
    parts: list[tuple[torch.Tensor | None, ...]] = []
    bar = tqdm(
        total=num_draws * len(examples),
        desc="running the backbone",
        unit="window",
        disable=not progress,
    )
    for draw in range(num_draws):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + draw)
        seen = 0
        for batch in batch_indices(lengths, tokens_per_batch, seed + draw):
            canvas, noise, starts = draw_windows(
                [examples[i] for i in batch], tokenizer, length, max_extra_windows, generator
            )
            ids = canvas.input_ids.masked_fill(noise.masked, config.mask_token_id)
            with torch.autocast(device.type, torch.bfloat16, mixed_precision == "bf16"):
                states = model.backbone_states(ids.to(device), canvas.attention_mask.to(device))
                rows, columns = torch.arange(len(ids))[:, None], starts[:, None] + offsets
                masked = noise.masked[rows, columns]
                window, column = masked.nonzero(as_tuple=True)
                logits = states.logits((window.to(device), columns[window, column].to(device)))
            kept = TopKEvidence.from_logits(logits, min(top_k, vocab_size), temperature, forbidden)
            hidden = before = before_hidden = None
            if maps is not None:
                hidden = _kept(states.last_hidden_state[rows.to(device), columns.to(device)])
            if copies:
                preceding = model.preceding(
                    states, ids.to(device), starts.to(device), canvas.attention_mask.to(device)
                )
                before = preceding.tokens.masked_fill(~preceding.present, -1).int().cpu()
                before_hidden = _kept(preceding.hidden)
            parts.append(
                (
                    canvas.input_ids[rows, columns].int(),
                    masked,
                    noise.level,
                    hidden,
                    before,
                    before_hidden,
                    kept.indices.int().cpu(),
                    kept.log_probs.half().cpu(),
                    kept.log_rest.half().cpu(),
                )
            )
            bar.update(len(batch))
            seen += len(batch)
            if seen >= len(examples):
                break
    bar.close()
    columns = zip(*parts, strict=True)
    return WindowCache(
        *(None if column[0] is None else torch.cat(column) for column in columns), temperature
    )


def _kept(hidden: torch.Tensor) -> torch.Tensor:
    return hidden.to("cpu", torch.bfloat16)
