"""Muon in float32, for devices on which the bf16 of PyTorch's own is emulated."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from ...runtime import precision


def muon(
    matrices: Sequence[torch.nn.Parameter], device: torch.device, lr: float, weight_decay: float
) -> torch.optim.Muon:
    """Muon scaled to AdamW's step, in what the device computes fast.

    Args:
        matrices: what it trains.
        device: where it computes.
        lr: AdamW's learning rate.
        weight_decay: as AdamW's.
    """
    kind = torch.optim.Muon if precision.computes_bf16(device) else FloatMuon
    return kind(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")


class FloatMuon(torch.optim.Muon):
    """`torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`, of which every product is in float32.

    The arguments, the state and, but for rounding, the steps are those of PyTorch's, which
    orthogonalises in bf16 whatever the device.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Makes one step.

        Args:
            closure: computes the loss anew.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient, state = parameter.grad, self.state[parameter]
                if gradient is None:
                    continue
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(gradient)
                momentum = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
                update = gradient.lerp(momentum, group["momentum"])
                if not group["nesterov"]:
                    update = momentum
                update = _orthogonalised(
                    update.float(), group["ns_coefficients"], group["ns_steps"], group["eps"]
                )
                rate = 0.2 * math.sqrt(max(parameter.shape)) * group["lr"]
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.to(parameter.dtype), alpha=-rate)
        return loss


def _orthogonalised(
    matrix: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """`U S' V^T` of `U S V^T`, with `S'` near the identity, by Newton and Schulz's iteration."""
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
