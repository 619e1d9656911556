"""The fit of a backbone and its head together (CoDD, arXiv 2603.00045, Eq. 7 with phi trainable).

The loss is the coupled conditional likelihood `-log p(x_M | x_O)` of noised windows, of which
`sum_M log phi_i(x_i)` now depends on what is trained, as does `log p_w(x) - log Z`. The backbone
runs at every step, on windows and noise that are a function of the step alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...coupling.adapters import active_adapter
from ...coupling.heads import DEFAULT_NAME
from ...data.canvases import TokenizedExample
from ...modeling_codd import CoDDModel
from ...runtime.precision import chosen_precision, precision_note
from ..evidence.live_windows import LiveWindows, window_scores
from ..identity import backbone_identity, data_identity
from ..loop.checkpoints import Checkpoints
from ..loop.gradients import GradientFit
from ..loop.steps import Figures, History, run_steps
from ..loop.trackers import Log
from ..stage_settings import JointConfig
from .coupled import CoupledSteps, head_optimizer, rows_of_step
from .lora import add_lora, trained_in_float32


def fit_joint(
    model: CoDDModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[TokenizedExample],
    validation: Sequence[TokenizedExample],
    config: JointConfig | None = None,
    checkpoints: Checkpoints | None = None,
    log: Log | None = None,
) -> History:
    """Trains a backbone, or a LoRA on it, and its head together, in place.

    The head should come from the conditional fit: a LoRA starts as a no-op and the rates warm up,
    so that training goes on from what is there. What is trained is held in float32. A LoRA belongs
    to the head: `model.save_pretrained` and `model.save_head` write it beside what they write. A
    fit that goes on is given the model as it was at the start.

    Returns:
        The history: `factorized_nats` and `coupled_nats` (per masked token), and `gain`, their
        difference, all and by mask ratio.

    Raises:
        ValueError: the model has no head.
    """
    head, length, device = model.coupling_head, model.window_length, Accelerator().device
    if head is None:
        raise ValueError("`model` has no head to fit: give `from_backbone` a head configuration.")
    config = (config or JointConfig()).at_temperature_of(head)
    head.config.evidence_temperature = config.evidence_temperature
    model.to(device)
    if config.mixed_precision != "no" and Accelerator().is_main_process:
        tqdm.write(precision_note(chosen_precision(config.mixed_precision, device), device))
    identity = data_identity(train, validation)
    identity |= backbone_identity(model.backbone, tokenizer, model.config.mask_token_id)
    backbone = _trained_backbone(model, config)
    head.requires_grad_(True)
    peak = config.backbone_learning_rate
    optimizer = head_optimizer(head, config, {"params": backbone, "peak": peak, "eps": 1e-8})
    trained = {f"model.{name}": p for name, p in model.named_parameters() if p.requires_grad}
    lengths = torch.tensor([example.length() for example in train])

    def chunks(step: int) -> Sequence[torch.Tensor]:
        model.backbone.train(config.backbone != "frozen")
        rows = rows_of_step(len(train), config.windows_per_batch, step, config.seed)
        return rows[lengths[rows].argsort(stable=True)].split(config.windows_per_chunk)

    def windows(rows: torch.Tensor, seed: int) -> LiveWindows:
        part = [train[row] for row in rows.tolist()]
        return LiveWindows.drawn(part, tokenizer, length, config, seed)

    def measure() -> Figures:
        draws = config.num_validation_draws
        return window_scores(model, tokenizer, validation, config, draws).summary()

    parameters = list(trained.values())
    steps = CoupledSteps(
        config, parameters, length, chunks, windows, lambda part: part.scores(model, config)
    )
    fit = GradientFit(
        "joint fit",
        config,
        identity,
        trained,
        [optimizer],
        steps.backward,
        measure,
        steps.blame,
        clipped=[list(head.parameters()), backbone],
    )
    if config.gradient_checkpointing:
        gradient_checkpointing(model.backbone, "enable")({"use_reentrant": False})
    history = run_steps(fit, checkpoints, log)
    if config.gradient_checkpointing:
        gradient_checkpointing(model.backbone, "disable")()
    model.eval()
    return history


def gradient_checkpointing(backbone: PreTrainedModel, switch: str) -> Callable[..., Any]:
    """transformers' method that switches it, which newer releases call `activation_...`."""
    newer = getattr(backbone, f"activation_checkpointing_{switch}", None)
    return newer or getattr(backbone, f"gradient_checkpointing_{switch}")


def _trained_backbone(model: CoDDModel, config: JointConfig) -> list[torch.nn.Parameter]:
    """The parameters of the backbone that are trained."""
    model.requires_grad_(False)
    if config.backbone == "lora":
        found = active_adapter(model)
        if found is None:
            add_lora(model.backbone, config.lora_config(), DEFAULT_NAME, config.seed)
        model.set_adapter(found or DEFAULT_NAME)
    if config.backbone == "full":
        model.backbone.requires_grad_(True)
    return trained_in_float32(model.backbone)
