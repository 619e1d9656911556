"""The settings of the joint fit of a backbone and its head."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..checks.arguments import LARGEST_FACTOR, check_numbers, choice

if TYPE_CHECKING:
    from peft import LoraConfig

LOSSES = ("elbo", "token")
PRECISIONS = ("auto", "no", "bf16")
BACKBONE_RATES = {"lora": 5e-4, "full": 5e-5, "frozen": 0.0}
"""Default peaks of the backbone's learning rate."""


@dataclass
class JointConfig:
    """How a backbone and its head are trained together.

    Attributes:
        backbone: what of it is trained: `"lora"` (a low-rank adapter, by PEFT), `"full"` (all of
            it) or `"frozen"` (nothing: the head alone, to compare with).
        lora_rank: rank of a new adapter; one that the backbone has already is trained further.
        lora_alpha: an adapter's output is scaled by `lora_alpha / lora_rank`.
        lora_dropout: share of an adapter's inputs that is dropped.
        lora_target_modules: names of the layers that get an adapter; `all-linear` for every linear
            layer but the output embedding.
        max_steps: optimiser steps.
        windows_per_batch: windows of a batch, over all processes.
        gradient_accumulation_steps: batches whose gradients make one step.
        windows_per_chunk: windows that a process computes at once; gradients of chunks are summed
            in float64, so that a step is the same whatever the number of processes.
        gradient_checkpointing: compute the backbone's activations twice instead of keeping them.
        backbone_learning_rate: AdamW's peak on the backbone (no weight decay); falls to zero as a
            cosine. Default, 5e-4 with LoRA and 5e-5 in full.
        learning_rate: likewise on log-potentials.
        context_learning_rate: likewise on the conditioning.
        warmup_steps: linear warm-up.
        evidence_temperature: the temperature `tau` of the backbone's predictions.
        loss: `"elbo"`, each window weighted by `1/t`, over its length; or `"token"`, nats summed
            over masked tokens over their number.
        num_validation_draws: how often each validation example is drawn, with another window and
            other noise.
        mean_span_length: mean length of the spans that are masked together; 1: each token alone.
        max_extra_windows: canvases end with up to this many windows of end-of-text.
        mixed_precision: `"no"`, `"bf16"` or `"auto"` (bf16 where the device has its arithmetic),
            for the backbone; the circuit stays in float32.
        evaluation_steps: steps between validations.
        checkpointing_steps: steps between checkpoints.
        seed: seed of order, noise, dropout and the adapter's start.
    """

    backbone: str = "lora"
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    lora_target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    max_steps: int = 300
    windows_per_batch: int = 32
    gradient_accumulation_steps: int = 1
    windows_per_chunk: int = 16
    gradient_checkpointing: bool = False
    backbone_learning_rate: float | None = None
    learning_rate: float = 5e-4
    context_learning_rate: float = 2e-4
    warmup_steps: int = 30
    evidence_temperature: float = 1.0
    loss: str = "elbo"
    num_validation_draws: int = 2
    mean_span_length: float = 1.0
    max_extra_windows: int = 1
    mixed_precision: str = "no"
    evaluation_steps: int = 100
    checkpointing_steps: int = 50
    seed: int = 0

    def __post_init__(self):
        check_numbers(
            self,
            most={"evidence_temperature": LARGEST_FACTOR},
            evidence_temperature=1 / LARGEST_FACTOR,
            warmup_steps=0,
            max_extra_windows=0,
            mean_span_length=1,
            seed=0,
        )
        choice("backbone", self.backbone, tuple(BACKBONE_RATES))
        choice("loss", self.loss, LOSSES)
        choice("mixed_precision", self.mixed_precision, PRECISIONS)
        if self.lora_dropout >= 1:
            raise ValueError(f"`lora_dropout` must be below 1, got {self.lora_dropout}.")
        if self.backbone_learning_rate is None:
            self.backbone_learning_rate = BACKBONE_RATES[self.backbone]

    def lora_config(self) -> LoraConfig:
        """The options of a new adapter, for PEFT."""
        from peft import LoraConfig

        modules = self.lora_target_modules
        return LoraConfig(
            r=self.lora_rank,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules="all-linear" if modules == ["all-linear"] else modules,
        )
