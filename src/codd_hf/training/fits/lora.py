"""What is trained of a backbone that stays the object that it is."""

from __future__ import annotations

import torch
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from ...coupling.adapters import add_adapter


def add_lora(backbone: PreTrainedModel, lora: LoraConfig, name: str, seed: int) -> None:
    """Adds an adapter that changes nothing yet and is all of the backbone that is trained.

    Its random half is drawn with `seed`; torch's generators are left as they were.

    Raises:
        ValueError: the backbone has no layer of the names that `lora` wants.
    """
    backbone.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        add_adapter(backbone, lora, name)


def trained_in_float32(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that require gradients, made float32: finer steps are lost in bfloat16."""
    trained = [p for p in module.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    return trained
