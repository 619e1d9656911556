"""The predictions of a frozen backbone about noised windows: computed once, read at every step.

A batch's windows and noise are a function of its number and the settings alone, so evidence is the
same whoever writes it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..data.canvases import TokenizedExample, epoch_batches
from ..data.fingerprint import data_fingerprint, json_fingerprint
from ..data.rows import tell
from ..modeling_codd import CoDDModel
from ..modeling_head import CoDDHead
from ..runtime.files import atomic_write
from .settings import ConditionalConfig
from .windows import NoisedCanvases, NoisedWindows, WindowScores, score_all

SHARD_BATCHES = 32
SEEDS = 1_000_003
"""More than there are batches: the noise of two seeds has nothing in common."""
OF_EVIDENCE = ("max_extra_windows", "mean_span_length", "tokens_per_batch", "mixed_precision")
"""The settings that evidence depends on as they are."""


@dataclass
class Evidence:
    """A backbone's predictions about noised windows of examples, made when they are first read.

    With a folder they are memory-mapped safetensors in a subfolder of it, one for each `identity`,
    which all processes write together; what is there is not written again. Otherwise each process
    holds all of them.

    Attributes:
        model: the backbone, and a head, whose temperature evidence has and whose conditioning says
            whether hidden states are kept.
        tokenizer: the backbone's.
        examples: the text.
        config: the noise, and the size of what is kept.
        backbone: its identity.
        folder: where it is kept; in memory if None.
        num_draws: how often each example is drawn, each time with another window and other noise.
        seed: of windows and noise.
    """

    model: CoDDModel
    tokenizer: PreTrainedTokenizerBase
    examples: Sequence[TokenizedExample]
    config: ConditionalConfig
    backbone: dict[str, Any]
    folder: Path | None = None
    num_draws: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        model, head = self.model, self.model.coupling_head
        assert head is not None
        maps, self.temperature = head.context_maps, head.config.evidence_temperature
        self.identity = self.backbone | {
            "forbidden_token_ids": sorted(model.config.forbidden_token_ids or []),
            "data": data_fingerprint(self.examples),
            "window_length": model.window_length,
            "hidden_states": maps is not None,
            "copy_length": head.config.copy_length if maps and maps.copies else 0,
            "evidence_temperature": self.temperature,
            "cache_size": min(self.config.cache_size, model.config.vocab_size),
            **{name: getattr(self.config, name) for name in OF_EVIDENCE},
            "num_draws": self.num_draws,
            "seed": self.seed,
        }

    @cached_property
    def parts(self) -> list[NoisedWindows]:
        """The windows; all processes ask for them together, and write what is missing."""
        lengths = [example.length(self.model.window_length) for example in self.examples]
        size, seeds = self.config.tokens_per_batch, range(self.seed, self.seed + self.num_draws)
        rows = [part for seed in seeds for part in epoch_batches(lengths, size, seed)]
        batches = list(enumerate(rows, self.seed * SEEDS))
        if self.folder is None:
            return [self._read(batches, "evidence")]
        folder, state = self.folder / json_fingerprint(self.identity), PartialState()
        folder.mkdir(parents=True, exist_ok=True)
        files = {
            folder / f"windows-{first:06d}.safetensors": batches[first : first + SHARD_BATCHES]
            for first in range(0, len(batches), SHARD_BATCHES)
        }
        missing = [path for path in files if not path.exists()]
        state.wait_for_everyone()  # all have looked before the first one writes
        for path in missing[state.process_index :: state.num_processes]:
            windows = self._read(files[path], path.stem)
            with atomic_write(path) as new:
                save_file(windows.columns, new)
            if path == missing[0]:
                left = sum(len(rows) for path in missing for _, rows in files[path])
                size = path.stat().st_size * left // len(windows)
                tell(f"Evidence about {left:,} windows: about {size / 1e9:.2f} GB in {folder}.")
        state.wait_for_everyone()
        try:
            return [NoisedWindows(load_file(path)) for path in files]
        except SafetensorError as error:
            raise ValueError(
                f"The evidence in {str(folder)!r} is damaged ({error}): delete the folder, and it "
                "is written anew."
            ) from error

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def take(self, rows: torch.Tensor) -> NoisedWindows:
        """Some windows, `rows [B]`, in that order."""
        begins = torch.tensor([0, *itertools.accumulate(map(len, self.parts))])
        owner = torch.searchsorted(begins, rows, right=True) - 1
        found = [self.parts[i].take(rows[owner == i] - begins[i]) for i in owner.unique().tolist()]
        return NoisedWindows.joined(found).take(owner.argsort(stable=True).argsort())

    def scores(self, head: CoDDHead, rows: torch.Tensor) -> WindowScores:
        """The gains of a head on some windows `rows [B]`."""
        return self.take(rows).scores(head, self.temperature)

    def evaluate(self, head: CoDDHead) -> dict[str, float]:
        """Mean gain in nats per masked token over factorized, all and by mask ratio."""
        chunks = torch.arange(len(self)).split(self.config.windows_per_chunk)
        return score_all(chunks, lambda _, rows: self.scores(head, rows)).gains()

    def _read(self, batches: Sequence[tuple[int, list[int]]], name: str) -> NoisedWindows:
        """The predictions about batches, each the seed of its noise and its examples' rows."""
        size, shown = self.identity["cache_size"], PartialState().is_local_main_process
        parts, read = [], (self.model, self.tokenizer)
        for seed, rows in tqdm(batches, name, unit="batch", leave=False, disable=not shown):
            canvases = NoisedCanvases(*read, [self.examples[i] for i in rows], self.config, seed)
            parts.append(canvases.predictions(size, self.temperature))
        return NoisedWindows.joined(parts)
