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
from ..data.noise import draw_windows
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
    """`N` noised windows of length `L`, with `M` masked positions in all, and what is predicted."""

    tokens: torch.Tensor  # [N, L] int32, the true ones
    masked: torch.Tensor  # [N, L] bool, those that were hidden from the backbone
    level: torch.Tensor  # [N], the probability with which they were
    indices: torch.Tensor  # [M, k] int32, likeliest tokens of masked positions, window by window
    log_probs: torch.Tensor  # [M, k] float16, off by at most 1/2048 of themselves
    log_rest: torch.Tensor  # [M], log of the remaining mass
    hidden: torch.Tensor | None = None  # [N, L, d] bfloat16, for a head with conditioning
    preceding_tokens: torch.Tensor | None = None  # [N, C] int32, before the window; -1: none
    preceding_hidden: torch.Tensor | None = None  # [N, C, d], both for "copy" conditioning

    @property
    def columns(self) -> dict[str, torch.Tensor]:
        """The tensors that there are."""
        held = ((name, getattr(self, name)) for name in self.__dataclass_fields__)
        return {name: tensor for name, tensor in held if tensor is not None}

    @cached_property
    def offsets(self) -> torch.Tensor:
        """`[N + 1]`, where each window's masked positions begin and end among all `M`."""
        return torch.cat((torch.zeros(1, dtype=torch.long), self.masked.sum(1).cumsum(0)))

    def take(self, rows: torch.Tensor) -> NoisedWindows:
        """Some windows, `rows [B]`, in that order."""
        ends = zip(self.offsets[rows].tolist(), self.offsets[rows + 1].tolist(), strict=True)
        places = torch.cat([torch.arange(*pair) for pair in ends])
        by_place = ("indices", "log_probs", "log_rest")
        return NoisedWindows(
            **{name: t[places if name in by_place else rows] for name, t in self.columns.items()}
        )

    @classmethod
    def joined(cls, parts: Sequence[NoisedWindows]) -> NoisedWindows:
        """All windows of some parts, in order."""
        columns = [part.columns for part in parts]
        return cls(**{name: torch.cat([c[name] for c in columns]) for name in columns[0]})

    def scores(self, head: CoDDHead, temperature: float) -> WindowScores:
        """The gains of a head, at the temperature that the predictions were made at."""
        device = head.device

        def laid_out(values: torch.Tensor, fill: float) -> torch.Tensor:
            out = values.new_full((*self.masked.shape, *values.shape[1:]), fill)
            out[self.masked] = values
            return out.to(device)

        # Half precision costs a prediction its normalisation.
        kept = torch.cat((self.log_probs, self.log_rest[:, None]), -1).float().log_softmax(-1)
        log_probs, log_rest = laid_out(kept[:, :-1], 0), laid_out(kept[:, -1:], -torch.inf)
        indices = laid_out(self.indices.long(), 0)
        listed = ListedEvidence(indices, log_probs, log_rest, temperature)
        evidence: ListedEvidence | DenseEvidence = listed
        if (head.config.vocab_size or 0) <= DENSE_VOCABULARY:
            evidence = listed.laid_out(head.log_spread)
        preceding = None
        if self.preceding_tokens is not None and self.preceding_hidden is not None:
            before = self.preceding_tokens.long().to(device)
            hidden = self.preceding_hidden.to(device)
            preceding = Preceding(before.clamp(min=0), before >= 0, hidden)
        truth = self.tokens.long().to(device)
        distribution = head(
            evidence,
            tokens=truth,
            observed=~self.masked.to(device),
            last_hidden_state=None if self.hidden is None else self.hidden.to(device),
            temperature=temperature,
            preceding=preceding,
        )
        gain, masked = distribution.coupling_gain(truth), distribution.masked.sum(1)
        return WindowScores(self.level.to(device), masked, gain, torch.zeros_like(gain))


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
        generator = torch.Generator().manual_seed(seed)
        noise_settings = (config.max_extra_windows, generator, config.mean_span_length)
        canvas, noise, starts = draw_windows(
            examples, tokenizer, model.window_length, *noise_settings
        )
        self.columns = starts[:, None] + torch.arange(model.window_length)
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
    def predictions(self, size: int, temperature: float) -> NoisedWindows:
        """The backbone's `size` likeliest tokens; hidden states if the head is conditioned."""
        model, config, device = self.model, self.model.config, self.ids.device
        assert model.coupling_head is not None
        maps = model.coupling_head.context_maps
        window, place = self.masked.nonzero(as_tuple=True)
        with self.autocast:
            states = model.backbone_states(self.ids, self.mask)
            logits = states.logits((window.to(device), self.columns[window, place].to(device)))
        never = (config.vocab_size, model.mask_token_id, config.forbidden_token_ids, device)
        kept = ListedEvidence.from_logits(logits, size, temperature, forbidden_tokens(*never))
        context = {}
        if maps is not None:
            rows = torch.arange(len(self.truth), device=device)[:, None]
            hidden = states.last_hidden_state[rows, self.columns.to(device)]
            context["hidden"] = hidden.to("cpu", torch.bfloat16)
        if maps is not None and maps.copies:
            before = model.preceding(states, self.ids, self.starts, self.mask)
            context["preceding_tokens"] = before.tokens.masked_fill(~before.present, -1).int().cpu()
            context["preceding_hidden"] = before.hidden.to("cpu", torch.bfloat16)
        return NoisedWindows(
            self.truth.int(),
            self.masked,
            self.level,
            kept.indices.int().cpu(),
            kept.log_probs.to("cpu", torch.float16),
            kept.log_rest[..., 0].to("cpu", torch.float16),
            **context,
        )


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
