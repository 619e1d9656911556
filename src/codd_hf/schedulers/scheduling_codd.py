"""The scheduler of Coupled Discrete Diffusion: one reverse step, from masks or uniform noise."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from diffusers import ConfigMixin, SchedulerMixin
from transformers import LogitsProcessor, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from ..checks.arguments import (
    LARGEST_INTEGER,
    as_tensor,
    choice,
    generators,
    integer,
    number,
    shown,
    token_id,
    token_ids,
    without_left_fields,
)
from ..circuits import (
    CoupledCategorical,
    Generators,
    uniform,
    without_circuit,
    without_tokens,
)
from .drawing import CoDDSchedulerOutput, RowText, StepDraw
from .settings import LEFT, DrawSettings
from .strategies import choose, fewest, kept_pace

NOISES = ("mask", "uniform")
MOST_STEPS = 1 << 20
"""More would only hold memory: a step commits a token at least."""


class CoDDScheduler(SchedulerMixin, ConfigMixin):
    """Commits masked tokens step by step, drawn from a coupled distribution.

    With `k` steps left and `m` masked positions, a step draws a candidate for each position and
    commits the `ceil(m / k)` that the strategy ranks highest, so that the last step commits
    everything. Ties go to the leftmost position. The strategies `threshold` and `joint` commit more
    where they are sure: `threshold` every candidate whose confidence reaches the threshold, `joint`
    the longest run of candidates, in order of confidence, whose exact joint probability stays at or
    above it.

    Uniform noise is not told from text. There each step draws all positions anew, keeps
    `ceil(m (n - k + 1) / n)` of `m` in step `n - k + 1` of `n`, or more, and puts random tokens in
    the place of the others.

    `latent` and `any_order` are the sampling modes of the paper
    ([CoDD](https://arxiv.org/abs/2603.00045), section 5.1). At temperature 1 `any_order` samples
    the joint exactly (but for `joint`), and `latent` does if all is committed at once.

    Args:
        mask_token_id (`int`, *optional*): The mask token; needed to step with plain logits and
            to add noise.
        noise (`str`, defaults to `"mask"`): What is denoised: `"mask"` tokens or `"uniform"` ones.
        **settings: Those of [`DrawSettings`]. A call of [`~CoDDScheduler.step`] may override them.
    """

    order = 1
    config: Any

    def __init__(
        self, mask_token_id: int | None = None, noise: str = "mask", **settings: Any
    ) -> None:
        if mask_token_id is not None:
            mask_token_id = integer("mask_token_id", mask_token_id, least=0)
        choice("noise", noise, NOISES)
        self._configure(DrawSettings().updated(**settings), mask_token_id, noise)
        self.num_inference_steps = 0
        self.timesteps = torch.empty(0)

    def _configure(self, settings: DrawSettings, mask_token_id: int | None, noise: str) -> None:
        self.settings, self.is_uniform = settings, noise == "uniform"
        if self.is_uniform and settings.activation_ratio < 1:
            raise ValueError(
                "`activation_ratio` must be 1 with uniform noise, which has no share of masks, got "
                f"{settings.activation_ratio}."
            )
        self.register_to_config(mask_token_id=mask_token_id, noise=noise, **vars(settings))

    @classmethod
    def from_config(
        cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """A scheduler of a stored configuration; `kwargs` are settings in place of some.

        Raises:
            ValueError: a field is unknown, of the wrong type or out of range.
        """
        config = without_left_fields(config, LEFT, f"a configuration of {cls.__name__}")
        stored = {name: value for name, value in config.items() if not name.startswith("_")}
        try:
            scheduler = cls(**{**stored, **kwargs})
        except TypeError as error:  # of a file, the value is wrong, whatever its type
            raise ValueError(str(error)) from error
        return (scheduler, {}) if return_unused_kwargs else scheduler

    def for_call(self, mask_token_id: int | None, **overrides: Any) -> Self:
        """A copy with the settings of a call, so that threads share `self`.

        Without a mask token, the noise is uniform.
        """
        scheduler, noise = copy.copy(self), "uniform" if mask_token_id is None else "mask"
        scheduler._configure(self.settings.updated(**overrides), mask_token_id, noise)
        return scheduler

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None
    ) -> None:
        """Sets the timesteps `1, 1 - 1/n, ..., 1/n`.

        Args:
            num_inference_steps (`int`): The number `n` of steps in which everything is committed.
            device (`str` or `torch.device`, *optional*): Where `timesteps` shall live.
        """
        steps = integer("num_inference_steps", num_inference_steps, 1, MOST_STEPS)
        steps_left = torch.arange(steps, 0, -1, device=device, dtype=torch.float32)
        self.num_inference_steps, self.timesteps = steps, steps_left / steps

    @torch.no_grad()
    def step(
        self,
        model_output: CoupledCategorical | torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        *,
        generator: Generators = None,
        eligible: torch.Tensor | None = None,
        at_least: torch.Tensor | None = None,
        logits_processor: LogitsProcessor | LogitsProcessorList | None = None,
        text: RowText | None = None,
        return_dict: bool = True,
        **overrides: Any,
    ) -> CoDDSchedulerOutput | Any:
        """Draws candidates for the masked (or, of uniform noise, all) positions, commits the best.

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
            at_least (`torch.LongTensor` of shape `(batch_size,)`, *optional*): The fewest tokens
                that each row commits; by default `ceil(m / k)`, an equal share of the `m` masked
                positions in each of the `k` steps left (`joint`: `ceil(2 m / (k (k + 1)))`).
            logits_processor (`LogitsProcessorList`, *optional*):
                transformers' processors of the scores that candidates are drawn from, before
                temperature. Called for each row with its known tokens in order as `input_ids`,
                masks and padding left out, the same in every line, and with a line of
                log-probabilities for each masked position.
            text (`RowText`, *optional*): The whole rows; by default `sample` is all there is.
            return_dict (`bool`, defaults to `True`): Whether to return an output or a tuple.
            **overrides: Settings of this call in place of the configured ones.

        Raises:
            ValueError: a setting or shape is wrong, `timestep` is not one of `timesteps`, or the
                mask token is needed and not known.
        """
        # 1. Check the arguments.
        settings = self.settings.updated(**overrides) if overrides else self.settings
        steps_left = self._steps_left(timestep)
        if isinstance(model_output, CoupledCategorical):
            distribution, device = model_output, model_output.present.device
            sample = token_ids("sample", sample, distribution.potentials.vocab_size, device)
        else:
            logits = as_tensor("model_output", model_output, float)
            vocab_size, device = (1, *logits.shape)[-1], logits.device
            sample = token_ids("sample", sample, vocab_size, device)
            as_tensor("model_output", logits, shape=(*sample.shape, vocab_size))
            settings.check_vocabulary(vocab_size)
            observed = torch.zeros_like(sample, dtype=torch.bool)
            if not self.is_uniform:
                mask_token_id = self._mask_token_id(None, vocab_size)
                observed = sample != mask_token_id
                logits = without_tokens(logits, mask_token_id, None)
            distribution = without_circuit(logits.float(), sample, observed)
            if settings.sampling == "any_order":  # of independent tokens, no order matters
                settings = replace(settings, sampling="marginal")
        generators("generator", generator, len(sample))

        # 2. Where a token may be committed, and how many are.
        processors: list[Any] = [logits_processor] if logits_processor else []
        if settings.repetition_penalty != 1:
            penalty = RepetitionPenaltyLogitsProcessor(float(settings.repetition_penalty))
            processors.insert(0, penalty)
        draw = StepDraw(distribution, sample, settings, generator, processors, text)
        committable = draw.masked
        if eligible is not None:
            committable = committable & as_tensor("eligible", eligible, bool, sample.shape, device)
        if at_least is None and self.is_uniform:
            steps = self.num_inference_steps
            at_least = kept_pace(committable, steps - steps_left + 1, steps)
        elif at_least is None:
            at_least = fewest(settings, committable, steps_left)
        at_least = as_tensor("at_least", at_least, int, sample.shape[:1], device)

        # 3. Candidates are drawn, and some of them committed.
        any_order = settings.sampling == "any_order"
        output = (draw.in_any_order if any_order else draw.independently)(committable, at_least)
        if self.is_uniform:
            size = distribution.potentials.vocab_size
            noise = uniform_tokens(sample.shape, size, generator, device)
            is_noise = committable & ~output.transfer_index
            output.prev_sample = torch.where(is_noise, noise, output.prev_sample)
        return output if return_dict else output.to_tuple()

    @torch.no_grad()
    def select_positions(
        self,
        logits: torch.Tensor,
        timestep: float | torch.Tensor,
        eligible: torch.Tensor,
        *,
        generator: Generators = None,
        **overrides: Any,
    ) -> torch.Tensor:
        """Chooses what a step of the full paradigm commits, by the backbone's prediction alone.

        Of the eligible positions these are as many as `step` commits at least, which the strategy
        ranks highest by their best tokens; `threshold` and `joint` add all whose best token reaches
        the threshold. The windows of the circuit are laid over them.

        Args:
            logits (`torch.Tensor` of shape `(batch_size, length, vocab_size)`):
                Of the backbone, -inf for tokens that must not be drawn.
            timestep (`float` or `torch.Tensor`): As in `step`.
            eligible (`torch.BoolTensor` of shape `(batch_size, length)`): Masked positions.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): As in `step`.
            **overrides: As in `step`.
        """
        settings = self.settings.updated(**overrides) if overrides else self.settings
        eligible = as_tensor("eligible", eligible, bool)
        vocab_size = as_tensor("logits", logits, float).shape[-1]
        as_tensor("logits", logits, shape=(*eligible.shape, vocab_size))
        settings.check_vocabulary(vocab_size)
        logits = without_tokens(logits.float(), None, settings.forbidden_token_ids)
        probs = logits.log_softmax(-1).exp()
        at_least = fewest(settings, eligible, self._steps_left(timestep))
        return choose(settings, probs.amax(-1), lambda: probs, eligible, at_least, generator)

    def add_noise(
        self,
        original_samples: torch.Tensor,
        timesteps: float | torch.Tensor,
        generator: Generators = None,
        mask_token_id: int | None = None,
        mean_span_length: float = 1.0,
        vocab_size: int | None = None,
    ) -> torch.Tensor:
        """The forward process: replaces each token by noise with probability `t`.

        Args:
            original_samples (`torch.LongTensor` of shape `(batch_size, length)`): Clean tokens.
            timesteps (`float` or `torch.Tensor` of shape `(batch_size,)`): `t`, in [0, 1].
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): As in `step`.
            mask_token_id (`int`, *optional*): The mask token; by default the configured one.
            mean_span_length (`float`, defaults to 1.0): Mean length of the spans of tokens that
                are replaced together (`span_uniforms`); 1 replaces each token on its own.
            vocab_size (`int`, *optional*): The number of tokens, of which uniform noise is any.
        """
        if not self.is_uniform:
            mask_token_id = self._mask_token_id(mask_token_id)
        elif vocab_size is None:
            raise ValueError("`vocab_size` must be given to add uniform noise, got None.")
        original_samples = token_ids("original_samples", original_samples, LARGEST_INTEGER)
        shape, device = original_samples.shape, original_samples.device
        levels = as_tensor("timesteps", timesteps).to(device, torch.float32)
        as_tensor("timesteps", levels, shape=shape[: levels.ndim and 1])
        if not bool(((levels >= 0) & (levels <= 1)).all()):
            raise ValueError(f"`timesteps` must be in [0, 1], got {levels.tolist()}.")
        uniforms = span_uniforms(shape, mean_span_length, generator, device)
        replaced = uniforms < levels.reshape(-1, 1)
        if vocab_size is None or not self.is_uniform:
            return original_samples.masked_fill(replaced, mask_token_id or 0)
        noise = uniform_tokens(shape, vocab_size, generator, device)
        return torch.where(replaced, noise, original_samples)

    def _mask_token_id(self, given: int | None = None, vocab_size: int = LARGEST_INTEGER) -> int:
        mask_token_id = self.config.mask_token_id if given is None else given
        if mask_token_id is None:
            raise ValueError("`mask_token_id` is not known: give it to the scheduler.")
        return token_id("mask_token_id", mask_token_id, vocab_size)

    def _steps_left(self, timestep: float | torch.Tensor) -> int:
        """How many steps remain at `timestep`, itself included."""
        steps = number("timestep", timestep) * self.num_inference_steps
        rounding = max(0.01, self.num_inference_steps * 2.0**-23)  # of timesteps in float32
        most = self.num_inference_steps + 0.5
        if not (0.5 < steps < most and abs(steps - round(steps)) < rounding):
            raise ValueError(
                f"`timestep` must be one of `scheduler.timesteps`, got {shown(timestep)} with "
                f"{self.num_inference_steps} inference steps: `set_timesteps` sets them."
            )
        return round(steps)


def uniform_tokens(
    shape: Sequence[int],
    vocab_size: int,
    generator: Generators = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Tokens `[batch, length]`, each any of the vocabulary with equal odds."""
    tokens = (uniform(shape, generator, device).double() * vocab_size).long()
    return tokens.clamp(max=vocab_size - 1)


def span_uniforms(
    shape: Sequence[int],
    mean_span_length: float = 1.0,
    generator: Generators = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Numbers `[batch, length]` in [0, 1), each uniform, that the positions of a span share.

    Parallel decoding leaves holes, which are runs of masked tokens; independent masks show a model
    few long runs at low noise levels. Here a row is cut into spans of geometric length; a mean of 1
    gives every position a number of its own. Tokens with a number below `t` are masked: each with
    probability exactly `t`.
    """
    number("mean_span_length", mean_span_length, least=1)
    numbers = uniform(shape, generator, device)
    if mean_span_length == 1:
        return numbers
    begins = uniform(shape, generator, device) < 1 / mean_span_length
    position = torch.arange(shape[1], device=numbers.device)
    first = torch.where(begins, position, 0).cummax(1).values
    return numbers.gather(1, first)
