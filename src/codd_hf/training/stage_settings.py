"""The settings of each stage of a run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from ..checks.settings import Count, Natural, Positive, Range, Seed, Settings, Share

if TYPE_CHECKING:
    from peft import LoraConfig

    from ..modeling_head import CoDDHead

MAY_CHANGE = {
    "max_steps",
    "num_epochs",
    "evaluation_steps",
    "checkpointing_steps",
    "num_validation_draws",
    "keep",
    "evidence_dir",
    "gradient_checkpointing",
    "alpha",  # of the fitted circuit; the conditional fit knows that of its head
}
"""Settings that a run may be continued with other values of."""


@dataclass
class FitConfig(Settings):
    """The settings of every fit."""

    checkpointing_steps: Count = 100
    """Steps between checkpoints; there is one at the end as well."""
    seed: Seed = 0
    """Of order, noise and all that starts at random."""

    def identity(self) -> dict[str, Any]:
        """The settings that a run must be continued with."""
        return {name: value for name, value in asdict(self).items() if name not in MAY_CHANGE}


@dataclass
class GenerativeConfig(FitConfig):
    """How a circuit is fitted to text, by stepwise EM (Liang and Klein, 2009)."""

    num_epochs: Count = 10
    """Passes over the windows."""
    windows_per_batch: Count = 512
    """Windows an EM step, over all processes."""
    windows_per_chunk: Count = 128
    """Windows that a process counts at once."""
    step_decay: Positive = 0.6
    """The share of a new batch in the counts is `(step + 2) ** -step_decay`."""
    emission_prior: Positive = 30.0
    """Pseudo-tokens per state, spread as the text's unigrams."""
    transition_prior: Positive = 30.0
    """Pseudo-transitions per state, spread evenly."""
    concentration: Positive = 0.9
    """Share of a state's initial emissions that goes to its cluster."""
    noise: Positive = 0.1
    """Log-scale of the noise on the initial parameters."""
    alpha: Positive = 1.0
    """Power of the marginal correction of the fitted circuit."""


@dataclass
class GradientConfig(FitConfig):
    """The settings of every fit by gradient steps."""

    max_steps: Count | None = None
    """Optimiser steps."""
    learning_rate: Positive | None = None
    """The peak of the optimiser's rate."""
    warmup_steps: Natural | None = None
    """Steps in which the rate rises to its peak."""
    evaluation_steps: Count = 200
    """Steps between validations."""
    mixed_precision: Literal["auto", "no", "bf16"] = "no"
    """Of the backbone: no, bf16, or auto (bf16 where the device has its arithmetic); the circuit is
    computed in float32."""
    mean_span_length: Annotated[float, Range(1)] = 1.0
    """Mean length of the spans that are masked together; 1: each token alone."""
    max_extra_windows: Natural = 1
    """Canvases end with up to this many windows of end-of-text."""

    def identity(self) -> dict[str, Any]:
        """As `FitConfig.identity`; the choice of precision may be left to the device."""
        auto = {"mixed_precision"} if self.mixed_precision == "auto" else set()
        return {name: value for name, value in super().identity().items() if name not in auto}

    def rate(self, step: int) -> float:
        """The share of the peak rate: a warm-up, then a cosine to zero."""
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / self.max_steps)
        return min((step + 1) / max(self.warmup_steps, 1), 1.0) * cosine


@dataclass
class PretrainingConfig(GradientConfig):
    """How a backbone is trained.

    What is None has a default for new backbones and one for given ones.
    """

    optimizer: Literal["muon", "adamw"] | None = None
    """muon (of hidden matrices, scaled to AdamW's step) or adamw. Default: muon for a new one."""
    weight_decay: Positive | None = None
    """On matrices."""
    decay_fraction: Share = 0.4
    """Share of the steps, at the end, in which the rate falls linearly to zero."""
    tokens_per_batch: Count = 6144
    """Tokens a step, padding included."""
    window_probability: Share = 0.5
    """Share of rows with window noise."""
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"

    def completed(self, backbone: Literal["new", "given"]) -> PretrainingConfig:
        """These settings with the defaults for a kind of backbone."""
        names = ("optimizer", "max_steps", "learning_rate", "weight_decay", "warmup_steps")
        defaults = {
            "new": ("muon", 4600, 2e-3, 0.1, 100),
            "given": ("adamw", 1000, 5e-5, 0.0, 50),
        }[backbone]
        pairs = zip(names, defaults, strict=True)
        return replace(self, **{name: v for name, v in pairs if getattr(self, name) is None})

    def rate(self, step: int) -> float:
        """The share of the peak rate: a warm-up, constant, then a line to zero."""
        decay_steps = max(math.ceil(self.max_steps * self.decay_fraction), 1)
        left = (self.max_steps - step) / decay_steps
        return min((step + 1) / max(self.warmup_steps, 1), left, 1.0)


@dataclass
class CoupledConfig(GradientConfig):
    """The settings of every fit to the coupled likelihood of noised windows."""

    context_learning_rate: Positive = 6e-4
    """The peak rate of the conditioning; `learning_rate` is that of log-potentials."""
    windows_per_batch: Count = 64
    """Windows of a batch, over all processes."""
    windows_per_chunk: Count = 32
    """Windows that a process computes at once."""
    evidence_temperature: Annotated[float, Range(1e-6, 1e6)] | None = None
    """Divides the backbone's logits; becomes the head's. Default: the head's."""
    num_validation_draws: Count = 4
    """How often each validation example is drawn, each time with another window and other noise."""

    def at_temperature_of(self, head: CoDDHead | None) -> Self:
        """These settings with the head's evidence temperature, if they have none."""
        if self.evidence_temperature is not None:
            return self
        temperature = 1.0 if head is None else head.config.evidence_temperature
        return replace(self, evidence_temperature=temperature)


@dataclass
class ConditionalConfig(CoupledConfig):
    """How a head is fitted to a frozen backbone."""

    max_steps: Count | None = None
    """Optimiser steps. Default: each window is read 3.2 times, in 200 to 2,000 steps."""
    learning_rate: Positive = 3e-3
    warmup_steps: Natural = 50
    emission_power: Positive = 0.8
    """Emissions of the generative fit are flattened to this power at the start; 1: not."""
    transition_power: Positive = 0.9
    """Likewise the transitions."""
    num_draws: Count = 4
    """How often each example is drawn, each time with another window and other noise."""
    cache_size: Count = 512
    """Likeliest tokens kept of a prediction; all if the vocabulary has no more."""
    evidence_dir: str | None = None
    """Where it is kept. Default: evidence in the output folder."""
    tokens_per_batch: Count = 8192
    """Tokens that the backbone reads at once."""
    keep: Literal["last", "best"] = "last"
    """last: the head of the last step. best: that of the validation with the largest gain."""

    def with_steps(self, num_windows: int) -> ConditionalConfig:
        """These settings with the number of steps for so many windows, if it is not set."""
        steps = round(3.2 * num_windows / self.windows_per_batch)
        return replace(self, max_steps=self.max_steps or min(max(steps, 200), 2000))


@dataclass
class JointConfig(CoupledConfig):
    """How a backbone and its head are trained together."""

    max_steps: Count = 300
    learning_rate: Positive = 5e-4
    context_learning_rate: Positive = 2e-4
    backbone_learning_rate: Positive | None = None
    """The peak rate of the backbone. Default: 5e-4 with LoRA, 5e-5 in full."""
    warmup_steps: Natural = 30
    windows_per_batch: Count = 32
    windows_per_chunk: Count = 16
    evaluation_steps: Count = 100
    checkpointing_steps: Count = 50
    num_validation_draws: Count = 2
    backbone: Literal["lora", "full", "frozen"] = "lora"
    """What of it is trained: lora (a low-rank adapter, by PEFT), full, or frozen (nothing)."""
    lora_rank: Count = 16
    """Of a new adapter; one that the backbone has already is trained further."""
    lora_alpha: Positive = 32.0
    """An adapter's output is scaled by `lora_alpha / lora_rank`."""
    lora_dropout: Annotated[float, Range(0, math.nextafter(1, 0))] = 0.0
    """Share of an adapter's inputs that is dropped."""
    lora_target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    """Names of the layers that get an adapter; all-linear: every linear one but the output's."""
    gradient_checkpointing: bool = False
    """Compute the backbone's activations twice instead of keeping them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.backbone_learning_rate is None:
            self.backbone_learning_rate = 5e-4 if self.backbone == "lora" else 5e-5

    def lora_config(self) -> LoraConfig:
        """PEFT's options of a new adapter."""
        from peft import LoraConfig

        modules = self.lora_target_modules
        return LoraConfig(
            r=self.lora_rank,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules="all-linear" if modules == ["all-linear"] else modules,
        )
