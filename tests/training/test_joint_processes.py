"""Promises of the joint fit over processes."""

from __future__ import annotations

from pathlib import Path

import processes
import pytest
import torch
from fitting import new_model
from safetensors.torch import load_file

import launch
from codd_hf.data.tokenizers import train_tokenizer
from codd_hf.training import Checkpoints, JointConfig, fit_joint
from tiny import SENTENCES, correlated_examples


def joint(folder: Path, backbone: str) -> None:
    """A joint fit; writes what was trained and the losses of its steps."""
    config = JointConfig(
        backbone=backbone,
        max_steps=6,
        windows_per_batch=10,
        windows_per_chunk=4,
        backbone_learning_rate=0.01,
        learning_rate=0.05,
        warmup_steps=2,
        num_validation_draws=2,
        evaluation_steps=3,
        checkpointing_steps=2,
    )
    tokenizer = train_tokenizer(SENTENCES, vocab_size=300)
    model = new_model(tokenizer, ("latent", "copy"), {"attention_dropout": 0.2})
    losses = []
    history = fit_joint(
        model,
        tokenizer,
        correlated_examples(23),
        correlated_examples(35, seed=1),
        config,
        Checkpoints(folder / "joint"),
        lambda _, values: losses.append(values["loss"]),
    )
    curves = {
        "losses": torch.tensor(losses),
        "validation": torch.tensor([entry["coupled_nats"] for entry in history]),
    }
    tensors = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    processes.main_process_saves(tensors | curves, folder / "joint.safetensors")


@pytest.mark.parametrize("backbone", ["lora", "full"])
def test_two_processes_have_the_curve_of_one(tmp_path, backbone):
    results = []
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        launch.run(joint, folder, backbone, processes=number)
        results.append(load_file(folder / "joint.safetensors"))
    alone, together = results
    assert len(alone["losses"]) == 6
    assert alone["validation"][-1] < alone["validation"][0] - 0.01
    assert alone.keys() == together.keys()
    for name, tensor in alone.items():
        assert torch.allclose(together[name], tensor, rtol=0, atol=1e-4), name
