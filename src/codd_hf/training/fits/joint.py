"""The fit of a backbone and its head together (CoDD, arXiv 2603.00045, Eq. 7 with phi trainable).

The loss is the coupled conditional likelihood `-log p(x_M | x_O)` of noised windows, of which
`sum_M log phi_i(x_i)` now depends on what is trained, as does `log p_w(x) - log Z`. The backbone
runs at every step, on windows and noise that are a function of the step alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...backbones import family_of
from ...coupling.adapters import active_adapter, add_adapter
from ...coupling.heads import DEFAULT_NAME
from ...data.canvases import TokenizedExample
from ...data.fingerprint import identity_of, weights_fingerprint
from ...modeling_codd import CoDDModel
from ..checkpoints import Checkpoints
from ..loop import Figures, History, Log, announced_precision, seeded
from ..settings import JointConfig
from ..windows import CoupledFit, NoisedCanvases, WindowScores, window_scores


def fit_joint(
    model: CoDDModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[TokenizedExample],
    validation: Sequence[TokenizedExample],
    config: JointConfig | None = None,
    checkpoints: Checkpoints | None = None,
    log: Log | None = None,
) -> History:
    """Trains a backbone, or a LoRA on it, and its head, best a fitted one, in place.

    A fit that goes on is given the model as it was at the start. The history has `factorized_nats`
    and `coupled_nats` (per masked token), and `gain`, their difference, all and by mask ratio.
    """
    config = config or JointConfig()
    fit = _JointFit(model, tokenizer, train, validation, config)
    if config.gradient_checkpointing:
        _switch_recomputing(model.backbone, "enable", {"use_reentrant": False})
    history = fit.run(checkpoints, log)
    if config.gradient_checkpointing:
        _switch_recomputing(model.backbone, "disable")
    model.eval()
    return history


def _switch_recomputing(backbone: PreTrainedModel, switch: str, *how: dict[str, bool]) -> None:
    """By transformers' method, which newer releases call `activation_...`."""
    newer = getattr(backbone, f"activation_checkpointing_{switch}", None)
    (newer or getattr(backbone, f"gradient_checkpointing_{switch}"))(*how)


@dataclass
class _JointFit(CoupledFit):
    """Steps of a model on windows that its backbone reads anew."""

    config: JointConfig
    name = "joint fit"

    def __post_init__(self) -> None:
        super().__post_init__()
        model, config = self.model, self.config
        self.lengths = torch.tensor([example.length() for example in self.train])
        announced_precision(config)
        data = {"data": self.train, "validation_data": self.validation}
        identity = identity_of(model, self.tokenizer, **data)
        identity["start"] = weights_fingerprint(self.head.state_dict())
        model.backbone.requires_grad_(config.backbone == "full")
        if config.backbone == "lora":
            found, rank = active_adapter(model), config.lora_rank
            if found is None:
                layers = family_of(model.backbone.config).lora_targets(model.backbone)
                lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers)
                add_lora(model.backbone, lora, DEFAULT_NAME, config.seed)
            model.set_adapter(found or DEFAULT_NAME)
        backbone = [p for p in model.backbone.parameters() if p.requires_grad]
        rate = config.backbone_learning_rate
        optimizer = self.optimizer({"params": backbone, "peak": rate, "eps": 1e-8})
        self.set_up(identity, model, [optimizer], [[*self.head.parameters()], backbone])

    def chunks(self, number: int) -> Sequence[torch.Tensor]:
        self.model.backbone.train(self.config.backbone != "frozen")
        rows = self.rows_of_step(len(self.train), number)
        return rows[self.lengths[rows].argsort(stable=True)].split(self.config.windows_per_chunk)

    def scores(self, rows: torch.Tensor, seed: int) -> WindowScores:
        part = [self.train[row] for row in rows.tolist()]
        return NoisedCanvases(self.model, self.tokenizer, part, self.config, seed).scores()

    def measure(self) -> Figures:
        draws = self.config.num_validation_draws
        place = (self.model, self.tokenizer, self.validation, self.config, draws)
        return window_scores(*place).summary()


def add_lora(backbone: PreTrainedModel, lora: LoraConfig, name: str, seed: int) -> None:
    """Adds an adapter that changes nothing yet and is all of the backbone that is trained.

    Its random half is drawn with `seed`; torch's generators are left as they were.
    """
    backbone.requires_grad_(False)
    with seeded(seed, torch.device("cpu")):
        add_adapter(backbone, lora, name)
