"""Expected counts of a batch of windows, by chunks and over processes."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from ...circuits import Potentials
from ...circuits.em import Counts, expected_counts
from ...circuits.potentials.transitions import StepTransitions
from ...circuits.recursions.chain import Chain
from ...circuits.recursions.queries import forward_filter


def summing_dtype(device: torch.device) -> torch.dtype:
    """float64; float32 on Apple's GPUs, which have nothing finer."""
    return torch.float32 if device.type == "mps" else torch.float64


def batch_counts(
    potentials: Potentials, windows: torch.Tensor, chunk_size: int, accelerator: Accelerator
) -> tuple[Counts, float]:
    """E-step over a batch that all processes share.

    Each process counts some chunks of the batch; chunks are summed in float64, within a process and
    over processes, so that the counts do not depend on who counted what.

    Args:
        potentials: the circuit, the same on all processes.
        windows: `[B, L]` tokens, the same on all processes.
        chunk_size: windows that are counted at once.
        accelerator: knows the processes.

    Returns:
        The expected counts in the circuit's dtype, and the sum of the log-likelihoods in nats.
    """
    leaves = potentials.leaves()
    kind = {"device": leaves[0].device, "dtype": summing_dtype(leaves[0].device)}
    sums = [torch.zeros(leaf.shape, **kind) for leaf in leaves]
    total = torch.zeros((), **kind)
    chunks = windows.split(chunk_size)
    for chunk in chunks[accelerator.process_index :: accelerator.num_processes]:
        counts, scores = expected_counts(potentials, chunk.to(total.device))
        for mine, new in zip(sums, counts.leaves, strict=True):
            mine += new
        total += scores.to(total.dtype).sum()
    *sums, total = (accelerator.reduce(tensor, "sum") for tensor in (*sums, total))
    counts = tuple(s.to(leaf.dtype) for s, leaf in zip(sums, leaves, strict=True))
    return Counts(counts), total.item()


def model_counts(potentials: Potentials, length: int) -> Counts:
    """The counts that a normalised circuit itself expects of a window of so many tokens.

    How often each parameter is used when windows are drawn from the circuit: what *anemone* (arXiv
    2505.19982) calls top-down probabilities, times the parameters. With evidence of ones the law of
    the paths is the circuit's own, and expected uses are gradients of its log-normaliser.

    Args:
        potentials: the circuit, with dense emissions.
        length: tokens in a window.
    """
    evidence = potentials.initial.new_zeros(1, length, potentials.num_latents).requires_grad_()
    path = (potentials.initial, potentials.transition.log_potential)
    initial, transition = path = tuple(leaf.detach().requires_grad_() for leaf in path)
    with torch.enable_grad():
        chain = Chain.start(initial, StepTransitions(transition), evidence)
        log_partition = forward_filter(chain).log_partition.sum()
    *uses, states = torch.autograd.grad(log_partition, (*path, evidence))
    emission = potentials.emission.dense().detach().exp()
    visits = states.sum(1) if len(emission) == 1 else states[0]
    return Counts((*uses, visits[..., None] * emission))
