r"""The draw of a step: tokens from the coupled distribution, independently or one by one.

In any order a token is drawn from `p(x_i | everything known or drawn before)`, by the chain rule a
sample of the joint (CoDD, arXiv 2603.00045, section 5.1). The next position is the one that the
strategy ranks first given the tokens known by then. No ranking looks at a candidate, so at
temperature 1 the tokens of a step have exactly the joint's distribution, whatever the order (not so
with `joint`, which stops at a candidate).
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.utils import BaseOutput

from ..checks.arguments import RowError, as_tensor
from ..circuits import (
    CoupledCategorical,
    Generators,
    IncrementalPosterior,
    draw_categorical,
    uniform,
)
from .settings import DrawSettings
from .strategies import ADAPTIVE, IN_ORDER, best_scored, choose, leftmost_first, rank


@dataclass
class CoDDSchedulerOutput(BaseOutput):
    """Output of a denoising step.

    Args:
        prev_sample (`torch.LongTensor` of shape `(batch_size, length)`):
            The sample with the step's tokens committed.
        transfer_index (`torch.BoolTensor` of shape `(batch_size, length)`):
            Where tokens were committed.
        sampled_tokens (`torch.LongTensor` of shape `(batch_size, length)`):
            The candidate of every position; where nothing is masked, its token. `any_order` draws
            only what is committed, and the others keep their mask.
        sampled_probs (`torch.Tensor` of shape `(batch_size, length)`):
            The candidate's probability at evidence temperature 1; with `any_order`, given the
            tokens drawn before it, and 0 where nothing was drawn.
        pred_logits (`torch.Tensor` of shape `(batch_size, length, vocab_size)`, *optional*):
            Log-probabilities that the candidates were drawn from, after processors, temperature,
            top-k and top-p; None with `any_order`.
    """

    prev_sample: torch.Tensor
    transfer_index: torch.Tensor
    sampled_tokens: torch.Tensor
    sampled_probs: torch.Tensor
    pred_logits: torch.Tensor | None = None


@dataclass
class RowText:
    """The rows that a step's sample is a part of.

    Attributes:
        tokens: `[n, T]`.
        known: `[n, T]` bool, prompt and committed tokens; not masks, not padding.
        position: `[n, length]`, where on its row a position of the sample lies; in the last window
            it may be past the end.
        rows: `[n]`, the numbers of the rows in their batch.
    """

    tokens: torch.Tensor
    known: torch.Tensor
    position: torch.Tensor
    rows: torch.Tensor


class StepDraw:
    """What one step draws, over rows of windows in succession.

    The circuit is applied where the settings activate it and where it shares a completion with
    the backbone. Confidence is read at evidence temperature 1: a sharpened distribution saturates
    and cannot rank.

    Args:
        distribution: over `batch * W` windows of `L` positions.
        sample: `[batch, length]` with `length = W * L`, the tokens before the step.
        settings: of the call.
        generator: one for all, or one per row.
        processors: as `CoDDScheduler.step` describes them.
        text: the rows before the step; default `sample`.
    """

    def __init__(
        self,
        distribution: CoupledCategorical,
        sample: torch.Tensor,
        settings: DrawSettings,
        generator: Generators,
        processors: Sequence[Any],
        text: RowText | None,
    ) -> None:
        number, self.length = distribution.masked.shape
        if number * self.length != sample.numel() or sample.shape[1] % self.length:
            raise ValueError(
                f"`sample` must hold the tokens of {number} windows of {self.length}, the windows "
                f"of a row in succession, got shape {tuple(sample.shape)}."
            )
        self.sample, self.settings, self.generator = sample, settings, generator
        self.processors, self.masked = processors, distribution.masked.view(sample.shape)
        self.rows = torch.arange(len(sample), device=sample.device)[:, None].expand_as(sample)
        if text is None:
            every = torch.arange(sample.shape[1], device=sample.device).expand_as(sample)
            text = RowText(sample, ~self.masked, every, self.rows[:, 0])
        self.text = text
        if settings.forbidden_token_ids:
            ids = torch.tensor(settings.forbidden_token_ids, device=sample.device)
            distribution = distribution.without(ids)
        ratio = distribution.masked.sum(-1) / distribution.present.sum(-1).clamp(min=1)
        active = distribution.active & (ratio <= settings.activation_ratio)
        temperature = settings.evidence_temperature or distribution.temperature
        if settings.sampling == "factorized":  # the head's temperature goes with the head
            active, temperature = torch.zeros_like(active), settings.evidence_temperature or 1.0
        if not torch.equal(active, distribution.active):
            distribution = distribution.with_active(active)
        self.plain = distribution.with_temperature(1.0)
        self.sharpened = distribution.with_temperature(temperature)
        if bool(active.any()):
            if self.plain is not self.sharpened:
                self.plain.latents.filter_with(self.sharpened.latents)
            both = self.plain.log_partition, self.sharpened.log_partition
            possible = torch.minimum(*both) > -torch.inf
            if not bool(possible[active].all()):
                warnings.warn(
                    "The circuit and the backbone share no completion of a window (`log_partition` "
                    "is -inf), so it is decoded factorized.",
                    stacklevel=2,
                )
                active = active & possible
                self.plain = self.plain.with_active(active)
                self.sharpened = self.sharpened.with_active(active)
        self.is_coupled = bool(active.any())

    def split(self, of_rows: torch.Tensor) -> torch.Tensor:
        """`[*S, batch * W, L]` of `[*S, batch, length]`."""
        return of_rows.reshape(*of_rows.shape[:-2], -1, self.length)

    def join(self, of_windows: torch.Tensor) -> torch.Tensor:
        """`[batch, length, ...]` of `[batch * W, L, ...]`."""
        return of_windows.reshape(*self.sample.shape, *of_windows.shape[2:])

    def independently(
        self, committable: torch.Tensor, at_least: torch.Tensor
    ) -> CoDDSchedulerOutput:
        """Draws a candidate for every masked position; the strategy chooses among them.

        Args:
            committable: `[batch, length]` bool, where a token may be committed.
            at_least: `[batch]`, the fewest tokens to commit, if there are so many.
        """
        scores = self._candidate_scores()
        tokens, scores = self._draw(scores, self._uniforms(), self.rows, self.masked)
        tokens = torch.where(self.masked, tokens, self.sample)
        if self.is_coupled:
            probs = self.join(self.plain.marginal_probs_of(self.split(tokens)))
        else:
            probs = self._factorized(tokens).exp()

        def log_prob(sets: torch.Tensor) -> torch.Tensor:
            """`[n, batch]`: of the tokens at each set of positions `[n, batch, length]`."""
            if not self.is_coupled:
                return torch.where(sets, self._factorized(tokens), 0).sum(-1)
            of_windows = self.plain.partial_log_prob(self.split(tokens), self.split(sets))
            return of_windows.unflatten(-1, (len(tokens), -1)).sum(-1)

        where = choose(
            self.settings, probs, self._all_probs, committable, at_least, self.generator, log_prob
        )
        kept = torch.where(where, tokens, self.sample)
        return CoDDSchedulerOutput(kept, where, tokens, probs, scores)

    def in_any_order(
        self, committable: torch.Tensor, at_least: torch.Tensor
    ) -> CoDDSchedulerOutput:
        """Draws what the strategy commits and no more, one token after the other.

        The arguments are those of `independently`.
        """
        settings, uniforms, tokens = self.settings, self._uniforms(), self.sample.clone()
        probs, where = (~self.masked).to(self.plain.latents.dtype), torch.zeros_like(self.masked)
        if self.processors:  # they see the tokens drawn before
            seen = {"tokens": self.text.tokens.clone(), "known": self.text.known.clone()}
            self.text = replace(self.text, **seen)
        scores, log_joint = torch.zeros_like(probs), probs.new_zeros(len(tokens))
        in_order, adaptive = settings.strategy in IN_ORDER, settings.strategy in ADAPTIVE
        if in_order:
            order = rank(settings, probs, self._all_probs, self.generator)
            committable, scores = best_scored(order, committable, at_least), leftmost_first(probs)
        both = list(dict.fromkeys((self.plain, self.sharpened)))
        known = IncrementalPosterior([each.latents for each in both], self.split(committable))

        def place(rows: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            flat = rows * tokens.shape[1] + columns
            return flat // self.length, flat % self.length

        def score(at: tuple[torch.Tensor, ...]) -> None:
            of_tokens = known.token_probs(0, place(*at))
            scores[at] = rank(settings, of_tokens.amax(-1), lambda: of_tokens)

        left = renewed = committable
        going, chosen = torch.ones_like(at_least, dtype=torch.bool), torch.zeros_like(at_least)
        for drawn in range(tokens.shape[1] + 1):
            due = at_least > drawn
            going = going & left.any(-1) & (due | adaptive)
            rows = going.nonzero()[:, 0]
            if drawn and len(rows):  # only here: a step's last token says nothing that is asked
                windows, columns = place(rows, chosen[rows])
                known.reveal((windows, columns), tokens[rows, chosen[rows]])
                renewed = torch.zeros_like(known.wanted).index_fill(0, windows, True).view_as(left)
            at = (renewed & left & going[:, None]).nonzero(as_tuple=True)
            if len(at[0]) and not in_order:
                score(at)
            chosen = scores.masked_fill(~left, -torch.inf).argmax(-1)  # [batch]
            if settings.strategy == "threshold":  # which ranks by probability
                going = going & (due | (_of(scores, chosen) >= settings.threshold))
            rows = going.nonzero()[:, 0]
            if not len(rows):
                break
            at = rows, chosen[rows]
            candidates = known.token_probs(len(both) - 1, place(*at)).log()
            numbers = None if uniforms is None else uniforms[at]
            new, _ = self._draw(candidates, numbers, rows, torch.ones_like(rows) > 0)
            new_probs = known.prob_of(new, 0, place(*at))
            if settings.strategy == "joint":
                log_joint[rows] += new_probs.log()
                stays = due[rows] | (log_joint[rows].exp() >= settings.threshold)
                going[rows[~stays]] = False
                at, new, new_probs = (rows[stays], at[1][stays]), new[stays], new_probs[stays]
            tokens[at], probs[at], where[at] = new, new_probs, True
            if self.processors:
                on_row = at[0], self.text.position[at]
                self.text.tokens[on_row], self.text.known[on_row] = new, True
            left = left & ~where
        return CoDDSchedulerOutput(tokens, where, tokens, probs)

    def _all_probs(self) -> torch.Tensor:
        """Confidence in every token, `[batch, length, vocab]`."""
        if self.is_coupled:
            return self.join(self.plain.marginals)
        return self.join(self.plain.factorized_logits).exp()

    def _factorized(self, tokens: torch.Tensor) -> torch.Tensor:
        return _of(self.join(self.plain.factorized_logits), tokens)

    def _uniforms(self) -> torch.Tensor | None:
        """A number in [0, 1) for each position; None where nothing is random."""
        if self.settings.temperature == 0 or self.settings.sampling == "viterbi":
            return None
        return uniform(self.sample.shape, self.generator, self.sample.device)

    def _candidate_scores(self) -> torch.Tensor:
        """`[batch, length, vocab]` log-probabilities of which candidates are drawn separately."""
        drawn, sampling, generator = self.sharpened, self.settings.sampling, self.generator
        number = len(drawn.masked)
        if isinstance(generator, list | tuple):  # a row's for each of its windows
            generator = [g for g in generator for _ in range(number // len(self.sample))]
        draws_latents = sampling == "latent" and self.settings.temperature > 0
        if not self.is_coupled:
            if draws_latents and drawn.potentials.num_latents > 1:
                # A row uses up the same numbers whether or not others of its batch are coupled.
                uniform((number, 1, self.length), generator, self.sample.device)
            return self.join(drawn.factorized_logits)
        if sampling == "marginal":
            return self.join(drawn.marginals.log())
        if draws_latents:
            latents = drawn.sample_latents(generator)
        else:
            latents = drawn.likely_latents() if sampling == "latent" else drawn.viterbi().latents
        return self.join(drawn.logits_given(latents))

    def _draw(
        self,
        scores: torch.Tensor,
        uniforms: torch.Tensor | None,
        rows: torch.Tensor,
        masked: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens `[*batch]`, and the log-probabilities `[*batch, vocab]` they were drawn from.

        Without `uniforms` `[*batch]` they have the best scores. Where `masked` `[*batch]`, the
        processors are called, row by row, and a token must be possible.
        """
        settings = self.settings
        if self.processors:
            scores = scores.clone()
            for row in rows[masked].unique().tolist():
                lines = masked & (rows == row)
                changed = scores[lines]
                ids = self.text.tokens[row, self.text.known[row]].expand(len(changed), -1)
                for processor in self.processors:
                    returned = processor(ids, changed)
                    name = "scores` of `logits_processor"
                    changed = as_tensor(name, returned, float, changed.shape).to(changed)
                scores[lines] = changed
        if uniforms is None:
            best, tokens = scores.max(-1)
            undefined = ~best.isfinite()
        else:
            scores = shape_logits(scores, settings.temperature, settings.top_k, settings.top_p)
            undefined = scores[..., 0].isnan()
            tokens = draw_categorical(scores.exp(), uniforms)
        undefined = undefined & masked
        if bool(undefined.any()):
            raise RowError(
                "No token can be drawn in row {row}: `forbidden_token_ids`, `logits_processor` and "
                "what the model never generates leave none, or a logit is NaN or infinite.",
                int(rows[undefined][0]),
            )
        return tokens, scores


def shape_logits(
    logits: torch.Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None
) -> torch.Tensor:
    """Log-probabilities `[..., vocab]` after temperature (above 0), then top-k, then top-p."""
    logits = (logits / temperature).log_softmax(-1)
    top_k, top_p = top_k or logits.shape[-1], top_p or 1
    if top_k >= logits.shape[-1] and top_p == 1:
        return logits
    ordered, index = logits.sort(dim=-1, descending=True, stable=True)
    ordered[..., top_k:] = -torch.inf
    probs = ordered.softmax(-1)
    reached_before = probs.cumsum(-1) - probs >= top_p
    reached_before[..., 0] = False
    ordered = ordered.masked_fill(reached_before & (top_p < 1), -torch.inf)
    return torch.empty_like(logits).scatter(-1, index, ordered).log_softmax(-1)


def _of(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return values.gather(-1, index[..., None])[..., 0]
