"""What a step draws from: the coupled distribution under the settings of a call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from ..checks.arguments import RowError, as_tensor
from ..circuits import CoupledCategorical
from ..circuits.factorized import without_circuit, without_tokens
from ..circuits.numerics import one_hot_log_probs
from ..circuits.random import Generators, draw_categorical, uniform
from .row_text import RowText
from .scheduler_output import CoDDSchedulerOutput
from .settings import DrawSettings


class Drawing:
    """The draw of one step, over rows of windows in succession.

    The circuit is applied where the settings activate it and where it shares a completion with
    the backbone. Confidence is read at evidence temperature 1, since a sharpened distribution
    saturates and cannot rank.

    Args:
        distribution: over `batch * W` windows of `L` positions.
        sample: `[batch, length]` with `length = W * L`, the tokens before the step.
        settings: of the call.
        generator: one for all, or one per row.
        processors: change the scores that candidates are drawn from, before temperature.
        text: the rows before the step; default `sample`.
        output_logits: whether to return the scores that candidates were drawn from.

    Attributes:
        sharpened: the distribution that tokens are drawn from.
        plain: the distribution that confidence is read from.
        is_coupled: whether the circuit is applied anywhere.
        fallback: `[batch]` bool, rows with a window in which circuit and backbone exclude each
            other.
        masked: `[batch, length]` bool.
    """

    def __init__(
        self,
        distribution: CoupledCategorical,
        sample: torch.Tensor,
        settings: DrawSettings,
        generator: Generators,
        processors: Sequence[LogitsProcessor | LogitsProcessorList],
        text: RowText | None,
        output_logits: bool,
    ) -> None:
        (number,), (window_length,) = distribution.batch_shape, distribution.event_shape
        if number * window_length != sample.numel() or sample.shape[1] % window_length:
            raise ValueError(
                f"`sample` must hold the tokens of {number} windows of {window_length}, the "
                f"windows of a row in succession, got shape {tuple(sample.shape)}."
            )
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
        plain = distribution.with_temperature(1.0)
        sharpened = distribution.with_temperature(temperature)
        fallback = torch.zeros_like(active)
        if bool(active.any()):
            if plain is not sharpened:
                plain.latents.filter_with(sharpened.latents)
            impossible = sharpened.log_partition.isneginf() | plain.log_partition.isneginf()
            fallback, active = active & impossible, active & ~impossible
            if bool(fallback.any()):
                plain, sharpened = plain.with_active(active), sharpened.with_active(active)
        self.sample, self.settings, self.generator = sample, settings, generator
        self.plain, self.sharpened = plain, sharpened
        self.is_coupled, self.fallback = bool(active.any()), fallback.view(len(sample), -1).any(-1)
        self.masked = plain.masked.view(sample.shape)
        self.processors, self.output_logits = processors, output_logits
        if text is None:
            every = torch.arange(sample.shape[1], device=sample.device).expand_as(sample)
            text = RowText(sample, ~self.masked, every)
        self.text = text

    def split(self, of_rows: torch.Tensor) -> torch.Tensor:
        """`[*S, batch * W, L]` of `[*S, batch, length]`."""
        return of_rows.reshape(*of_rows.shape[:-2], *self.plain.masked.shape)

    def join(self, of_windows: torch.Tensor) -> torch.Tensor:
        """`[batch, length, ...]` of `[batch * W, L, ...]`."""
        return of_windows.reshape(*self.sample.shape, *of_windows.shape[2:])

    def probs(self) -> torch.Tensor:
        """Confidence in every token, `[batch, length, vocab]`."""
        if not self.is_coupled:
            return self.join(self.plain.factorized_logits).exp()
        return self.join(self.plain.marginals)

    def probs_of(self, tokens: torch.Tensor) -> torch.Tensor:
        """Confidence in tokens `[batch, length]`."""
        if not self.is_coupled:
            return self._factorized(tokens).exp()
        return self.join(self.plain.marginal_probs_of(self.split(tokens)))

    def log_prob(self, tokens: torch.Tensor, sets: torch.Tensor) -> torch.Tensor:
        """`[n, batch]`: of the tokens at each set of positions `[n, batch, length]` together."""
        if not self.is_coupled:
            return torch.where(sets, self._factorized(tokens), 0).sum(-1)
        log_prob = self.plain.partial_log_prob(self.split(tokens), self.split(sets))
        return log_prob.unflatten(-1, (len(tokens), -1)).sum(-1)

    def _factorized(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.join(self.plain.factorized_logits).gather(-1, tokens[..., None])[..., 0]

    def output(self, tokens, where, candidates, probs, logits) -> CoDDSchedulerOutput:
        """What the step gives as long as nothing is remasked."""
        remasked = torch.zeros_like(where)
        return CoDDSchedulerOutput(
            tokens, where, candidates, probs, logits, self.fallback, remasked
        )

    def uniforms(self) -> torch.Tensor | None:
        """A number in [0, 1) for each position; None where nothing is random."""
        if self.settings.is_greedy or self.settings.sampling == "viterbi":
            return None
        return uniform(self.sample.shape, self.generator, self.sample.device)

    def candidate_scores(self) -> torch.Tensor:
        """`[batch, length, vocab]` log-probabilities of which candidates are drawn separately."""
        distribution, sampling, generator = self.sharpened, self.settings.sampling, self.generator
        number, length = distribution.masked.shape
        if isinstance(generator, list | tuple):  # a row's for each of its windows
            generator = [g for g in generator for _ in range(number // len(self.sample))]
        draws_latents = sampling == "latent" and not self.settings.is_greedy
        if not self.is_coupled:
            if draws_latents and distribution.potentials.num_latents > 1:
                # A row uses up the same numbers whether or not others of its batch are coupled.
                uniform((number, 1, length), generator, self.sample.device)
            return self.join(distribution.factorized_logits)
        if sampling == "marginal":
            return self.join(distribution.marginals.log())
        if draws_latents:
            latents = distribution.sample_latents(generator)
        elif sampling == "latent":
            latents = distribution.best_latents()
        else:
            latents = distribution.viterbi().latents
        return self.join(distribution.logits_given(latents))

    def controlled(self, scores: torch.Tensor, rows: torch.Tensor, text: RowText) -> torch.Tensor:
        """Scores `[n, vocab]` of rows `[n]` of a text, after the processors.

        One is called for each row, with the row's known tokens in order as `input_ids`, the same
        in every line, and a line of scores for each position.

        Raises:
            TypeError: a processor returns no scores.
            ValueError: it returns scores of another shape.
        """
        for row in rows.unique().tolist():
            lines = rows == row
            processed = scores[lines]
            ids = text.tokens[row, text.known[row]].expand(len(processed), -1)
            for processor in self.processors:
                returned = processor(ids, processed)
                processed = as_tensor(
                    "scores` of `logits_processor", returned, float, processed.shape
                ).to(processed)
            scores = scores.masked_scatter(lines[:, None], processed)
        return scores

    def draw(
        self, scores: torch.Tensor, uniforms: torch.Tensor | None, rows: torch.Tensor, wanted=True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Draws tokens, as the settings shape their probabilities.

        Args:
            scores: `[*batch, vocab]` log-probabilities; -inf where a token is impossible.
            uniforms: `[*batch]` numbers in [0, 1); None for the most probable tokens.
            rows: `[*batch]`, the row of each, for errors.
            wanted: `[*batch]` bool, where a token must be possible.

        Returns:
            Tokens `[*batch]`, and the log-probabilities `[*batch, vocab]` they were drawn from if
            these are asked for.

        Raises:
            RowError: no token is possible where one is wanted, or a score is NaN or infinite.
        """
        settings = self.settings
        if uniforms is None:
            best, tokens = scores.max(-1)
            undefined = ~best.isfinite()
            shaped = one_hot_log_probs(tokens, scores) if self.output_logits else None
        else:
            shaped = shape_logits(scores, settings.temperature, settings.top_k, settings.top_p)
            undefined = shaped[..., 0].isnan()
            tokens = draw_categorical(shaped.exp(), uniforms)
        undefined = undefined & wanted
        if bool(undefined.any()):
            raise RowError(
                "No token can be drawn in row {row}: `forbidden_token_ids`, `logits_processor` and "
                "what the model never generates leave none, or a logit is NaN or infinite.",
                int(rows[undefined][0]),
            )
        return tokens, shaped


def of_logits(
    logits: torch.Tensor, sample: torch.Tensor, mask_token_id: int | None
) -> CoupledCategorical:
    """Plain logits `[batch, length, vocab]` as windows without a circuit, one a row.

    Raises:
        ValueError: the shapes do not fit, or the mask token is None.
    """
    if logits.ndim != 3 or logits.shape[:2] != sample.shape:
        raise ValueError(
            f"`model_output` must be a CoupledCategorical or logits [batch, length, vocab] for a "
            f"`sample` of shape {tuple(sample.shape)}, got shape {tuple(logits.shape)}."
        )
    if mask_token_id is None:
        raise ValueError(
            "`mask_token_id` must be given here or in the scheduler's config to step with logits."
        )
    logits = without_tokens(logits.float(), mask_token_id, None)
    return without_circuit(logits, sample, sample != mask_token_id)


def shape_logits(
    logits: torch.Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None
) -> torch.Tensor:
    """Log-probabilities after temperature, then top-k, then top-p.

    Args:
        logits: `[..., vocab]`; -inf where a token is impossible.
        temperature: divides the logits; above 0.
        top_k: how many tokens stay; 0 or None: all.
        top_p: the fewest tokens whose probabilities reach it stay; 1 or None: all.

    Returns:
        `[..., vocab]`, normalised; -inf where a token cannot be drawn.
    """
    logits = (logits / temperature).log_softmax(-1)
    limited, nucleus = 0 < (top_k or 0) < logits.shape[-1], (top_p or 1) < 1
    if not (limited or nucleus):
        return logits
    ordered, index = logits.sort(dim=-1, descending=True, stable=True)
    if limited:
        ordered[..., top_k:] = -torch.inf
    if nucleus:
        probs = ordered.softmax(-1)
        reached_before = probs.cumsum(-1) - probs >= top_p
        reached_before[..., 0] = False
        ordered = ordered.masked_fill(reached_before, -torch.inf)
    return torch.empty_like(logits).scatter(-1, index, ordered).log_softmax(-1)
