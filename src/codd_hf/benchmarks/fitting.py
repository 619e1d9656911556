"""Measure 7: tokens per second of fitting, and what a conditional step costs.

EM: one iteration (expected counts, then new parameters) from one start on the same windows, for
this library and for the peers that are installed, right after another one, as in a fit. The nats
per token that each reports for the start show that they do the same work. Conditional: a training
step of the embedded model's head against the forward pass of its frozen backbone that it contains.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

from ..circuits import Potentials
from ..circuits.em import Counts, expected_counts, maximise
from ..data.canvases import collate, load_examples, padding_token_id, tokenize_examples
from ..data.noise import sample_noise
from ..hub.defaults import default_model
from ..pipelines import CoDDPipeline
from .report import Options, Report
from .timing import Rates, measure_rates, median_seconds

PEERS = ("hmmlearn", "pomegranate")
LATENTS, VOCAB, LENGTH = 256, 2048, 32

Iteration = Callable[[], float]
"""One EM iteration; returns the nats per token of the start."""


Start = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Log-probabilities `initial [H]`, `transition [H, H]` and `emission [H, V]`."""


def random_start(latents: int, vocab: int, seed: int) -> Start:
    """A normalised circuit, its logarithms from normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((latents,), (latents, latents), (latents, vocab))
    return tuple(torch.randn(s, generator=generator).log_softmax(-1) for s in sizes)


def random_windows(number: int, vocab: int, seed: int) -> torch.Tensor:
    """`[number, LENGTH]` tokens, the `r`-th most frequent with probability as `1 / r`."""
    generator = torch.Generator().manual_seed(seed)
    weights = 1 / torch.arange(1, vocab + 1, dtype=torch.float64)
    draws = torch.multinomial(weights, number * LENGTH, replacement=True, generator=generator)
    return draws.view(number, LENGTH)


def own_iteration(start: Start, windows: torch.Tensor) -> Iteration:
    circuit = Potentials(start[0], start[1][None], start[2][None])
    prior = Counts((torch.tensor(1e-3),) * 3)

    def run() -> float:
        counts, scores = expected_counts(circuit, windows)
        maximise(circuit, counts, prior)
        return -scores.sum().item() / windows.numel()

    return run


def hmmlearn_iteration(start: Start, windows: torch.Tensor) -> Iteration:
    """`CategoricalHMM` with its faster, scaled recursions (single-threaded C++)."""
    from hmmlearn.hmm import CategoricalHMM

    symbols = windows.reshape(-1, 1).numpy()
    lengths = [windows.shape[1]] * len(windows)

    def law(log_potentials: torch.Tensor):
        return log_potentials.double().softmax(-1).numpy()

    def run() -> float:
        model = CategoricalHMM(
            len(start[0]),
            n_features=start[2].shape[1],
            n_iter=1,
            init_params="",
            implementation="scaling",
        )
        model.startprob_, model.transmat_, model.emissionprob_ = map(law, start)
        model.fit(symbols, lengths)
        return -model.monitor_.history[0] / windows.numel()

    return run


def pomegranate_iteration(start: Start, windows: torch.Tensor) -> Iteration:
    """`DenseHMM` (PyTorch, all windows at once)."""
    threads = torch.get_num_threads()
    from pomegranate.distributions import Categorical
    from pomegranate.hmm import DenseHMM

    torch.set_num_threads(threads)  # importing it takes all cores

    symbols = windows[..., None]

    def run() -> float:
        model = DenseHMM(
            [Categorical(row[None]) for row in start[2].exp()],
            edges=start[1].exp(),
            starts=start[0].exp(),
            ends=torch.ones(len(start[0])),
            check_data=False,
        )
        with torch.no_grad():
            scores = model.summarize(symbols)
            model.from_summaries()
        return -scores.sum().item() / windows.numel()

    return run


def em_limit(tokens: int, latents: int, rates: Rates) -> float:
    """Least seconds of the products: one forward, two backward (to messages and to counts)."""
    return rates.limit(0.0, 3 * 2 * tokens * latents**2)


def em_rows(options: Options, rates: Rates) -> tuple[list[dict], list[str]]:
    """A row per implementation, and how to install those that are missing."""
    latents, vocab = (8, 64) if options.quick else (LATENTS, VOCAB)
    number = options.batch_size or (8 if options.quick else 128)
    start = random_start(latents, vocab, options.seed)
    windows = random_windows(number, vocab, options.seed)
    many = random_windows(4 * number, vocab, options.seed)
    sides = {"codd-hf": own_iteration(start, windows)}
    own_only = {"codd-hf": own_iteration(start, many)}
    makers = {"hmmlearn": hmmlearn_iteration, "pomegranate": pomegranate_iteration}
    missing = [name for name in PEERS if find_spec(name) is None]
    for name in PEERS:
        if name not in missing:
            sides[name] = makers[name](start, windows)
    rows = []
    for group, tokens in ((sides, windows.numel()), (own_only, many.numel())):
        nats = {name: run() for name, run in group.items()}
        seconds = median_seconds(group, options.repeats_or(3), warmups=0, settling=1)
        for name in group:
            rows.append(
                {
                    "what": f"EM iteration, {name} {version(name)}",
                    "windows": tokens // LENGTH,
                    "ms": 1e3 * seconds[name],
                    "limit, ms": 1e3 * em_limit(tokens, latents, rates),
                    "tokens/s": tokens / seconds[name],
                    "codd-hf is faster, times": seconds[name] / seconds["codd-hf"],
                    "nats per token of the start": nats[name],
                }
            )
    return rows, [f"{name}: not installed (`pip install {name}`)." for name in missing]


def conditional_rows(options: Options) -> list[dict]:
    """The backbone's forward pass over the canvases and the window's logits, then whole steps."""
    pipeline = CoDDPipeline.from_pretrained(default_model()).to(options.device)
    model, tokenizer, device = pipeline.model, pipeline.tokenizer, pipeline.model.device
    model.requires_grad_(False)
    model.coupling_head.requires_grad_(True)
    number = options.batch_size or (2 if options.quick else 32)
    examples = load_examples(str(Path(default_model()) / "test.jsonl"))[:number]
    canvas = collate(
        tokenize_examples(examples, tokenizer),
        window_length=model.window_length,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=padding_token_id(tokenizer),
    )
    noise = sample_noise(
        canvas,
        window_length=model.window_length,
        generator=torch.Generator().manual_seed(options.seed),
        window_probability=1.0,
    )
    starts = noise.span.long().argmax(1).to(device)
    wanted = (noise.masked & noise.span).to(device).nonzero(as_tuple=True)
    canvas = canvas.to(device)
    ids, mask = canvas.input_ids, canvas.attention_mask
    noised = ids.masked_fill(noise.masked.to(device), model.config.mask_token_id)
    columns = starts[:, None] + torch.arange(model.window_length, device=device)
    truth = ids.gather(1, columns.clamp(max=ids.shape[1] - 1))
    optimizer = torch.optim.AdamW(model.coupling_head.parameters(), lr=1e-3, weight_decay=0.0)

    @torch.no_grad()
    def forward() -> None:
        model.backbone_states(noised, mask).logits(wanted)

    def step() -> None:
        states = model.backbone_states(noised, mask)
        distribution = model.window_distribution(states, noised, starts, mask)
        (-distribution.coupling_gain(truth).sum() / len(wanted[0])).backward()
        optimizer.step()
        optimizer.zero_grad()

    sides = {"backbone forward": forward, "conditional step": step}
    seconds = median_seconds(sides, options.repeats_or(5), options.device)
    tokens = ids.numel()
    return [
        {
            "what": name,
            "windows": len(examples),
            "ms": 1e3 * value,
            "tokens/s": tokens / value,
            "over the backbone's forward": value / seconds["backbone forward"],
        }
        for name, value in seconds.items()
    ]


def measure(options: Options) -> Report:
    """EM per implementation on the CPU, then a conditional step on the asked device."""
    rates = measure_rates("cpu", options.quick)
    rows, notes = em_rows(options, rates)
    rows += conditional_rows(options)
    sizes = {
        "EM states": 8 if options.quick else LATENTS,
        "EM vocabulary": 64 if options.quick else VOCAB,
        "window": LENGTH,
        "conditional model": "the embedded one",
        "dtype": "float32 (hmmlearn: float64)",
        "repeats": options.repeats_or(3),
    }
    return Report("fitting", sizes, rows, rates.as_dict(), notes)
