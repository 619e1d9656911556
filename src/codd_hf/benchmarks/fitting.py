"""Tokens per second of fitting, and the cost of a conditional step.

EM: one iteration (expected counts, then new parameters) from one start on the same windows, for
this library and, where it is installed, for hmmlearn, right after another one, as in a fit.
Conditional: a training step of the embedded model's head against the forward pass of its frozen
backbone that it contains.
"""

from __future__ import annotations

from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..circuits import Potentials
from ..circuits.em import Counts, expected_counts, maximise
from ..data.canvases import load_examples, tokenize_examples
from ..data.collator import DataCollatorForMaskedDiffusion
from ..hub.defaults import default_model
from ..pipelines import CoDDPipeline
from . import Options, Report
from .timing import Side, median_seconds

LENGTH = 32


def our_iteration(start: list[torch.Tensor], windows: torch.Tensor) -> None:
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


def em_rows(options: Options) -> list[dict[str, Any]]:
    """A row for each implementation, and one for ours on the batches of a fit."""
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
                "states": states,
                "vocabulary": vocab,
            }
            for name in sides
        ]
    return rows


def conditional_rows(options: Options) -> list[dict[str, Any]]:
    """The backbone's forward pass and the masked logits of a window, then whole training steps."""
    pipeline = CoDDPipeline.from_pretrained(default_model()).to(options.device)
    model, tokenizer = pipeline.model, pipeline.tokenizer
    model.requires_grad_(False)
    model.coupling_head.requires_grad_(True)
    number = options.batch_size or (2 if options.quick else 32)
    examples = load_examples(str(Path(default_model()) / "test.jsonl"))[:number]
    collate = DataCollatorForMaskedDiffusion(tokenizer, model.mask_token_id, model.window_length)
    torch.manual_seed(options.seed)
    batch = collate(
        [
            {
                "input_ids": example.prompt_ids + example.answer_ids,
                "labels": [-100] * len(example.prompt_ids) + example.answer_ids,
            }
            for example in tokenize_examples(examples, tokenizer)
        ]
    )
    names = ("input_ids", "attention_mask", "labels")
    ids, mask, labels = (batch[name].to(options.device) for name in names)
    window = labels != -100
    wanted = (window & (ids == model.mask_token_id)).nonzero(as_tuple=True)
    starts = window.long().argmax(1)
    truth = labels[window].view(len(ids), -1)
    optimizer = torch.optim.AdamW(model.coupling_head.parameters(), lr=1e-3, weight_decay=0.0)

    @torch.no_grad()
    def forward() -> None:
        model.backbone_states(ids, mask).logits(wanted)

    def step() -> None:
        states = model.backbone_states(ids, mask)
        distribution = model.window_distribution(states, ids, starts, mask)
        (-distribution.coupling_gain(truth).sum() / len(wanted[0])).backward()
        optimizer.step()
        optimizer.zero_grad()

    sides = {"backbone forward": forward, "conditional step": step}
    seconds = median_seconds(sides, options.repeats, options.device)
    return [
        {
            "what": name,
            "windows": len(examples),
            "ms": 1e3 * value,
            "tokens/s": ids.numel() / value,
            "over the backbone's forward": value / seconds["backbone forward"],
        }
        for name, value in seconds.items()
    ]


def fitting(options: Options) -> Report:
    """`codd-hf bench fitting`: EM on the CPU, then a conditional step on the asked device."""
    facts = {"window": LENGTH, "dtype": "float32 (hmmlearn: float64)"}
    rows = em_rows(options) + conditional_rows(options)
    return Report(facts | {"repeats": options.repeats}, {"rows": rows})
