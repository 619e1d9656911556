"""Several processes: how they begin, and what they share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from ..backbones import DecoderFamily
from ..modeling_codd import CoDDModel

Chunk = TypeVar("Chunk")
PATIENCE = timedelta(weeks=1)
"""How long a process waits for another, which may train a backbone or write evidence meanwhile;
when one dies, the launcher ends the others."""


def join_processes() -> Accelerator:
    """Joins this process with the others of its launch, on CPUs where there is nothing better."""
    several = "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and not torch.accelerator.is_available():
        # Told through the environment, so that each stage's own `Accelerator()` knows it as well.
        os.environ["ACCELERATE_USE_CPU"] = "true"
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])
    if several and accelerator.num_processes == 1:
        raise ValueError(
            f"Several processes were started, and Accelerate joins none on {accelerator.device}: "
            "set ACCELERATE_USE_CPU=true, or start one."
        )
    return accelerator


def shard_backbone(model: CoDDModel) -> None:
    """Shares the weights of `model.backbone`, which it freezes, among the processes (FSDP2).

    Every pass is then a joint action of all processes. The head stays whole, and so does what it is
    bound to: of a decoder the output embedding.
    """
    accelerator, root, head = Accelerator(), model.backbone, model.coupling_head
    if accelerator.num_processes == 1:
        raise ValueError(
            "`shard_backbone` needs several processes: start with `torchrun` or "
            "`accelerate launch`, or leave it out."
        )
    device = accelerator.device
    root.requires_grad_(False)
    if isinstance(model.family, DecoderFamily):
        root = root.get_decoder()
    elif head is not None and head.config.emission == "tied":
        head.bind(model.get_output_embeddings().weight.detach().to(device, copy=True))
    mesh = init_device_mesh(device.type, (accelerator.num_processes,))
    for module in (*_layers(root), root):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    model.to(device)


def is_sharded(model: CoDDModel) -> bool:
    """Whether `shard_backbone` was called on it."""
    return any(isinstance(module, FSDPModule) for module in model.backbone.modules())


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost lists of layers; what a layer itself lists (experts) may not run everywhere."""
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else _layers(child)


def summed(
    shapes: Sequence[torch.Size],
    chunks: Sequence[Chunk],
    values: Callable[[int, Chunk], Sequence[torch.Tensor]],
) -> list[torch.Tensor]:
    """Sums, of these shapes, of the `values` of all chunks, which the processes share.

    In float64 (where the device has it), so that they do not depend on who computed what.
    """
    accelerator = Accelerator()
    device = accelerator.device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    sums = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
    for number in range(accelerator.process_index, len(chunks), accelerator.num_processes):
        for total, term in zip(sums, values(number, chunks[number]), strict=True):
            total += term.detach().to(device)
    return accelerator.reduce(sums, "sum")
