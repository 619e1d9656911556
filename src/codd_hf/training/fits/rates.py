"""Learning rates of a head's parameters, for every stage that trains one."""

from __future__ import annotations

from typing import Any

import torch

from ...modeling_head import CoDDHead
from ..joint_settings import JointConfig
from ..settings import ConditionalConfig


def head_groups(head: CoDDHead, config: ConditionalConfig | JointConfig) -> list[dict[str, Any]]:
    """Groups of an optimiser: the circuit and, if there is one, the conditioning.

    The `peak` of a group is the learning rate that a schedule scales.
    """
    circuit = [p for n, p in head.named_parameters() if not n.startswith("context_maps.")]
    # Gradients of a low-rank term that is still a no-op are tiny: hence the tiny `eps`.
    groups = [{"params": circuit, "peak": config.learning_rate, "eps": 1e-15}]
    if head.context_maps is not None:
        context = list(head.context_maps.parameters())
        groups.append({"params": context, "peak": config.context_learning_rate, "eps": 1e-15})
    return groups


def warmup_then_cosine(step: int, warmup_steps: int, max_steps: int) -> float:
    """A schedule's factor in `[0, 1]`: a linear warm-up, then a cosine to zero."""
    progress = torch.tensor(step / max_steps * torch.pi)
    return min((step + 1) / max(warmup_steps, 1), 1.0) * (0.5 + 0.5 * progress.cos().item())
