"""A frozen backbone whose weights are shared among processes (FSDP2) while it runs over the data.

The head is small and stays whole on every process, and so does what it is bound to: of a decoder
the output embedding, which is called apart from the layers. Every pass is a joint action of all
processes, each on its own tokens, so all must make as many passes.
"""

from __future__ import annotations

from collections.abc import Iterator

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from ...backbones.decoder import DecoderFamily
from ...modeling_codd import CoDDModel


def wants_shards(accelerator: Accelerator) -> bool:
    """Whether Accelerate was configured for FSDP (which it is not on CPUs)."""
    return accelerator.distributed_type == DistributedType.FSDP


def shard_backbone(model: CoDDModel) -> None:
    """Shards `model.backbone` in place: each layer, then what is left of it.

    Every process calls it with the whole model, which may still be on the CPU: layers move to the
    process's device one by one. The backbone is frozen by it; load it anew to use it without the
    other processes.

    Raises:
        ValueError: there is one process alone.
    """
    accelerator = Accelerator()
    if accelerator.num_processes == 1:
        raise ValueError(
            "`shard_backbone` needs several processes: start with `torchrun` or "
            "`accelerate launch`, or leave it out."
        )
    device, backbone, head = accelerator.device, model.backbone, model.coupling_head
    backbone.requires_grad_(False)
    root = backbone
    if isinstance(model.family, DecoderFamily):
        root = backbone.get_decoder()
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
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _layers(child)
