"""transformers' loop of DiffusionGemma with coupled candidates.

The loop is transformers' own. A pass of it asks for logits, draws a candidate at every position,
keeps some, renoises the others, and stops when the best tokens are stable and sure. With a head

- what is coupled is the processed prediction: logits over the schedule's temperature, then over the
  head's `evidence_temperature`. The circuit itself is not sharpened;
- candidates, and the best tokens that a canvas ends as, are those given one latent path of each
  window, which a generator of its own draws anew in every pass;
- what is kept, and when to stop, is told by the coupled marginals, since a path feigns certainty
  and another path moves the best tokens;
- the backbone is conditioned on its own prediction, as it was trained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import (
    DiffusionGemmaGenerationConfig,
    DiffusionGemmaGenerationMixin,
    EntropyBoundSampler,
    EntropyBoundSamplerConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from ..checks.arguments import choice, integer
from ..coupling.canvas import CoupledCanvas
from ..coupling.heads import CallHead

logger = logging.get_logger(__name__)


@dataclass
class CoupledBoundSamplerConfig(EntropyBoundSamplerConfig):
    """A bound that counts what candidates share that are drawn together.

    Positions are accepted in the order of their entropies `H_i`, up to the first that breaks the
    bound. With `H(S)` the joint entropy of those up to it in the coupled distribution (an estimate,
    `codd_hf.circuits.shared_information`), what is bounded is

    - `"left_out"`: `H(S) - max H_i`, the most that the true tokens may depend on each other beyond
      the joint draw. Where the circuit knows of no dependence, it is the stock bound;
    - `"own"`: `sum H_i - H(S)`, the dependence in the coupled distribution itself.

    Args:
        entropy_bound: in nats.
        dependence: which of the two.
        num_samples: joint draws for an estimate.
    """

    dependence: Literal["left_out", "own"] = "left_out"
    num_samples: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("dependence", self.dependence, ("left_out", "own"))
        integer("num_samples", self.num_samples, least=1)


class CoDDGenerationConfig(DiffusionGemmaGenerationConfig):
    """A `DiffusionGemmaGenerationConfig` that reads a [`CoupledBoundSamplerConfig`] back too."""

    def _resolve_dataclasses(self) -> None:
        stored = self.sampler_config
        if isinstance(stored, dict) and stored.get("_cls_name") == "CoupledBoundSamplerConfig":
            fields = {name: value for name, value in stored.items() if name != "_cls_name"}
            self.sampler_config = CoupledBoundSamplerConfig(**fields)
        super()._resolve_dataclasses()


class CoupledSampler(EntropyBoundSampler):
    """transformers' sampler, by the coupled distribution of a pass, which `canvas` is set to."""

    canvas: CoupledCanvas
    accepted_token_mask: Any  # the others are drawn anew

    def __init__(
        self, config: EntropyBoundSamplerConfig, generator: torch.Generator, **sizes: int
    ) -> None:
        super().__init__(config, **sizes)
        self.config, self.generator = config, generator

    def accept_canvas(
        self, current_canvas: Any, denoiser_canvas: Any, logits: Any, cur_step: Any
    ) -> Any:
        """The canvas `[batch, length]` with the candidates that are accepted, whatever `logits`."""
        config, marginals = self.config, self.canvas.marginal_logits
        if not isinstance(config, CoupledBoundSamplerConfig):
            return super().accept_canvas(current_canvas, denoiser_canvas, marginals, cur_step)
        entropy = torch.distributions.Categorical(logits=marginals).entropy()
        entropy, order = entropy.sort(dim=-1)
        ranks = order.argsort(-1)
        shared = self.canvas.shared_information(ranks, config.num_samples, self.generator)
        shared = shared.gather(1, order)
        if config.dependence == "own":
            bounded = shared.cumsum(-1)
        else:
            bounded = (entropy - shared).cumsum(-1) - entropy
        within = (bounded <= self.entropy_bound).long().cumprod(-1).bool()
        self.accepted_token_mask = within.gather(1, ranks)
        return torch.where(self.accepted_token_mask, denoiser_canvas, current_canvas)


class CoupledLoop(DiffusionGemmaGenerationMixin):
    """A call of `generate`.

    Args:
        backbone: a `DiffusionGemmaForBlockDiffusion`.
        head: of the call, frozen.
        generator: draws the latent paths.
    """

    def __init__(
        self, backbone: PreTrainedModel, head: CallHead, generator: torch.Generator
    ) -> None:
        self.backbone, self.head, self.generator = backbone, head, generator
        self.model, self.config, self.dtype = backbone.model, backbone.config, backbone.dtype
        self.generation_config = backbone.generation_config

    def forward(self, **inputs: Any) -> Any:
        """A pass of the backbone, with what the head reads of it."""
        return self.backbone(**inputs, output_hidden_states=self.head.reads_states)

    def _compile_functions(self, sampler: Any, criteria: Any) -> tuple:
        logger.warning_once("With a CoDD head nothing is compiled: set `disable_compile`.")
        return self.model.encoder, self.forward, sampler, criteria

    def _prepare_sampler(self, generation_config: DiffusionGemmaGenerationConfig) -> CoupledSampler:
        return CoupledSampler(
            generation_config.sampler_config,
            self.generator,
            canvas_length=self.config.canvas_length,
            vocab_size=self.config.text_config.vocab_size,
            max_denoising_steps=generation_config.max_denoising_steps,
        )

    def _denoising_step(  # type: ignore[override]
        self,
        *,
        decoder_forward: Callable,
        sampler: CoupledSampler,
        logits_processor: Callable,
        diffusion_stopping_criteria: Callable | None,
        self_conditioning_logits: torch.Tensor | None,
        finished_denoising: torch.Tensor,
        **inputs: Any,
    ) -> tuple:
        output: Any = None
        processed = torch.empty(0)

        def predict(**given: Any) -> Any:
            nonlocal output
            output = decoder_forward(**given)
            return output

        def given_a_path(input_ids: torch.Tensor, logits: torch.Tensor, **step: Any) -> Any:
            nonlocal processed
            processed = logits_processor(input_ids, logits, **step)
            sampler.canvas = CoupledCanvas.of(self.head, processed, output)
            return sampler.canvas.logits_given_path(self.generator)

        def stop(best: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            assert diffusion_stopping_criteria is not None
            marginals = sampler.canvas.marginal_logits
            return diffusion_stopping_criteria(marginals.argmax(-1), marginals)

        finished_before = finished_denoising.clone()  # it is changed in place
        denoise: Any = super()._denoising_step
        canvas, best, _, finished = denoise(
            decoder_forward=predict,
            sampler=sampler,
            logits_processor=given_a_path,
            diffusion_stopping_criteria=diffusion_stopping_criteria and stop,
            self_conditioning_logits=self_conditioning_logits,
            finished_denoising=finished_denoising,
            **inputs,
        )
        own = processed.to(self.model.decoder.embed_tokens.weight.dtype)
        if self_conditioning_logits is not None:
            own = torch.where(finished_before[:, None, None], self_conditioning_logits, own)
        return canvas, best, own, finished
