"""Muon in float32, for devices on which the bf16 of PyTorch's own is emulated."""

from __future__ import annotations

import math
from typing import Any

import torch


class FloatMuon(torch.optim.Muon):
    """`torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`, of which every product is in float32.

    The arguments, the state and, but for rounding, the steps are those of PyTorch's, which
    orthogonalises in bf16 whatever the device.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no caller has one
        """Makes one step."""
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                gradient, state = parameter.grad, self.state[parameter]
                momentum = state.setdefault("momentum_buffer", torch.zeros_like(gradient))
                momentum.lerp_(gradient, 1 - group["momentum"])
                update = orthogonal(gradient.lerp(momentum, group["momentum"]).float(), group)
                rate = 0.2 * math.sqrt(max(parameter.shape)) * group["lr"]
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.to(parameter.dtype), alpha=-rate)


def orthogonal(matrix: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
    """`U S' V^T` of `U S V^T`, with `S'` near the identity, by Newton and Schulz's iteration."""
    a, b, c = group["ns_coefficients"]
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
