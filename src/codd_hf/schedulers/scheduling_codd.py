"""The scheduler of Coupled Discrete Diffusion: one reverse step of masked diffusion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput

from ..circuits import CoupledCategorical
from ..circuits.random import Generators, draw_categorical, uniform
from .candidates import Confidence, read_distribution, read_logits, shape_logits
from .settings import DrawSettings


@dataclass
class CoDDSchedulerOutput(BaseOutput):
    """Output of a denoising step.

    Args:
        prev_sample (`torch.LongTensor` of shape `(batch_size, length)`):
            The sample with the step's tokens committed.
        transfer_index (`torch.BoolTensor` of shape `(batch_size, length)`):
            Where they were committed.
        sampled_tokens (`torch.LongTensor` of shape `(batch_size, length)`):
            The candidate of every position; at positions that are not masked, their token.
        sampled_probs (`torch.Tensor` of shape `(batch_size, length)`):
            The candidate's probability under the distribution that confidence is read from, at
            evidence temperature 1; it is what `low_confidence` ranks by.
        pred_logits (`torch.Tensor` of shape `(batch_size, length, vocab_size)`):
            Normalised log-probabilities that the candidates were really drawn from, after
            temperature, top-k and top-p.
        fallback (`torch.BoolTensor` of shape `(batch_size,)`):
            Rows with a window in which circuit and backbone exclude each other (no completion has
            a positive probability), so that it was drawn factorized.
    """

    prev_sample: torch.LongTensor
    transfer_index: torch.BoolTensor
    sampled_tokens: torch.LongTensor
    sampled_probs: torch.Tensor
    pred_logits: torch.Tensor
    fallback: torch.BoolTensor


class CoDDScheduler(SchedulerMixin, ConfigMixin):
    r"""Commits masked tokens step by step, drawn from a coupled distribution.

    With `k` steps left and `m` masked positions, a step draws a candidate for each position and
    commits the `ceil(m / k)` that the strategy ranks highest, so that the remainder falls on the
    first steps and the last one commits everything. Ties go to the leftmost position.

    A candidate is drawn from the factorized `phi_i` (`factorized`), from the exact coupled marginal
    (`marginal`), or, with `z` drawn from its exact posterior, from
    `p(x_i | z_i) \propto phi_i(x_i) E(z_i, x_i)` (`latent`, section 5.1 of
    [CoDD](https://arxiv.org/abs/2603.00045)): the tokens are then coupled through `z`, and at
    temperature 1 and with all positions committed they are an exact joint sample.

    Confidence is always read at evidence temperature 1, since a sharpened distribution saturates
    and cannot rank.

    Every setting but the token ids can be overridden in a call of [`~CoDDScheduler.step`].

    Args:
        strategy (`str`, defaults to `"low_confidence"`):
            How positions are ranked: by the candidate's probability (`low_confidence`), by the
            distance of the two best probabilities (`margin`), by the smallest entropy (`entropy`)
            or in a random order (`random`).
        sampling (`str`, defaults to `"latent"`):
            What candidates are drawn from: `factorized`, `latent` or `marginal`.
        temperature (`float`, defaults to 0.0):
            Of the final draw; 0 takes the most probable token (of those given `z`, in the
            `latent` mode, where `z` is still drawn).
        evidence_temperature (`float`, defaults to 1.0):
            Divides the backbone's logits before the circuit sees them (the paper's tau).
        top_k (`int`, *optional*): Draw from the `top_k` most probable tokens; 0 or None: from all.
        top_p (`float`, *optional*):
            Draw from the fewest tokens whose probabilities reach `top_p`; 1 or None: from all.
        activation_ratio (`float`, defaults to 1.0):
            The circuit is applied while the mask ratio is at most this (the paper's gamma); 1
            means always.
        activation_scope (`str`, defaults to `"window"`): Whose mask ratio: `window` or `row`.
        confidence (`str`, defaults to `"marginal"`):
            Whether confidence is the candidate's coupled `marginal` probability or its probability
            given the sampled `latent` path (only with `sampling="latent"`).
        mask_token_id (`int`, *optional*):
            The mask token; needed to step with plain logits and to add noise, unless given there.
        forbidden_token_ids (`list[int]`, *optional*):
            Tokens never drawn when stepping with plain logits, besides the mask token (a coupled
            distribution carries its own).
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        strategy: str = "low_confidence",
        sampling: str = "latent",
        temperature: float = 0.0,
        evidence_temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        activation_ratio: float = 1.0,
        activation_scope: str = "window",
        confidence: str = "marginal",
        mask_token_id: int | None = None,
        forbidden_token_ids: list[int] | None = None,
    ) -> None:
        self.draw_settings()
        self.num_inference_steps: int | None = None
        self.timesteps: torch.Tensor | None = None

    def draw_settings(self, **overrides: Any) -> DrawSettings:
        """The checked settings of a call that overrides some of the configured ones.

        Args:
            **overrides: settings by name; None means the configured value.

        Raises:
            ValueError: a value is out of range.
            TypeError: a name is not a setting, or a value is not a number.
        """
        return DrawSettings.resolve(self.config, overrides)

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None
    ) -> None:
        """Sets the timesteps `1, 1 - 1/n, ..., 1/n`.

        Args:
            num_inference_steps (`int`): The number `n` of steps in which everything is committed.
            device (`str` or `torch.device`, *optional*): Where `timesteps` shall live.

        Raises:
            ValueError: fewer than one step.
        """
        if num_inference_steps < 1:
            raise ValueError(
                f"`num_inference_steps` must be at least 1, got {num_inference_steps}."
            )
        steps_left = torch.arange(num_inference_steps, 0, -1, device=device, dtype=torch.float32)
        self.num_inference_steps = num_inference_steps
        self.timesteps = steps_left / num_inference_steps

    @torch.no_grad()
    def step(
        self,
        model_output: CoupledCategorical | torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.LongTensor,
        *,
        generator: Generators = None,
        eligible: torch.BoolTensor | None = None,
        mask_ratio: torch.Tensor | None = None,
        mask_token_id: int | None = None,
        return_dict: bool = True,
        **overrides: Any,
    ) -> CoDDSchedulerOutput | tuple:
        """Draws candidates for the masked positions and commits the best of them.

        Args:
            model_output (`CoupledCategorical` or `torch.Tensor`):
                The coupled distribution over `batch_size * W` windows of length `L`, the windows of
                a row in succession (`length = W * L`); or plain logits `(batch_size, length,
                vocab_size)`, which are factorized whatever `sampling` says.
            timestep (`float` or `torch.Tensor`): One of `timesteps`.
            sample (`torch.LongTensor` of shape `(batch_size, length)`): The current tokens.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                One generator, or one per row: a row's draws then depend on its own alone.
            eligible (`torch.BoolTensor` of shape `(batch_size, length)`, *optional*):
                Where tokens may be committed in this step; by default, everywhere.
            mask_ratio (`torch.Tensor` of shape `(batch_size,)`, *optional*):
                Each row's mask ratio, for `activation_scope="row"` when `sample` is not the whole
                row; by default, that of `sample`.
            mask_token_id (`int`, *optional*): The mask token; only used with plain logits.
            return_dict (`bool`, defaults to `True`): Whether to return an output or a tuple.
            **overrides: Settings of this call in place of the configured ones.

        Raises:
            ValueError: a setting or shape is wrong, `timestep` is not one of `timesteps`, or plain
                logits were given and the mask token is not known.
        """
        settings = self.draw_settings(**overrides)
        steps_left = self._steps_left(timestep)

        # 1. What candidates and confidence are read from, and where a token may be committed.
        if isinstance(model_output, CoupledCategorical):
            source = read_distribution(model_output, sample, settings, generator, mask_ratio)
        else:
            source = read_logits(
                model_output,
                sample,
                settings,
                self.config.mask_token_id if mask_token_id is None else mask_token_id,
                self.config.forbidden_token_ids or [],
            )
        masked, confidence = source.masked, source.confidence
        committable = masked if eligible is None else masked & eligible

        # 2. One candidate per position.
        pred_logits = shape_logits(
            source.log_probs, settings.temperature, top_k=settings.top_k, top_p=settings.top_p
        )
        if settings.temperature == 0:
            candidates = pred_logits.argmax(-1)
        else:
            uniforms = uniform(sample.shape, generator, sample.device)
            candidates = draw_categorical(pred_logits.exp(), uniforms)
        sampled_tokens = torch.where(masked, candidates, sample)
        sampled_probs = confidence.of(sampled_tokens)

        # 3. The best-ranked ones are committed.
        score = _rank_scores(settings.strategy, confidence, sampled_probs, generator)
        score = score.masked_fill(~committable, -torch.inf)
        order = score.argsort(dim=-1, descending=True, stable=True)
        rank = order.argsort(dim=-1)
        num_committed = (committable.sum(-1, keepdim=True) + steps_left - 1) // steps_left
        transfer_index = committable & (rank < num_committed)
        prev_sample = torch.where(transfer_index, sampled_tokens, sample)

        output = CoDDSchedulerOutput(
            prev_sample=prev_sample,
            transfer_index=transfer_index,
            sampled_tokens=sampled_tokens,
            sampled_probs=sampled_probs,
            pred_logits=pred_logits,
            fallback=source.fallback,
        )
        return output if return_dict else output.to_tuple()

    def add_noise(
        self,
        original_samples: torch.LongTensor,
        timesteps: float | torch.Tensor,
        generator: Generators = None,
        mask_token_id: int | None = None,
        maskable: torch.BoolTensor | None = None,
    ) -> torch.LongTensor:
        """The forward process: replaces each token by the mask token with probability `t`.

        Args:
            original_samples (`torch.LongTensor` of shape `(batch_size, length)`): Clean tokens.
            timesteps (`float` or `torch.Tensor` of shape `(batch_size,)`): `t` of each row, in
                [0, 1].
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): Source of the
                randomness.
            mask_token_id (`int`, *optional*): The mask token; by default the configured one.
            maskable (`torch.BoolTensor` of shape `(batch_size, length)`, *optional*): Where tokens
                may be masked; by default, everywhere.

        Raises:
            ValueError: a timestep is outside [0, 1], or the mask token is not known.
        """
        mask_token_id = self.config.mask_token_id if mask_token_id is None else mask_token_id
        if mask_token_id is None:
            raise ValueError("`mask_token_id` must be given here or in the scheduler's config.")
        levels = torch.as_tensor(timesteps, dtype=torch.float32, device=original_samples.device)
        if not bool(((levels >= 0) & (levels <= 1)).all()):
            raise ValueError(f"`timesteps` must be in [0, 1], got {levels.tolist()}.")
        uniforms = uniform(original_samples.shape, generator, original_samples.device)
        masked = uniforms < levels.reshape(-1, 1)
        if maskable is not None:
            masked = masked & maskable
        return original_samples.masked_fill(masked, mask_token_id)

    def _steps_left(self, timestep: float | torch.Tensor) -> int:
        """How many steps remain at `timestep`, itself included."""
        if self.num_inference_steps is None:
            raise ValueError("`step` was called before `set_timesteps`: call that first.")
        steps = float(timestep) * self.num_inference_steps
        if not (0.5 < steps < self.num_inference_steps + 0.5 and abs(steps - round(steps)) < 0.01):
            raise ValueError(
                f"`timestep` must be one of `scheduler.timesteps`, got {float(timestep)} with "
                f"{self.num_inference_steps} inference steps."
            )
        return round(steps)


def _rank_scores(
    strategy: str, confidence: Confidence, candidate_probs: torch.Tensor, generator: Generators
) -> torch.Tensor:
    """Scores `[B, S]`, the position with the highest of which is committed first."""
    if strategy == "low_confidence":
        return candidate_probs
    if strategy == "margin":
        best, second = confidence.law().topk(2, dim=-1).values.unbind(-1)
        return best - second
    if strategy == "entropy":
        return -torch.special.entr(confidence.law()).sum(-1)
    return uniform(candidate_probs.shape, generator, candidate_probs.device)
