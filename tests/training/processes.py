"""Runs of training, as functions that processes of their own run."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from fitting import new_model
from hmm_cases import random_hmm, sample_windows
from safetensors.torch import save_file

from codd_hf.cli import main
from codd_hf.data.tokenizers import train_tokenizer
from codd_hf.training import (
    Checkpoints,
    ConditionalConfig,
    GenerativeConfig,
    TrainConfig,
    fit_conditional,
    fit_generative,
    train,
)
from tiny import SENTENCES, correlated_examples


def main_process_saves(tensors: dict[str, torch.Tensor], path: Path) -> None:
    if os.environ.get("RANK", "0") == "0":
        save_file(tensors, path)


def checkpoints(folder: Path | None, stage: str) -> Checkpoints | None:
    return None if folder is None else Checkpoints(folder / stage)


def em(folder: Path, kept_in: Path | None, epochs: int) -> None:
    """An EM run; writes its parameters, and the log-likelihoods of its steps."""
    windows = sample_windows(random_hmm(4, 24, 2.0), 120, 6)
    embeddings = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
    config = GenerativeConfig(
        num_epochs=epochs,
        windows_per_batch=40,
        windows_per_chunk=8,
        checkpointing_steps=1,
    )
    scores = []

    def log(_: int, values: dict[str, float]) -> None:
        scores.append(values["loss"])

    kept = checkpoints(kept_in, "generative")
    parts = (windows[:100], windows[100:], embeddings, 4, config)
    potentials, _ = fit_generative(*parts, kept, log)
    leaves = {str(i): leaf.exp() for i, leaf in enumerate(potentials.leaves())}
    scores = torch.tensor(scores, dtype=torch.float64)
    main_process_saves(leaves | {"scores": scores}, folder / "em.safetensors")


def conditional(folder: Path, kept_in: Path | None, stop_at: int = 0) -> None:
    """A conditional fit; writes the head and the losses of its steps, unless it is to stop."""
    config = ConditionalConfig(
        max_steps=12,
        tokens_per_batch=128,
        windows_per_batch=10,
        windows_per_chunk=4,
        learning_rate=0.1,
        context_learning_rate=0.02,
        warmup_steps=2,
        num_draws=2,
        num_validation_draws=1,
        evaluation_steps=4,
        checkpointing_steps=1,
    )
    tokenizer = train_tokenizer(SENTENCES, vocab_size=300)
    model = new_model(tokenizer, ("latent", "copy"))
    losses, gains = [], []

    def log(step: int, values: dict[str, float]) -> None:
        if step == stop_at:
            os._exit(0)
        losses.append(values["loss"])
        gains.append(values["gain"])

    history = fit_conditional(
        model,
        tokenizer,
        correlated_examples(41),
        correlated_examples(13, seed=1),
        config,
        checkpoints(kept_in, "conditional"),
        log,
    )
    curves = {
        "losses": torch.tensor(losses),
        "gains": torch.tensor(gains),
        "validation": torch.tensor([entry["gain"] for entry in history]),
    }
    tensors = {k: v.detach() for k, v in model.coupling_head.named_parameters()}
    main_process_saves(tensors | curves, folder / "conditional.safetensors")


def whole_run(folder: Path) -> None:
    """EM, the evidence and the conditional fit, each continued from where it stopped."""
    em(folder, folder, 4)
    conditional(folder, folder)
    (folder / "done").touch()


def whole_training(config: TrainConfig) -> None:
    """All stages of a run."""
    train(config)


def command(arguments: list[str]) -> None:
    """The console command."""
    if main(["train", *arguments]) != 0:
        raise SystemExit(1)
