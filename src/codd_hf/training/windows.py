"""Windows of text under noise: with the backbone at hand, or with its predictions about them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from ..circuits import DenseEvidence, ListedEvidence, Preceding
from ..circuits.factorized import forbidden_tokens
from ..data.canvases import TokenizedExample
from ..data.noise import draw_canvases
from ..modeling_codd import CoDDModel
from ..modeling_head import CoDDHead
from ..runtime.precision import autocast
from .loop import summed
from .settings import CoupledConfig

DENSE_VOCABULARY = 16384
"""Up to this many tokens evidence is laid out in full: one product is faster than many gathers."""
LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Bounds of the noise levels that gains are told for."""
ROWS_AT_ONCE = 32


class WindowScores(NamedTuple):
    """Likelihoods of the masked tokens of noised windows, `[N]` each."""

    level: torch.Tensor  # the probability with which tokens were masked
    masked: torch.Tensor  # how many were
    gain: torch.Tensor  # nats that the circuit adds: log p_w(x) - log Z
    factorized: torch.Tensor  # nats without the circuit; zero where the backbone is not at hand

    @property
    def log_prob(self) -> torch.Tensor:
        """Nats of the masked tokens."""
        return self.factorized + self.gain

    def gains(self) -> dict[str, float]:
        """Mean gain in nats per masked token, of all windows and of each range of levels."""
        result = {"gain": (self.gain.sum() / self.masked.sum()).item()}
        for low, high in itertools.pairwise(LEVELS):
            inside = (self.level >= low) & ((self.level < high) | (high == LEVELS[-1]))
            count = self.masked[inside].sum().clamp(min=1)
            result[f"gain_{low:.2f}-{high:.2f}"] = (self.gain[inside].sum() / count).item()
        return result

    def summary(self) -> dict[str, float]:
        """Nats per masked token, factorized and coupled; their difference, all and by level."""
        total = self.masked.sum()
        nats = {
            "factorized_nats": -(self.factorized.sum() / total).item(),
            "coupled_nats": -(self.log_prob.sum() / total).item(),
        }
        return nats | self.gains()


@dataclass
class NoisedWindows:
    """`N` noised windows of length `L`, with `M` masked positions in all, and what is predicted.

    Attributes:
        columns: `tokens [N, L]` (int32, the true ones), `masked [N, L]` (those that were hidden
            from the backbone), `level [N]` (the probability with which they were); of the masked
            positions, window by window, the likeliest tokens `indices [M, k]` (int32), their
            `log_probs [M, k]` (float16, off by at most 1/2048 of themselves) and `log_rest [M]`,
            the log of the remaining mass; for a head with conditioning `hidden [N, L, d]`
            (bfloat16), and for "copy" the `preceding_tokens [N, C]` (int32, -1 where there is none)
            and `preceding_hidden [N, C, d]`.
    """

    columns: dict[str, torch.Tensor]

    def __len__(self) -> int:
        return len(self.columns["level"])

    @cached_property
    def offsets(self) -> torch.Tensor:
        """`[N + 1]`, where each window's masked positions begin and end among all `M`."""
        sizes = self.columns["masked"].sum(1)
        return torch.cat((torch.zeros(1, dtype=torch.long), sizes.cumsum(0)))

    def take(self, rows: torch.Tensor) -> NoisedWindows:
        """Some windows, `rows [B]`, in that order."""
        ends = zip(self.offsets[rows].tolist(), self.offsets[rows + 1].tolist(), strict=True)
        places = torch.cat([torch.arange(*pair) for pair in ends])
        by_place = ("indices", "log_probs", "log_rest")
        return NoisedWindows(
            {name: t[places if name in by_place else rows] for name, t in self.columns.items()}
        )

    @classmethod
    def joined(cls, parts: Sequence[NoisedWindows]) -> NoisedWindows:
        """All windows of some parts, in order."""
        names = parts[0].columns
        return cls({name: torch.cat([part.columns[name] for part in parts]) for name in names})

    def scores(self, head: CoDDHead) -> WindowScores:
        """The gains of a head, whose temperature is that of the predictions."""
        held, device, preceding = self.columns, head.device, None
        temperature = head.config.evidence_temperature
        masked, truth = held["masked"], held["tokens"].long().to(device)

        def laid_out(values: torch.Tensor, fill: float) -> torch.Tensor:
            out = values.new_full((*masked.shape, *values.shape[1:]), fill)
            out[masked] = values
            return out.to(device)

        # Half precision costs a prediction its normalisation.
        kept = torch.cat((held["log_probs"], held["log_rest"][:, None]), -1).float().log_softmax(-1)
        log_probs, log_rest = laid_out(kept[:, :-1], 0), laid_out(kept[:, -1:], -torch.inf)
        indices = laid_out(held["indices"].long(), 0)
        listed = ListedEvidence(indices, log_probs, log_rest, temperature)
        evidence: ListedEvidence | DenseEvidence = listed
        if (head.config.vocab_size or 0) <= DENSE_VOCABULARY:
            evidence = listed.laid_out(head.log_spread)
        if "preceding_tokens" in held:
            before = held["preceding_tokens"].long().to(device)
            states = held["preceding_hidden"].to(device)
            preceding = Preceding(before.clamp(min=0), before >= 0, states)
        distribution = head(
            evidence,
            tokens=truth,
            observed=~masked.to(device),
            last_hidden_state=held["hidden"].to(device) if "hidden" in held else None,
            temperature=temperature,
            preceding=preceding,
        )
        gain, count = distribution.coupling_gain(truth), distribution.masked.sum(1)
        return WindowScores(held["level"].to(device), count, gain, torch.zeros_like(gain))


class NoisedCanvases:
    """Canvases with one noised window a row, as a function of the examples and the seed alone.

    Attributes:
        truth, masked, level, columns: of the windows, `[B, L]`, on the CPU.
        ids, mask, starts: the noised canvases `[B, T]`, on the model's device.
    """

    def __init__(
        self,
        model: CoDDModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[TokenizedExample],
        config: CoupledConfig,
        seed: int,
    ):
        length, generator = model.window_length, torch.Generator().manual_seed(seed)
        layout = examples, tokenizer, length, config.max_extra_windows, generator
        spans = config.mean_span_length
        canvas, noise = draw_canvases(*layout, window_probability=1.0, mean_span_length=spans)
        starts = noise.span.long().argmax(1)
        self.columns = starts[:, None] + torch.arange(length)
        self.truth = canvas.input_ids.gather(1, self.columns)
        self.masked, self.level = noise.masked.gather(1, self.columns), noise.level
        ids = canvas.input_ids.masked_fill(noise.masked, model.mask_token_id)
        self.ids, self.mask = ids.to(model.device), canvas.attention_mask.to(model.device)
        self.model, self.starts = model, starts.to(model.device)
        self.autocast = autocast(config.mixed_precision, model.device)

    def scores(self) -> WindowScores:
        """The model's likelihoods of the masked tokens."""
        with self.autocast:
            states = self.model.backbone_states(self.ids, self.mask)
            distribution = self.model.window_distribution(states, self.ids, self.starts, self.mask)
        truth, masked = self.truth.to(self.ids.device), distribution.masked
        token = distribution.factorized_logits.gather(-1, truth[..., None])[..., 0]
        factorized, gain = token.masked_fill(~masked, 0).sum(1), distribution.coupling_gain(truth)
        return WindowScores(self.level.to(truth.device), masked.sum(1), gain, factorized)

    @torch.no_grad()
    def predictions(self, size: int) -> NoisedWindows:
        """The backbone's `size` likeliest tokens; hidden states if the head is conditioned."""
        model, config, device = self.model, self.model.config, self.ids.device
        head = model.coupling_head
        assert head is not None
        maps, temperature = head.context_maps, head.config.evidence_temperature
        window, place = self.masked.nonzero(as_tuple=True)
        with self.autocast:
            states = model.backbone_states(self.ids, self.mask)
            logits = states.logits((window.to(device), self.columns[window, place].to(device)))
        never = (config.vocab_size, model.mask_token_id, config.forbidden_token_ids, device)
        kept = ListedEvidence.from_logits(logits, size, temperature, forbidden_tokens(*never))
        columns = {
            "tokens": self.truth.int(),
            "masked": self.masked,
            "level": self.level,
            "indices": kept.indices.int(),
            "log_probs": kept.log_probs.half(),
            "log_rest": kept.log_rest[..., 0].half(),
        }
        if maps is not None:
            rows = torch.arange(len(self.truth), device=device)[:, None]
            columns["hidden"] = states.last_hidden_state[rows, self.columns.to(device)].bfloat16()
        if maps is not None and maps.copies:
            before = model.preceding(states, self.ids, self.starts, self.mask)
            columns["preceding_tokens"] = before.tokens.masked_fill(~before.present, -1).int()
            columns["preceding_hidden"] = before.hidden.bfloat16()
        return NoisedWindows({name: column.cpu() for name, column in columns.items()})


def window_scores(
    model: CoDDModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[TokenizedExample],
    config: CoupledConfig,
    num_draws: int = 4,
    seed: int = 1234,
) -> WindowScores:
    """Scores one noised window of each example a draw, `[num_draws * len(examples)]`.

    Windows and noise do not depend on the model, which is in evaluation mode afterwards.
    """
    model.eval()
    lengths = torch.tensor([example.length() for example in examples])
    order = lengths.argsort(stable=True).split(ROWS_AT_ONCE)
    chunks = [part + draw * len(examples) for draw in range(num_draws) for part in order]

    def score(number: int, rows: torch.Tensor) -> WindowScores:
        part = [examples[row % len(examples)] for row in rows.tolist()]
        return NoisedCanvases(model, tokenizer, part, config, seed * 100_003 + number).scores()

    return score_all(chunks, score)


@torch.no_grad()
def score_all(
    chunks: Sequence[torch.Tensor], score: Callable[[int, torch.Tensor], WindowScores]
) -> WindowScores:
    """Scores of all windows, whose rows the processes share in chunks; all get the result."""
    total = sum(map(len, chunks))

    def placed(number: int, rows: torch.Tensor) -> list[torch.Tensor]:
        table = torch.zeros(4, total)
        table[:, rows] = torch.stack([column.float().cpu() for column in score(number, rows)])
        return [table]

    (table,) = summed([torch.Size((4, total))], chunks, placed)
    return WindowScores(*table.cpu())
