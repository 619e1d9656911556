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

from ...coupling.adapters import active_adapter, set_adapter
from ...coupling.heads import DEFAULT_NAME
from ...data.canvases import TokenizedExample
from ...modeling_codd import CoDDModel
from ...runtime.precision import chosen_precision, precision_note
from ..evidence.fingerprint import fit_identity, model_fingerprint
from ..evidence.live_windows import LiveWindows, window_scores
from ..evidence.scores import WindowScores
from ..loop.checkpoints import Checkpoints
from ..loop.steps import Figures, History, run_steps
from ..loop.trackers import Log
from ..stage_settings import JointConfig
from .coupled import CoupledFit, adamw, head_groups, rows_of_step
from .lora import add_lora, trained_in_float32


class JointFit(CoupledFit):
    """Steps of a backbone and its head."""

    config: JointConfig

    def __init__(
        self,
        model: CoDDModel,
        tokenizer: PreTrainedTokenizerBase,
        train: Sequence[TokenizedExample],
        validation: Sequence[TokenizedExample],
        config: JointConfig,
    ):
        self.model, self.tokenizer, self.train, self.validation = (
            model,
            tokenizer,
            train,
            validation,
        )
        self.window_length = model.window_length
        self.lengths = torch.tensor([len(e.prompt_ids) + len(e.answer_ids) for e in train])
        identity = fit_identity(model_fingerprint(model, tokenizer), train, validation)
        head = model.coupling_head
        head.config.evidence_temperature = config.evidence_temperature
        backbone = _trained_backbone(model, config)
        head.requires_grad_(True)
        groups = head_groups(head, config)
        if backbone:
            peak = config.backbone_learning_rate
            groups.append({"params": backbone, "peak": peak, "eps": 1e-8})
        trained = {f"model.{name}": p for name, p in model.named_parameters() if p.requires_grad}
        clipped = [list(head.parameters()), backbone]
        super().__init__("joint fit", config, identity, trained, [adamw(groups)], clipped)

    def chunks(self, step: int) -> Sequence[torch.Tensor]:
        """The examples of a step in chunks of like length."""
        config = self.config
        size = config.windows_per_batch * config.gradient_accumulation_steps
        rows = rows_of_step(len(self.train), size, step, config.seed)
        return rows[self.lengths[rows].argsort(stable=True)].split(config.windows_per_chunk)

    def windows(self, step: int, number: int, rows: torch.Tensor) -> LiveWindows:
        """A window of each example."""
        self.model.backbone.train(self.config.backbone != "frozen")
        examples = [self.train[row] for row in rows.tolist()]
        seed = self.noise_seed(step) + number
        return LiveWindows.drawn(examples, self.tokenizer, self.window_length, self.config, seed)

    def score(self, windows: LiveWindows) -> WindowScores:
        """The likelihoods of the model."""
        return windows.scores(self.model, self.config)

    def measure(self) -> Figures:
        """The likelihoods of the validation windows."""
        draws = self.config.num_validation_draws
        scores = window_scores(self.model, self.tokenizer, self.validation, self.config, draws)
        return scores.summary()


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
    to the head: `model.save_pretrained` and `model.save_head` write it beside what they write.

    Args:
        model: a backbone with a head. A fit that goes on is given it as it was at the start.
        tokenizer: its tokenizer.
        train: what both learn from.
        validation: what they are measured on, with fixed noise.
        config: how to train.
        checkpoints: where the fit is kept, and goes on from.
        log: told of every step.

    Returns:
        The validation history: `factorized_nats` and `coupled_nats` (per masked token), and `gain`,
        their difference, all and by mask ratio.

    Raises:
        ValueError: the model has no head; and what `run_steps` raises.
    """
    if model.coupling_head is None:
        raise ValueError("`model` has no head to fit: give `from_backbone` a head configuration.")
    config = (config or JointConfig()).at_temperature_of(model.coupling_head)
    accelerator = Accelerator()
    model.to(accelerator.device)
    if config.mixed_precision != "no" and accelerator.is_main_process:
        precision = chosen_precision(config.mixed_precision, accelerator.device)
        tqdm.write(precision_note(precision, accelerator.device))
    fit = JointFit(model, tokenizer, train, validation, config)
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
        set_adapter(model.backbone, found or DEFAULT_NAME)
    if config.backbone == "full":
        model.backbone.requires_grad_(True)
    return trained_in_float32(model.backbone)
