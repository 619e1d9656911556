"""The fit of a head to the predictions of a frozen backbone.

The backbone runs over the data first, and its predictions are kept (`evidence.cache`). After that
it is not needed. Only `log p_w(x) - log Z` depends on the circuit; its gradient is counts under the
data minus counts under the coupled model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
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
from ..evidence.fingerprint import fit_identity, model_fingerprint
from ..evidence.noised_windows import NoisedWindows
from ..evidence.scores import WindowScores, score_all
from ..loop.checkpoints import Checkpoints, read_checkpoint
from ..loop.steps import Figures, History, run_steps
from ..loop.trackers import Log
from ..stage_settings import ConditionalConfig
from .coupled import CoupledFit, adamw, head_groups, rows_of_step

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

VALIDATION_SEED = 1234


def evaluate_head(head: CoDDHead, cache: WindowCache, batch_size: int = 64) -> dict[str, float]:
    """Mean gain in nats per masked token over factorized, all and by mask ratio.

    Several processes share the windows, and all get the result.
    """
    chunks = torch.arange(len(cache)).split(batch_size)
    return score_all(chunks, lambda _, rows: cache.scores(head, rows), head.device).gains()


class ConditionalFit(CoupledFit):
    """Steps of a head on evidence that is made when it is known to be needed."""

    config: ConditionalConfig

    def __init__(
        self,
        head: CoDDHead,
        evidence: Callable[[], tuple[WindowCache, WindowCache]],
        num_windows: int,
        config: ConditionalConfig,
        identity: dict[str, Any],
    ):
        self.head, self._evidence, self.num_windows = head, evidence, num_windows
        self.window_length = head.config.window_length
        head.config.evidence_temperature = config.evidence_temperature
        head.to(Accelerator().device).requires_grad_(True)
        identity = {name: getattr(head.config, name) for name in OF_THE_HEAD} | identity
        trained = {f"head.{name}": parameter for name, parameter in head.named_parameters()}
        optimizers = [adamw(head_groups(head, config))]
        config = config.with_steps(num_windows)
        super().__init__("conditional fit", config, identity, trained, optimizers)

    @cached_property
    def evidence(self) -> tuple[WindowCache, WindowCache]:
        """Of the training and of the validation windows."""
        return self._evidence()

    def chunks(self, step: int) -> Sequence[torch.Tensor]:
        """Windows of a step; shards are read in order."""
        config = self.config
        rows = rows_of_step(self.num_windows, config.windows_per_batch, step, config.seed)
        return [chunk.sort().values for chunk in rows.split(config.windows_per_chunk)]

    def windows(self, step: int, number: int, rows: torch.Tensor) -> NoisedWindows:
        """The evidence of a chunk."""
        return self.evidence[0].take(rows)

    def score(self, windows: NoisedWindows) -> WindowScores:
        """The gains of the head."""
        return windows.scores(self.head, self.config.evidence_temperature)

    def measure(self) -> Figures:
        """The gain on the validation windows."""
        return evaluate_head(self.head, self.evidence[1])

    def kept(self, history: History) -> list[int]:
        """The best step's checkpoint, if its head is to be taken."""
        return [best(history)["step"]] if self.config.keep == "best" else []


def best(history: History) -> Figures:
    """The entry with the largest validation gain, the first of equals."""
    return max(history, key=lambda entry: entry["gain"])


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
    becomes the head's.

    Args:
        model: a backbone with a head, best from the generative fit.
        tokenizer: its tokenizer.
        train: what the head learns from.
        validation: what it is measured on, with fixed noise.
        config: how to fit.
        checkpoints: where the fit is kept, and goes on from.
        log: told of every step.

    Returns:
        The validation history, with the `gain`: nats per masked token over factorized prediction,
        all and by mask ratio.

    Raises:
        ValueError: the model has no head, or there is evidence that something else made; and what
            `run_steps` raises.
    """
    head = model.coupling_head
    if head is None:
        raise ValueError("`model` has no head to fit: give `from_backbone` a head configuration.")
    config = (config or ConditionalConfig()).at_temperature_of(head)
    device = Accelerator().device
    config = replace(config, mixed_precision=chosen_precision(config.mixed_precision, device))
    model.to(device).eval().requires_grad_(False)
    folder = config.evidence_dir
    if folder is None and checkpoints is not None:
        folder = checkpoints.folder.parent / "evidence"
    made_by = model_fingerprint(model, tokenizer)

    def kept(name: str, examples: Sequence[TokenizedExample], draws: int, seed: int) -> WindowCache:
        return cache_windows(
            model,
            tokenizer,
            examples,
            config,
            None if folder is None else Path(folder) / name,
            num_draws=draws,
            seed=seed,
            made_by=made_by,
            renew=config.evidence_dir is None and getattr(checkpoints, "resume", "") == "none",
        )

    def evidence() -> tuple[WindowCache, WindowCache]:
        learnt = kept("train", train, config.num_draws, config.seed)
        return learnt, kept("validation", validation, config.num_validation_draws, VALIDATION_SEED)

    identity = fit_identity(made_by, train, validation)
    fit = ConditionalFit(head, evidence, config.num_draws * len(train), config, identity)
    return _run(fit, checkpoints, log)


def fit_head(
    head: CoDDHead,
    train: WindowCache,
    validation: WindowCache,
    config: ConditionalConfig | None = None,
    checkpoints: Checkpoints | None = None,
    log: Log | None = None,
) -> History:
    """`fit_conditional` of a head on evidence alone; no backbone is there.

    Args:
        head: the head, bound to an output embedding if its emissions are tied.
        train: evidence that it learns from.
        validation: evidence that it is measured on.
        config: how to fit; the evidence temperature is that of `train`.
        checkpoints: where the fit is kept, and goes on from.
        log: told of every step.

    Returns:
        As `fit_conditional`.
    """
    config = replace(config or ConditionalConfig(), evidence_temperature=train.temperature)
    identity = {"evidence": [train.identity(), validation.identity()]}
    fit = ConditionalFit(head, lambda: (train, validation), len(train), config, identity)
    return _run(fit, checkpoints, log)


def _run(fit: ConditionalFit, checkpoints: Checkpoints | None, log: Log | None) -> History:
    if checkpoints is None and fit.config.keep == "best":
        raise ValueError("`keep='best'` needs `checkpoints`, where the best head is kept.")
    history = run_steps(fit, checkpoints, log)
    if fit.config.keep == "best":
        kept = [entry for entry in history if entry["step"] in checkpoints.steps()]
        tensors, _ = read_checkpoint(checkpoints.path(best(kept)["step"]))
        fit.restore(tensors)
    return history
