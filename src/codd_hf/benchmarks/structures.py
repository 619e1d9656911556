"""Measure 10, for transitions: the chain's own time against the states, dense and Monarch."""

from __future__ import annotations

import math

import torch

from ..circuits import DenseTransition, MonarchTransition
from ..circuits.recursions.chain import Chain, forward_filter, sample_backward
from ..circuits.transitions import Steps
from .report import Options, Report
from .timing import measure_rates, median_seconds

BATCH, WINDOW = 8, 32
SIZES = (("dense", 256), ("dense", 1024), ("dense", 2304), ("monarch", 1024), ("monarch", 4096))
QUICK_SIZES = (("dense", 16), ("monarch", 16))


def random_chain(structure: str, latents: int, batch: int, options: Options) -> Chain:
    """A chain over `[batch, WINDOW]` positions with normal log-potentials and evidence."""
    generator = torch.Generator(options.device).manual_seed(options.seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=options.device)

    if structure == "monarch":
        side = math.isqrt(latents)
        transition = MonarchTransition(normal(1, side, side, side), normal(1, side, side, side))
    else:
        transition = DenseTransition(normal(1, latents, latents))
    return Chain.start(normal(latents), Steps(transition), normal(batch, WINDOW, latents))


@torch.no_grad()
def run_chain(chain: Chain) -> torch.Tensor:
    """Filter and one sampled path."""
    return sample_backward(chain, forward_filter(chain))


def measure(options: Options) -> Report:
    """Median seconds of filter and sample at every structure and size, beside the limit."""
    batch = options.batch_size or BATCH
    rates = measure_rates(options.device, options.quick)
    rows, sides = [], {}
    sizes = QUICK_SIZES if options.quick else SIZES
    for structure, latents in sizes:
        chain = random_chain(structure, latents, batch, options)
        sides[structure, latents] = lambda chain=chain: run_chain(chain)
    seconds = median_seconds(sides, options.repeats_or(5), options.device)
    for structure, latents in sizes:
        products = latents**2 if structure == "dense" else 2 * math.isqrt(latents) ** 3
        limit = rates.limit(4 * products, 2 * batch * WINDOW * products)
        rows.append(
            {
                "transitions": structure,
                "states H": latents,
                "numbers of the transitions": products,
                "filter and sample, ms": 1e3 * seconds[structure, latents],
                "limit, ms": 1e3 * limit,
            }
        )
    return Report(
        "structures",
        {"batch": batch, "window": WINDOW, "dtype": "float32"},
        rows,
        rates.as_dict(),
    )
