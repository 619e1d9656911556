"""The predictions of a frozen backbone about noised windows: computed once, read at every step.

The backbone is by far the dearest part of a step and does not change, so it runs over the data a
few times, each with other noise. Kept of a window are its tokens, which of them were hidden, the
hidden states that predicted them, and of each masked position the `k` likeliest tokens with the log
of the remaining mass.

With a folder the evidence is safetensors shards there, written by all processes and read by memory
mapping. A batch's windows and noise are a function of its number and the settings alone, so the
shards are the same whoever writes them, and a run that stopped writes only those that are missing.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ...circuits import TopKEvidence
from ...circuits.factorized import forbidden_tokens
from ...data.canvases import TokenizedExample, batch_indices
from ...data.fingerprint import json_fingerprint, tensor_fingerprint
from ...data.noise import draw_windows
from ...modeling_codd import CoDDModel
from ...modeling_head import CoDDHead
from ...runtime.locks import locked
from ...runtime.precision import autocast, chosen_precision, precision_note
from ..processes.sharding import is_sharded
from ..stage_settings import ConditionalConfig
from .fingerprint import (
    check_fingerprint,
    evidence_fingerprint,
    model_fingerprint,
    read_fingerprint,
    write_fingerprint,
)
from .noised_windows import NoisedWindows
from .scores import WindowScores

SHARD_BYTES = 128 * 2**20
MAX_SHARDS = 1024
LOCK = ".lock"
DTYPES = {"half": (torch.float16, torch.bfloat16), "single": (torch.float32, torch.float32)}


class WindowCache:
    """Evidence about `N` noised windows, in memory or on disk.

    Args:
        parts: the windows; several parts count as one after the other.
        temperature: the evidence temperature of the predictions.
        fingerprint: what made it, if it is on disk.
    """

    def __init__(
        self,
        parts: Sequence[NoisedWindows],
        temperature: float = 1.0,
        fingerprint: dict[str, Any] | None = None,
    ):
        self.parts = list(parts)
        self.temperature = temperature
        self.fingerprint = fingerprint
        self._ends = torch.tensor([len(part) for part in self.parts]).cumsum(0)

    @classmethod
    def open(cls, folder: str | Path) -> WindowCache:
        """Evidence that `cache_windows` wrote; needs no backbone.

        Raises:
            FileNotFoundError: the folder holds no complete evidence.
            ValueError: it is damaged.
        """
        folder = Path(folder)
        shards = sorted(folder.glob("windows-*-of-*.safetensors"))
        if not shards or shards != _paths(folder, int(shards[0].stem.rpartition("-")[2])):
            raise FileNotFoundError(f"{str(folder)!r} holds no complete evidence: write it first.")
        fingerprint = read_fingerprint(folder) or {}
        if "evidence_temperature" not in fingerprint:
            raise ValueError(
                f"{str(folder)!r} does not say what made the evidence: delete the folder, and it "
                "is written anew."
            )
        parts = [NoisedWindows.read(path) for path in shards]
        return cls(parts, fingerprint["evidence_temperature"], fingerprint)

    def identity(self) -> str:
        """A digest that tells this evidence from other; in memory, of the windows themselves."""
        if self.fingerprint is not None:
            return json_fingerprint(self.fingerprint)
        held = (getattr(part, name) for part in self.parts for name in ("tokens", "log_probs"))
        return json_fingerprint([tensor_fingerprint(tensor) for tensor in held])

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def size(self) -> int:
        """Bytes held, in memory or on disk."""
        return sum(part.size for part in self.parts)

    def take(self, rows: torch.Tensor) -> NoisedWindows:
        """Some windows, `rows [B]`, in that order; fastest if that is ascending."""
        owner = torch.searchsorted(self._ends, rows.contiguous(), right=True)
        order = owner.argsort(stable=True)
        owners, counts = owner[order].unique_consecutive(return_counts=True)
        parts = [self.parts[part] for part in owners.tolist()]
        firsts = self._ends[owners] - torch.tensor([len(part) for part in parts])
        local = (rows[order] - firsts.repeat_interleave(counts)).split(counts.tolist())
        windows = NoisedWindows.gathered(parts, local)
        in_order = bool((order.diff() > 0).all())
        return windows if in_order else windows.take(order.argsort())

    def scores(self, head: CoDDHead, rows: torch.Tensor) -> WindowScores:
        """The gains of a head on some windows `rows [B]`."""
        return self.take(rows).scores(head, self.temperature)


def bytes_per_window(model: CoDDModel, config: ConditionalConfig) -> float:
    """Bytes that the evidence about a window takes, as expected over the noise levels."""
    length, kept = model.window_length, min(config.cache_size, model.config.vocab_size)
    number, state = (dtype.itemsize for dtype in DTYPES[config.evidence_precision])
    masked = 0.5 * length  # the mean of `t ~ U(0, 1)`
    size = length * (4 + 1) + 4 + 8 + masked * (kept * (4 + number) + number)
    head = model.coupling_head
    if head is not None and head.context_maps is not None:
        states = length
        if head.context_maps.copies:
            states += head.config.copy_length
            size += 4 * head.config.copy_length
        size += state * states * model.config.hidden_size
    return size


def cache_windows(
    model: CoDDModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[TokenizedExample],
    config: ConditionalConfig | None = None,
    folder: str | Path | None = None,
    *,
    num_draws: int = 1,
    seed: int = 0,
    progress: bool = True,
    made_by: dict[str, Any] | None = None,
    renew: bool = False,
) -> WindowCache:
    """Runs the backbone over noised examples, one window of each a draw.

    With several processes and a folder, which must be on a disk that they share, each process
    writes its part of the shards; without a folder each computes all of it for itself. The backbone
    may be sharded over the processes: the evidence is the same.

    Args:
        model: the backbone; hidden states are kept if its head is conditioned.
        tokenizer: its tokenizer.
        examples: the examples.
        config: the noise, and what to keep.
        folder: where the evidence is written, or taken from if it is there; without one it is held
            in memory.
        num_draws: how often each example is drawn, each time with another window and other noise.
        seed: of windows and noise.
        progress: say how large it will be, and show a progress bar.
        made_by: of the backbone, if `fingerprint.model_fingerprint` is known.
        renew: evidence in the folder that something else made gives way.

    Raises:
        OSError: the disk has no room for it, or another run writes it.
        ValueError: the folder holds evidence that something else made.
    """
    config = (config or ConditionalConfig()).at_temperature_of(model.coupling_head)
    precision = chosen_precision(config.mixed_precision, model.device)
    state = PartialState()
    progress = progress and state.is_local_main_process
    if config.mixed_precision != "no" and progress:
        tqdm.write(precision_note(precision, model.device))
    config = replace(config, mixed_precision=precision)
    reader = _Reader(model, tokenizer, examples, config, seed, progress)
    batches = reader.batches(num_draws)
    if folder is None:
        parts = [NoisedWindows.joined(list(reader.read(batches)))]
        return WindowCache(parts, config.evidence_temperature)

    folder = Path(folder)
    made_by = model_fingerprint(model, tokenizer) if made_by is None else made_by
    fingerprint = evidence_fingerprint(model, made_by, examples, config, num_draws, seed)
    shards = reader.shards(batches)
    paths = _paths(folder, len(shards))
    complete = all(path.exists() for path in paths) and read_fingerprint(folder) == fingerprint
    state.wait_for_everyone()  # all have looked before the first one writes
    if complete:
        return WindowCache.open(folder)
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / LOCK, f"The evidence in {str(folder)!r}", state):
        if state.is_main_process:
            found = read_fingerprint(folder)
            if renew and found not in (None, fingerprint):
                tqdm.write(f"The evidence in {folder} is of something else, and is deleted.")
                for path in (path for path in folder.iterdir() if path.name != LOCK):
                    path.unlink()
                found = None
            if found is None:
                write_fingerprint(folder, fingerprint)
        state.wait_for_everyone()
        check_fingerprint(folder, read_fingerprint(folder), fingerprint)
        missing = [i for i, path in enumerate(paths) if not path.exists()]
        state.wait_for_everyone()  # as above
        if missing:
            each = bytes_per_window(model, config)
            left = sum(len(rows) for i in missing for _, rows in shards[i])
            if progress:
                total, length = num_draws * len(examples), model.window_length
                some = "" if left == total else f"{left:,} of "
                tqdm.write(
                    f"Evidence about {some}{total:,} windows of {length} tokens: about "
                    f"{left * each / 1e9:.2f} GB ({each / length / 1e3:.2f} GB per million tokens) "
                    f"in {folder}."
                )
            _check_room(folder, left * each)
            work = [missing[i :: state.num_processes] for i in range(state.num_processes)]
            sizes = [sum(len(shards[i]) for i in part) for part in work]
            for i in work[state.process_index]:
                NoisedWindows.joined(list(reader.read(shards[i]))).write(paths[i])
            if is_sharded(model):  # each process has a part in every pass of the others
                for _ in range(max(sizes) - sizes[state.process_index]):
                    reader.pass_idly()
        state.wait_for_everyone()
    return WindowCache.open(folder)


Batch = tuple[int, list[int]]
"""The seed of a batch's noise, and the examples in it."""


@dataclass
class _Reader:
    """Runs the backbone over batches of noised examples."""

    model: CoDDModel
    tokenizer: PreTrainedTokenizerBase
    examples: Sequence[TokenizedExample]
    config: ConditionalConfig
    seed: int
    progress: bool

    def batches(self, num_draws: int) -> list[Batch]:
        """All batches: each draw has all examples once."""
        length = self.model.window_length
        lengths = [
            len(e.prompt_ids) + -(-len(e.answer_ids) // length) * length for e in self.examples
        ]
        batches: list[Batch] = []
        for draw in range(num_draws):
            seen = 0
            for rows in batch_indices(lengths, self.config.tokens_per_batch, self.seed + draw):
                number = len(batches)
                batches.append(((self.seed * 1_000_003 + draw) * 100_003 + number, rows))
                seen += len(rows)
                if seen >= len(lengths):
                    break
        return batches

    def shards(self, batches: Sequence[Batch]) -> list[list[Batch]]:
        """The batches in shards of about equal size."""
        sizes = [len(rows) for _, rows in batches]
        each = bytes_per_window(self.model, self.config)
        most = max(SHARD_BYTES / each, sum(sizes) / MAX_SHARDS)
        before = [0, *itertools.accumulate(sizes)]
        pairs = zip(before, batches, strict=False)
        groups = itertools.groupby(pairs, lambda pair: pair[0] // most)
        return [[batch for _, batch in group] for _, group in groups]

    def read(self, batches: Sequence[Batch]) -> Iterator[NoisedWindows]:
        """The evidence of each batch."""
        bar = tqdm(batches, desc="running the backbone", unit="batch", disable=not self.progress)
        return (self._windows(*batch) for batch in bar)

    @torch.no_grad()
    def _windows(self, seed: int, rows: Iterable[int]) -> NoisedWindows:
        model, config = self.model, self.config
        device, length, vocab_size = model.device, model.window_length, model.config.vocab_size
        maps = None if model.coupling_head is None else model.coupling_head.context_maps
        forbidden = forbidden_tokens(
            vocab_size, model.config.mask_token_id, model.config.forbidden_token_ids, device
        )
        canvas, noise, starts = draw_windows(
            [self.examples[row] for row in rows],
            self.tokenizer,
            length,
            config.max_extra_windows,
            torch.Generator().manual_seed(seed),
            config.mean_span_length,
        )
        number, kept_state = DTYPES[config.evidence_precision]
        ids = canvas.input_ids.masked_fill(noise.masked, model.config.mask_token_id).to(device)
        real = canvas.attention_mask.to(device)
        with autocast(config.mixed_precision, device):
            states = model.backbone_states(ids, real)
            row, columns = torch.arange(len(ids))[:, None], starts[:, None] + torch.arange(length)
            masked = noise.masked[row, columns]
            window, column = masked.nonzero(as_tuple=True)
            logits = states.logits((window.to(device), columns[window, column].to(device)))
        size = min(config.cache_size, vocab_size)
        kept = TopKEvidence.from_logits(logits, size, config.evidence_temperature, forbidden)
        hidden = before = before_hidden = None
        if maps is not None:
            hidden = states.last_hidden_state[row.to(device), columns.to(device)]
            hidden = hidden.to("cpu", kept_state)
            if maps.copies:
                preceding = model.preceding(states, ids, starts.to(device), real)
                before = preceding.tokens.masked_fill(~preceding.present, -1).int().cpu()
                before_hidden = preceding.hidden.to("cpu", kept_state)
        counts = masked.sum(1)
        return NoisedWindows(
            canvas.input_ids[row, columns].int(),
            masked,
            noise.level,
            torch.cat((counts.new_zeros(1), counts.cumsum(0))),
            hidden,
            before,
            before_hidden,
            kept.indices.int().cpu(),
            kept.log_probs.to("cpu", number),
            kept.log_rest.to("cpu", number),
        )

    @torch.no_grad()
    def pass_idly(self) -> None:
        """A pass over a single token."""
        self.model.backbone_states(torch.zeros(1, 1, dtype=torch.long, device=self.model.device))


def _paths(folder: Path, number: int) -> list[Path]:
    """The files of so many shards."""
    return [folder / f"windows-{i:05d}-of-{number:05d}.safetensors" for i in range(number)]


def _check_room(folder: Path, size: float) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OSError(
            f"The evidence takes about {size / 1e9:.2f} GB and the disk of {str(folder)!r} has "
            f"{free / 1e9:.2f} GB left: make room, give another `evidence_dir`, or lower "
            "`cache_size` or `num_draws`."
        )
