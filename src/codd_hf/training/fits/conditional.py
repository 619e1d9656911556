"""The fit of a head to the predictions of a frozen backbone.

The backbone runs over the data first, and its predictions are kept (`evidence.cache`). After that
it is not needed. Only `log p_w(x) - log Z` depends on the circuit; its gradient is counts under the
data minus counts under the coupled model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from ...data.canvases import TokenizedExample
from ...modeling_codd import CoDDModel
from ...modeling_head import CoDDHead
from ...runtime.precision import chosen_precision
from ..evidence.cache import WindowCache, cache_windows
from ..evidence.scores import score_all
from ..identity import backbone_identity, data_identity
from ..loop.checkpoints import Checkpoints, read_checkpoint
from ..loop.gradients import GradientFit
from ..loop.steps import Figures, History, run_steps
from ..loop.trackers import Log
from ..stage_settings import ConditionalConfig
from .coupled import CoupledSteps, head_optimizer, rows_of_step

OF_THE_HEAD = (
    "num_latents",
    "window_length",
    "emission",
    "emission_rank",
    "conditioning",
    "noise_conditioning",
    "copy_length",
    "alpha",
)
"""Settings of the head to fit, which a run is continued with."""

EVALUATION_CHUNK = 64
VALIDATION_SEED = 1234


def evaluate_head(head: CoDDHead, windows: WindowCache) -> dict[str, float]:
    """Mean gain in nats per masked token over factorized, all and by mask ratio.

    Several processes share the windows, and all get the result.
    """
    chunks = torch.arange(len(windows)).split(EVALUATION_CHUNK)
    return score_all(chunks, lambda _, rows: windows.scores(head, rows), head.device).gains()


def fit_conditional(
    model: CoDDModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[TokenizedExample],
    validation: Sequence[TokenizedExample],
    config: ConditionalConfig | None = None,
    checkpoints: Checkpoints | None = None,
    log: Log | None = None,
) -> History:
    """Trains `model.coupling_head` in place; the backbone is frozen (and stays so).

    The backbone runs over the data first; its evidence is kept in `config.evidence_dir`, by default
    in `evidence` beside the folder of the checkpoints, and in memory if there is neither. Where all
    steps were made already, it does not run, and the evidence may be gone. The evidence temperature
    becomes the head's. The head is best that of the generative fit.

    Returns:
        The history, with the `gain`: nats per masked token over factorized prediction, all and by
        mask ratio.

    Raises:
        ValueError: the model has no head, or there is evidence that something else made.
    """
    head = model.coupling_head
    if head is None:
        raise ValueError("`model` has no head to fit: give `from_backbone` a head configuration.")
    device = Accelerator().device
    config = (config or ConditionalConfig()).at_temperature_of(head)
    config = replace(config, mixed_precision=chosen_precision(config.mixed_precision, device))
    model.to(device).eval().requires_grad_(False)
    folder = config.evidence_dir
    if folder is None and checkpoints is not None:
        folder = checkpoints.folder.parent / "evidence"
    anew = checkpoints is not None and checkpoints.resume == "none"
    made_by = backbone_identity(model.backbone, tokenizer, model.config.mask_token_id)
    identity = data_identity(train, validation) | made_by

    def evidence() -> list[WindowCache]:
        return [
            cache_windows(
                model,
                tokenizer,
                examples,
                config,
                None if folder is None else Path(folder, name),
                num_draws=draws,
                seed=seed,
                made_by=made_by,
                renew=anew and config.evidence_dir is None,
            )
            for name, examples, draws, seed in (
                ("train", train, config.num_draws, config.seed),
                ("validation", validation, config.num_validation_draws, VALIDATION_SEED),
            )
        ]

    number = config.num_draws * len(train)
    return _fit(head, evidence, number, config, identity, checkpoints, log)


def fit_head(
    head: CoDDHead,
    train: WindowCache,
    validation: WindowCache,
    config: ConditionalConfig | None = None,
    checkpoints: Checkpoints | None = None,
    log: Log | None = None,
) -> History:
    """`fit_conditional` on evidence alone, whose temperature becomes the head's.

    No backbone is there; a head with tied emissions is bound to its output embedding.
    """
    config = replace(config or ConditionalConfig(), evidence_temperature=train.temperature)
    identity = {"evidence": [train.identity(), validation.identity()]}
    caches = [train, validation]
    return _fit(head, lambda: caches, len(train), config, identity, checkpoints, log)


def _best(history: History) -> Figures:
    """The entry with the largest validation gain, the first of equals."""
    return max(history, key=lambda entry: entry["gain"])


def _fit(
    head: CoDDHead,
    evidence: Callable[[], list[WindowCache]],
    num_windows: int,
    config: ConditionalConfig,
    identity: dict[str, Any],
    checkpoints: Checkpoints | None,
    log: Log | None,
) -> History:
    """Fits a head on evidence that is made when it is known to be needed."""
    if config.keep == "best" and checkpoints is None:
        raise ValueError("`keep='best'` needs `checkpoints`, where the best head is kept.")
    config, evidence = config.with_steps(num_windows), cache(evidence)
    temperature = head.config.evidence_temperature = config.evidence_temperature
    head.to(Accelerator().device).requires_grad_(True)
    identity = {name: getattr(head.config, name) for name in OF_THE_HEAD} | identity
    trained = {f"head.{name}": parameter for name, parameter in head.named_parameters()}

    def chunks(step: int) -> list[torch.Tensor]:
        rows = rows_of_step(num_windows, config.windows_per_batch, step, config.seed)
        return [chunk.sort().values for chunk in rows.split(config.windows_per_chunk)]

    steps = CoupledSteps(
        config,
        list(trained.values()),
        head.config.window_length,
        chunks,
        lambda rows, _: evidence()[0].take(rows),
        lambda windows: windows.scores(head, temperature),
    )
    fit = GradientFit(
        "conditional fit",
        config,
        identity,
        trained,
        [head_optimizer(head, config)],
        steps.backward,
        lambda: evaluate_head(head, evidence()[1]),
        steps.blame,
        kept=lambda history: [_best(history)["step"]] if config.keep == "best" else [],
    )
    history = run_steps(fit, checkpoints, log)
    if config.keep == "best":
        steps_kept = checkpoints.steps()
        step = _best([entry for entry in history if entry["step"] in steps_kept])["step"]
        fit.restore(read_checkpoint(checkpoints.path(step))[0])
    return history
