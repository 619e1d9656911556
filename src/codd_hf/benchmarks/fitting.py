"""Tokens per second of EM.

One iteration (expected counts, then new parameters) from one start on the same windows, for this
library and, where it is installed, for hmmlearn, right after another one, as in a fit.
"""

from __future__ import annotations

from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch

from ..circuits import Potentials
from ..circuits.em import Counts, expected_counts, maximise
from . import Options, Report
from .timing import Side, median_seconds

LENGTH = 32


def our_iteration(start: list[Any], windows: torch.Tensor) -> None:
    """`expected_counts` and `maximise`, from log-probabilities `[H]`, `[H, H]` and `[H, V]`."""
    circuit = Potentials(start[0], start[1][None], start[2][None])
    counts, _ = expected_counts(circuit, windows)
    maximise(circuit, counts, Counts((torch.tensor(1e-3),) * 3))


def hmmlearn_iteration(start: list[torch.Tensor], windows: torch.Tensor) -> None:
    """`CategoricalHMM` with its faster, scaled recursions (single-threaded C++)."""
    from hmmlearn.hmm import CategoricalHMM

    model = CategoricalHMM(
        len(start[0]),
        n_features=start[2].shape[1],
        n_iter=1,
        init_params="",
        implementation="scaling",
    )
    probs = [part.double().softmax(-1).numpy() for part in start]
    model.startprob_, model.transmat_, model.emissionprob_ = probs
    model.fit(windows.reshape(-1, 1).numpy(), [windows.shape[1]] * len(windows))


def fitting(options: Options) -> Report:
    """`codd-hf bench fitting`: each implementation, and ours on the batches of a fit."""
    states, vocab, number = (8, 64, 8) if options.quick else (256, 2048, 128)
    number = options.batch_size or number
    generator = torch.Generator().manual_seed(options.seed)
    sizes = ((states,), (states, states), (states, vocab))
    start = [torch.randn(size, generator=generator).log_softmax(-1) for size in sizes]
    frequencies = 1 / torch.arange(1, vocab + 1, dtype=torch.float64)
    drawn = torch.multinomial(frequencies, 4 * number * LENGTH, True, generator=generator)
    many, rows = drawn.view(-1, LENGTH), []
    for windows in (many[:number], many):
        sides: dict[str, Side] = {"codd-hf": partial(our_iteration, start, windows)}
        if windows is not many and find_spec("hmmlearn"):
            sides["hmmlearn"] = partial(hmmlearn_iteration, start, windows)
        seconds = median_seconds(sides, options.repeats, warmups=0, settling=1)
        rows += [
            {
                "what": f"EM iteration, {name} {version(name)}",
                "windows": len(windows),
                "ms": 1e3 * seconds[name],
                "tokens/s": windows.numel() / seconds[name],
                "codd-hf is faster, times": seconds[name] / seconds["codd-hf"],
            }
            for name in sides
        ]
    facts = {"states": states, "vocabulary": vocab, "window": LENGTH, "repeats": options.repeats}
    return Report(facts | {"dtype": "float32 (hmmlearn: float64)"}, {"rows": rows})
