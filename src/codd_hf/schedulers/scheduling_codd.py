"""The scheduler of Coupled Discrete Diffusion: one reverse step of masked diffusion."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
)

from ..checks.arguments import (
    LARGEST_INTEGER,
    as_tensor,
    check_callable,
    generators,
    integer,
    number,
    shown,
    token_id,
    token_ids,
    without_left_fields,
)
from ..circuits import CoupledCategorical
from ..circuits.factorized import without_tokens
from ..circuits.random import Generators
from .committing import commit
from .drawing import of_logits
from .noise import span_uniforms
from .remasking import CommitMemory
from .row_text import RowText
from .scheduler_output import CoDDSchedulerOutput
from .settings import LEFT, DrawSettings
from .strategies import select

PROCESSOR = "transformers' processors, or a function of ids and scores"
MOST_STEPS = 1 << 20
"""More would only hold memory: a step commits a token at least."""


def _with_draw_settings(init: Callable) -> Callable:
    """Gives an `__init__` with `**settings` the parameters of [`DrawSettings`], to be saved."""
    own = list(inspect.signature(init).parameters.values())[:-1]
    settings = (
        inspect.Parameter(
            setting.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=setting.default,
            annotation=setting.type,
        )
        for setting in fields(DrawSettings)
    )
    vars(init)["__signature__"] = inspect.Signature([*own, *settings])
    return register_to_config(init)


class CoDDScheduler(SchedulerMixin, ConfigMixin):
    r"""Commits masked tokens step by step, drawn from a coupled distribution.

    With `k` steps left and `m` masked positions, a step draws a candidate for each position and
    commits the `ceil(m / k)` that the strategy ranks highest, so that the remainder falls on the
    first steps and the last one commits everything. Ties go to the leftmost position.

    The strategies `threshold` and `joint` commit more where they are sure: `threshold` every
    candidate whose confidence reaches the threshold, `joint` the longest run of candidates, in
    order of confidence, whose exact joint probability under the coupled distribution stays at or
    above it. Steps that a block does not need are not run, so that the number of steps is a
    ceiling.

    | `sampling` | a token is drawn from | exact sample of the joint |
    | --- | --- | --- |
    | `factorized` | `phi_i`, the backbone's prediction | no |
    | `latent` | `p(x_i \| z_i)`, `z` from its posterior | at temperature 1, if all is committed |
    | `any_order` | its exact conditional, one by one | at temperature 1, but for `joint` |
    | `marginal` | its exact coupled marginal | no |
    | `viterbi` | the best path of latents and tokens together; no randomness | no |

    The paper's are `latent` and `any_order` ([CoDD](https://arxiv.org/abs/2603.00045), section
    5.1). `any_order` draws only the tokens that it commits: the next position is the one that the
    strategy ranks first given all tokens revealed so far. At temperature 0 `latent` takes the most
    probable path of latents and the most probable token given it.

    Confidence is read at evidence temperature 1, since a sharpened distribution saturates and
    cannot rank.

    `step` checks its arguments and calls `commit`, which the denoising loop calls itself: override
    `commit` in a subclass.

    Args:
        mask_token_id (`int`, *optional*): The mask token; needed to step with plain logits, to
            remask and to add noise, unless given there.
        **settings: Those of [`DrawSettings`]. A call of [`~CoDDScheduler.step`] may override them.
    """

    order = 1

    @_with_draw_settings
    def __init__(self, mask_token_id: int | None = None, **settings: Any) -> None:
        if mask_token_id is not None:
            mask_token_id = integer("mask_token_id", mask_token_id, least=0)
        # As plain numbers, which can be saved.
        self.register_to_config(mask_token_id=mask_token_id, **vars(self.draw_settings()))
        self.num_inference_steps: int | None = None
        self.timesteps: torch.Tensor | None = None

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any] | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> CoDDScheduler:
        """A scheduler of a stored configuration; `from_pretrained` makes one by this.

        Args:
            config: the fields; diffusers' own begin with `_`.
            return_unused_kwargs: as in diffusers.
            **kwargs: as in diffusers.

        Raises:
            ValueError: a field is unknown, of the wrong type or out of range.
        """
        known = inspect.signature(cls.__init__).parameters
        if isinstance(config, Mapping):
            config = without_left_fields(config, LEFT, f"a configuration of {cls.__name__}")
            for name, value in config.items():
                if name not in known and not name.startswith("_"):
                    raise ValueError(
                        f"`{name}` is no setting of {cls.__name__}, got {value!r:.100}: remove it "
                        "or correct its name."
                    )
        try:
            return super().from_config(config, return_unused_kwargs, **kwargs)
        except TypeError as error:  # of a file, the value is wrong, whatever its type
            raise ValueError(str(error)) from error

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
            ValueError: fewer than one step, or more than `MOST_STEPS`.
            TypeError: the number is no integer.
        """
        num_inference_steps = integer("num_inference_steps", num_inference_steps, 1, MOST_STEPS)
        steps_left = torch.arange(num_inference_steps, 0, -1, device=device, dtype=torch.float32)
        self.num_inference_steps = num_inference_steps
        self.timesteps = steps_left / num_inference_steps

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
        mask_token_id: int | None = None,
        logits_processor: LogitsProcessor | LogitsProcessorList | None = None,
        text: RowText | None = None,
        memory: CommitMemory | None = None,
        output_logits: bool = True,
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
            at_least (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
                The fewest tokens that each row commits, if so many are eligible; by default, those
                of an even pace, `ceil(m / k)`.
            mask_token_id (`int`, *optional*):
                The mask token; used with plain logits and to remask.
            logits_processor (`LogitsProcessorList`, *optional*):
                transformers' processors of the scores that candidates are drawn from, before
                temperature. Called for each row with the row's known tokens in order as
                `input_ids`, masks and padding left out, the same in every line, and with a line of
                log-probabilities for each masked position.
            text (`RowText`, *optional*):
                The whole rows, for the repetition penalty and processors; by default `sample` is
                all they see.
            memory (`CommitMemory`, *optional*):
                What earlier steps of the block committed, for remasking; it is brought up to date.
                Without it only the step's own tokens are judged.
            output_logits (`bool`, defaults to `True`): Whether `pred_logits` is wanted; it may be
                None where it is not.
            return_dict (`bool`, defaults to `True`): Whether to return an output or a tuple.
            **overrides: Settings of this call in place of the configured ones.

        Raises:
            ValueError: a setting or shape is wrong, `timestep` is not one of `timesteps`, or plain
                logits were given and the mask token is not known.
        """
        settings = self.draw_settings(**overrides)
        steps_left = self._steps_left(timestep)
        if mask_token_id is None:
            mask_token_id = self.config.mask_token_id
        if isinstance(model_output, CoupledCategorical):
            vocab_size, device = model_output.potentials.vocab_size, model_output.present.device
        else:
            model_output = as_tensor("model_output", model_output, float)
            vocab_size, device = (1, *model_output.shape)[-1], model_output.device
        settings.check_vocabulary(vocab_size)
        if mask_token_id is not None:
            mask_token_id = token_id("mask_token_id", mask_token_id, vocab_size)
        sample = token_ids("sample", sample, vocab_size, device)
        generators("generator", generator, len(sample))
        if eligible is not None:
            eligible = as_tensor("eligible", eligible, bool, sample.shape, sample.device)
        if at_least is not None:
            at_least = as_tensor("at_least", at_least, int, sample.shape[:1], sample.device)
        for name, value, kind in (("text", text, RowText), ("memory", memory, CommitMemory)):
            if not isinstance(value, kind | None):
                raise TypeError(f"`{name}` must be a {kind.__name__}, got {shown(value)}.")
        check_callable("logits_processor", logits_processor, PROCESSOR)

        if isinstance(model_output, torch.Tensor):
            model_output = of_logits(model_output, sample, mask_token_id)
            if settings.sampling == "any_order":  # of independent tokens, no order matters
                settings = replace(settings, sampling="marginal")
        output = self.commit(
            model_output,
            sample,
            settings,
            steps_left,
            generator=generator,
            eligible=eligible,
            at_least=at_least,
            mask_token_id=mask_token_id,
            logits_processor=logits_processor,
            text=text,
            memory=memory,
            output_logits=output_logits,
        )
        return output if return_dict else output.to_tuple()

    commit = staticmethod(commit)

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

        With `k` steps left and `m` eligible positions these are the `ceil(m / k)` that the strategy
        ranks highest by their best tokens; the strategies `threshold` and `joint` add all others
        whose best token reaches the threshold. The windows of the circuit are laid over them.

        Args:
            logits (`torch.Tensor` of shape `(batch_size, length, vocab_size)`):
                Of the backbone, -inf for tokens that must not be drawn.
            timestep (`float` or `torch.Tensor`): One of `timesteps`.
            eligible (`torch.BoolTensor` of shape `(batch_size, length)`): Masked positions.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): As in `step`.
            **overrides: Settings of this call in place of the configured ones.

        Returns:
            `torch.BoolTensor` of shape `(batch_size, length)`.
        """
        settings = self.draw_settings(**overrides)
        logits = as_tensor("logits", logits, float)
        if logits.ndim != 3:
            raise ValueError(
                f"`logits` must have shape [batch, length, vocab], got {tuple(logits.shape)}."
            )
        settings.check_vocabulary(logits.shape[-1])
        eligible = as_tensor("eligible", eligible, bool, logits.shape[:2], logits.device)
        generators("generator", generator, len(logits))
        logits = without_tokens(logits, None, settings.forbidden_token_ids)
        log_probs = logits.float().log_softmax(-1)
        return select(settings, log_probs, eligible, self._steps_left(timestep), generator)

    def add_noise(
        self,
        original_samples: torch.Tensor,
        timesteps: float | torch.Tensor,
        generator: Generators = None,
        mask_token_id: int | None = None,
        maskable: torch.Tensor | None = None,
        mean_span_length: float = 1.0,
    ) -> torch.Tensor:
        """The forward process: replaces each token by the mask token with probability `t`.

        Independently of each other, or in spans: then a row is cut into spans of geometric length
        and each is masked as a whole or not at all (`noise.py`, the law that training draws from).

        Args:
            original_samples (`torch.LongTensor` of shape `(batch_size, length)`): Clean tokens.
            timesteps (`float` or `torch.Tensor` of shape `(batch_size,)`): `t` of each row, in
                [0, 1].
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): Source of the
                randomness.
            mask_token_id (`int`, *optional*): The mask token; by default the configured one.
            maskable (`torch.BoolTensor` of shape `(batch_size, length)`, *optional*): Where tokens
                may be masked; by default, everywhere.
            mean_span_length (`float`, defaults to 1.0): Mean length of the spans of tokens that
                are masked together; 1 masks each token on its own.

        Raises:
            ValueError: a timestep is outside [0, 1], `mean_span_length` is below 1, or the mask
                token is not known.
        """
        mask_token_id = self.config.mask_token_id if mask_token_id is None else mask_token_id
        if mask_token_id is None:
            raise ValueError("`mask_token_id` must be given here or in the scheduler's config.")
        mask_token_id = integer("mask_token_id", mask_token_id, least=0)
        original_samples = token_ids("original_samples", original_samples, LARGEST_INTEGER)
        shape, device = original_samples.shape, original_samples.device
        levels = as_tensor("timesteps", timesteps).to(device, torch.float32)
        as_tensor("timesteps", levels, shape=shape[: levels.ndim and 1])
        if not bool(((levels >= 0) & (levels <= 1)).all()):
            raise ValueError(f"`timesteps` must be in [0, 1], got {levels.tolist()}.")
        uniforms = span_uniforms(shape, mean_span_length, generator, device)
        masked = uniforms < levels.reshape(-1, 1)
        if maskable is not None:
            masked = masked & as_tensor("maskable", maskable, bool, shape, device)
        return original_samples.masked_fill(masked, mask_token_id)

    def _steps_left(self, timestep: float | torch.Tensor) -> int:
        """How many steps remain at `timestep`, itself included."""
        if self.num_inference_steps is None:
            raise ValueError("`step` was called before `set_timesteps`: call that first.")
        timestep = number("timestep", timestep)
        steps = timestep * self.num_inference_steps
        rounding = max(0.01, self.num_inference_steps * 2.0**-23)  # of timesteps in float32
        most = self.num_inference_steps + 0.5
        if not (0.5 < steps < most and abs(steps - round(steps)) < rounding):
            raise ValueError(
                f"`timestep` must be one of `scheduler.timesteps`, got {timestep} with "
                f"{self.num_inference_steps} inference steps."
            )
        return round(steps)
