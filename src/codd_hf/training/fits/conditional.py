"""The fit of a head to the predictions of a frozen backbone, which are kept (`evidence`).

Only `log p_w(x) - log Z` depends on the circuit; its gradient is counts under the data minus counts
under the coupled model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedTokenizerBase

from ...data.canvases import TokenizedExample
from ...data.fingerprint import weights_fingerprint
from ...modeling_codd import CoDDModel
from ...modeling_head import CoDDHead
from ..checkpoints import Checkpoints, identity_of
from ..evidence import Evidence
from ..loop import Figures, History, Log, announced_precision
from ..settings import ConditionalConfig
from ..windows import WindowScores
from .coupled import CoupledFit, head_optimizer, rows_of_step, trainable_head

OF_THE_HEAD = ("num_latents", "emission", "emission_rank", "conditioning", "noise_conditioning")
"""Settings of the head to fit, which a run is continued with."""
VALIDATION_SEED = 1234


def fit_conditional(
    model: CoDDModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[TokenizedExample],
    validation: Sequence[TokenizedExample],
    config: ConditionalConfig | None = None,
    checkpoints: Checkpoints | None = None,
    log: Log | None = None,
) -> History:
    """Trains `model.coupling_head`, best that of the generative fit, in place.

    The frozen backbone runs over the data first, unless all steps were made already; its evidence
    is kept in `evidence` beside the folder of the checkpoints, and in memory if there is none. The
    history has the `gain`: nats per masked token over factorized prediction, all and by mask ratio.
    """
    config = (config or ConditionalConfig()).with_steps(len(train))
    config = replace(config, mixed_precision=announced_precision(config))  # type: ignore[arg-type]
    head, backbone = trainable_head(model.eval(), config), identity_of(model, tokenizer)
    folder = None if checkpoints is None else checkpoints.folder.parent / "evidence"

    def evidence(part: Sequence[TokenizedExample], draws: int, seed: int) -> Evidence:
        return Evidence(model, tokenizer, part, config, backbone, folder, draws, seed)

    of_train = evidence(train, config.num_draws, config.seed)
    of_validation = evidence(validation, config.num_validation_draws, VALIDATION_SEED)
    return _HeadFit(head, of_train, of_validation, config).run(checkpoints, log)


@dataclass
class _HeadFit(CoupledFit):
    """Steps of a head on evidence."""

    head: CoDDHead
    train: Evidence
    validation: Evidence
    config: ConditionalConfig
    name = "conditional fit"

    def __post_init__(self) -> None:
        head, self.window_length = self.head, self.head.config.window_length
        identity = {name: getattr(head.config, name) for name in OF_THE_HEAD}
        identity |= self.train.identity
        identity["validation_data"] = self.validation.identity["data"]
        identity["start"] = weights_fingerprint(head)
        trained = {f"head.{name}": p for name, p in head.named_parameters()}
        self.set_up(identity, trained, [head_optimizer(head, self.config)])

    def chunks(self, number: int) -> Sequence[torch.Tensor]:
        config = self.config
        rows = rows_of_step(len(self.train), config.windows_per_batch, number, config.seed)
        return [chunk.sort().values for chunk in rows.split(config.windows_per_chunk)]

    def scores(self, rows: torch.Tensor, seed: int) -> WindowScores:
        return self.train.scores(self.head, rows)

    def measure(self) -> Figures:
        return self.validation.evaluate(self.head)
