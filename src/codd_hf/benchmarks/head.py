"""A head step, against a plain reading of the paper and a backbone's forward pass; its memory."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from ..circuits.reference import plain_step
from ..configuration_codd import CoDDHeadConfig
from ..modeling_head import DEFAULT_EVIDENCE_SIZE, CoDDHead
from ..runtime.precision import computes_bf16
from . import Options, Report
from .timing import Side, median_seconds

SPREAD, SHARED = 5.0, 0.68
"""Standard deviation of logits, and the share of their variance that predictions have in common."""

EVIDENCE = {"exact": 0, "listed": DEFAULT_EVIDENCE_SIZE, "short list": 16}
"""Tokens of a prediction that a step reads; 0 for all."""

SEQUENCE, LAYERS = 512, 32
"""Of the backbone's pass."""

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Shape:
    """Sizes of a head step: `batch` windows of `window` positions, all of them masked."""

    batch: int = 1
    window: int = 32
    states: int = 1024
    vocabulary: int = 126_464

    @property
    def emission_bytes(self) -> int:
        """The size of the emission matrix."""
        return 4 * self.states * self.vocabulary


def base_shape(options: Options) -> Shape:
    """LLaDA-8B's shape, or a tiny one."""
    shape = Shape(window=8, states=32, vocabulary=512) if options.quick else Shape()
    return replace(shape, batch=options.batch_size or 1)


class HeadCase:
    """A head with random normalised potentials, and the inputs of a step.

    Predictions share a part of their logits, as the frequencies of tokens are shared: of the lists
    of `DEFAULT_EVIDENCE_SIZE` tokens of a window 51 % are distinct, of those of eight windows 18 %;
    a language model has 39 and 18 % (SmolLM2-135M, `examples/listed_tokens.py`). The last token is
    the mask token.
    """

    def __init__(self, shape: Shape, options: Options) -> None:
        self.shape, device, vocab = shape, options.device, shape.vocabulary
        config = CoDDHeadConfig(
            vocab_size=vocab,
            num_latents=shape.states,
            window_length=shape.window,
            mask_token_id=vocab - 1,
        )
        with torch.device(device):
            self.head = CoDDHead(config).eval().requires_grad_(False)
        generator = torch.Generator(device).manual_seed(options.seed)
        self.circuit = (self.head.initial, self.head.transition, self.head.emission)
        for parameter in self.circuit:
            parameter.normal_(0.0, 2.0, generator=generator)
            parameter.sub_(parameter.logsumexp(-1, keepdim=True))
        self.head.token_marginal.fill_(1 / vocab)
        self.frozen = self.head.frozen()
        size = (shape.batch, shape.window, vocab)
        self.logits = torch.randn(size, generator=generator, device=device)
        shared = torch.randn(vocab, generator=generator, device=device)
        self.logits.mul_((1 - SHARED) ** 0.5).add_(shared, alpha=SHARED**0.5).mul_(SPREAD)
        self.logits[..., -1] = -torch.inf
        self.tokens = torch.full(size[:2], vocab - 1, device=device)
        self.observed = torch.zeros_like(self.tokens, dtype=torch.bool)

    @torch.no_grad()
    def step(self, evidence: str) -> torch.Tensor:
        """What a head adds to a denoising step: evidence, filter, latents, `[B, L, V]` log-probs.

        Decoding takes the `listed` evidence for a large vocabulary.
        """
        size = min(EVIDENCE[evidence], self.shape.vocabulary)
        inputs = {"tokens": self.tokens, "observed": self.observed, "top_k": size}
        distribution = self.frozen(self.logits, **inputs)
        return distribution.logits_given(distribution.sample_latents())

    def plain_step(self) -> tuple[torch.Tensor, ...]:
        """The same as the paper states it."""
        return plain_step(self.circuit, self.logits, self.tokens, self.observed)

    def num_listed(self, evidence: str) -> int:
        """How many tokens are in the list of any prediction."""
        k = min(EVIDENCE[evidence] or self.shape.vocabulary, self.shape.vocabulary)
        return len(self.logits.topk(k, -1, sorted=False).indices.unique())


def steps(shapes: Iterable[Shape], options: Options) -> Report:
    """A step of each shape and form of evidence, beside the plain one."""
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        case = HeadCase(shape, options)
        sides: dict[str, Side] = {mode: partial(case.step, mode) for mode in EVIDENCE}
        sides["plain"] = case.plain_step
        seconds = median_seconds(sides, options.repeats, options.device)
        rows += [
            {
                **asdict(shape),
                "evidence": mode,
                "tokens read": case.num_listed(mode),
                "plain paper, ms": 1e3 * seconds["plain"],
                "head step, ms": 1e3 * seconds[mode],
                "times faster": seconds["plain"] / seconds[mode],
            }
            for mode in EVIDENCE
        ]
    return Report({"dtype": "float32", "repeats": options.repeats}, {"rows": rows})


def head_step(options: Options) -> Report:
    """`codd-hf bench head-step`."""
    shapes = [replace(base_shape(options), batch=batch) for batch in options.batches_or(1, 8)]
    return steps(shapes, options)


def scaling(options: Options) -> Report:
    """`codd-hf bench scaling`: one size changed at a time."""
    base = base_shape(options)
    changes: list[dict[str, int]] = [{}, {"batch": 2 * base.batch}, {"batch": 4 * base.batch}]
    changes += [{"window": base.window // 4}, {"window": 2 * base.window}]
    for name in ("states", "vocabulary"):
        changes += [{name: getattr(base, name) // part} for part in (2, 4)]
    return steps([replace(base, **change) for change in changes], options)


def overhead(options: Options) -> Report:
    """`codd-hf bench overhead`: a head step over one forward pass of an 8-billion-parameter model.

    The backbone is timed as one real bidirectional Llama layer of LLaDA-8B's shape, times its
    number of layers, plus the output projection of the window's positions.
    """
    shape, device = base_shape(options), options.device
    dtype = torch.bfloat16 if computes_bf16(device) else torch.float32
    hidden, heads, feed_forward = (32, 2, 64) if options.quick else (4096, 32, 12_288)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=hidden,
        num_attention_heads=heads,
        intermediate_size=feed_forward,
    )
    config._attn_implementation = "sdpa"
    with torch.device(device):
        layer = LlamaDecoderLayer(config, 0).to(dtype).eval().requires_grad_(False)
        layer.self_attn.is_causal = False
        projection = nn.Linear(hidden, shape.vocabulary, bias=False, dtype=dtype)
        states = torch.randn(shape.batch, SEQUENCE, hidden, dtype=dtype)
        rotary = LlamaRotaryEmbedding(config)(states, torch.arange(SEQUENCE)[None])
        case = HeadCase(shape, options)
    sides = {
        "layer": lambda: layer(states, position_embeddings=rotary),
        "projection": torch.no_grad()(lambda: projection(states[:, -shape.window :])),
    }
    sides |= {mode: partial(case.step, mode) for mode in EVIDENCE}
    seconds = median_seconds(sides, options.repeats, device)
    forward = LAYERS * seconds["layer"] + seconds["projection"]
    rows: list[dict[str, Any]] = [
        {
            "evidence": mode,
            "head step, ms": 1e3 * seconds[mode],
            "backbone forward, ms": 1e3 * forward,
            "overhead, %": 100 * seconds[mode] / forward,
        }
        for mode in EVIDENCE
    ]
    facts = asdict(shape) | {"hidden": hidden, "layers": LAYERS, "sequence": SEQUENCE}
    facts |= {"backbone dtype": str(dtype), "repeats": options.repeats}
    facts |= {f"{name}, ms": 1e3 * seconds[name] for name in ("layer", "projection")}
    return Report(facts, {"rows": rows})


def memory(options: Options) -> Report:
    """`codd-hf bench memory`: peak extra memory, in multiples of the emission matrix.

    On a CPU the sides run in a process of their own, once each, and the figure is the highest
    resident size that Linux saw during the step (`VmHWM`, reset through `clear_refs`) less the
    resident size before it. It counts whatever the process really held: results, temporaries, and
    the buffers of the linear algebra. On CUDA it is the allocator's own peak.
    """
    cuda, shape = options.device == "cuda", base_shape(options)
    if not cuda and not CLEAR_REFS.exists():
        raise OSError("Memory on a CPU is read from Linux's /proc, which this system has not.")
    tasks = [
        (side, replace(shape, batch=batch), options)
        for batch in options.batches_or(1, 8)
        for side in ("plain", *EVIDENCE)
    ]
    threads = (torch.get_num_threads(),)
    with ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, threads) as process:
        extras = list((map if cuda else process.map)(extra_bytes, *zip(*tasks, strict=True)))
    emission = shape.emission_bytes
    rows: list[dict[str, Any]] = [
        {
            "batch": sized.batch,
            "side": side,
            "peak extra, MiB": extra / 2**20,
            "emission matrices": extra / emission,
            "of these the result": 4 * sized.batch * sized.window * sized.vocabulary / emission,
        }
        for (side, sized, _), extra in zip(tasks, extras, strict=True)
    ]
    facts = asdict(shape) | {"emission matrix, MiB": emission / 2**20}
    del facts["batch"]
    return Report(facts, {"rows": rows})


def extra_bytes(side: str, shape: Shape, options: Options) -> int:
    """Peak bytes that the first step of a side needs beyond its head and its logits."""
    case, cuda = HeadCase(shape, options), options.device == "cuda"
    gc.collect()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        # The step would use freed memory again and seem to need nothing.
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)
        CLEAR_REFS.write_text("5")
        before = _resident("VmRSS")
    result = case.plain_step() if side == "plain" else case.step(side)
    after = torch.cuda.max_memory_allocated() if cuda else _resident("VmHWM")
    del result
    return max(after - before, 0)


def _resident(name: str) -> int:
    """Bytes of a line of `/proc/self/status`, which counts in KiB."""
    line = next(x for x in STATUS.read_text().splitlines() if x.startswith(name + ":"))
    return 1024 * int(line.split()[1])
