"""The predictions of a frozen backbone about noised windows: computed once, read at every step.

The backbone is by far the dearest part of a step and does not change, so it runs over the data a
few times, each with other noise. With a folder the evidence is safetensors shards there, written by
all processes and read by memory mapping. A batch's windows and noise are a function of its number
and the settings alone, so the shards are the same whoever writes them, and a run that stopped
writes only those that are missing.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ...data.canvases import TokenizedExample, epoch_batches
from ...data.fingerprint import data_fingerprint, json_fingerprint, tensor_fingerprint
from ...modeling_codd import CoDDModel
from ...modeling_head import CoDDHead
from ...runtime.files import atomic_write, read_json
from ...runtime.locks import locked
from ...runtime.precision import chosen_precision, precision_note
from ..identity import backbone_identity, check_same
from ..processes.sharding import is_sharded
from ..stage_settings import ConditionalConfig
from .live_windows import LiveWindows
from .noised_windows import NoisedWindows
from .scores import WindowScores

SHARD_BYTES = 128 * 2**20
MAX_SHARDS = 1024
SEEDS = 1_000_003
"""More than there are batches: the noise of two seeds has nothing in common."""
FINGERPRINT = "fingerprint.json"
SETTINGS = (
    "max_extra_windows",
    "mean_span_length",
    "evidence_temperature",
    "tokens_per_batch",
    "mixed_precision",
)
"""The settings that evidence depends on as they are."""


@dataclass
class WindowCache:
    """Evidence about `N` noised windows, in memory or on disk.

    Attributes:
        parts: the windows; several parts count as one after the other.
        temperature: the evidence temperature of the predictions.
        fingerprint: what made it, if it is on disk.
    """

    parts: list[NoisedWindows]
    temperature: float
    fingerprint: dict[str, Any] | None = None

    @classmethod
    def open(cls, folder: str | Path) -> WindowCache:
        """Evidence that `cache_windows` wrote; needs no backbone.

        Raises:
            FileNotFoundError: the folder holds no complete evidence.
            ValueError: it is damaged.
        """
        folder = Path(folder)
        if (shards := _complete(folder)) is None:
            raise FileNotFoundError(f"{str(folder)!r} holds no complete evidence: write it first.")
        fingerprint = _fingerprint(folder) or {}
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


def cache_windows(
    model: CoDDModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[TokenizedExample],
    config: ConditionalConfig | None = None,
    folder: str | Path | None = None,
    *,
    num_draws: int = 1,
    seed: int = 0,
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
        examples: the text.
        config: the noise, and the size of what is kept.
        folder: where the evidence is written, or taken from if it is there; without one it is held
            in memory.
        num_draws: how often each example is drawn, each time with another window and other noise.
        seed: of windows and noise.
        made_by: the backbone's identity, if it was read already.
        renew: evidence in the folder that something else made gives way.

    Raises:
        OSError: the disk has no room for it, or another run writes it.
        ValueError: the folder holds evidence that something else made.
    """
    config = (config or ConditionalConfig()).at_temperature_of(model.coupling_head)
    state, length = PartialState(), model.window_length
    progress = state.is_local_main_process
    precision = chosen_precision(config.mixed_precision, model.device)
    if config.mixed_precision != "no" and progress:
        tqdm.write(precision_note(precision, model.device))
    config = replace(config, mixed_precision=precision)
    lengths, size = [e.length(length) for e in examples], config.tokens_per_batch
    rows = [part for draw in range(num_draws) for part in epoch_batches(lengths, size, seed + draw)]
    batches = list(enumerate(rows, seed * SEEDS))  # with the seeds of their noise

    def read(batch: tuple[int, list[int]]) -> NoisedWindows:
        part = [examples[row] for row in batch[1]]
        drawn = LiveWindows.drawn(part, tokenizer, length, config, batch[0])
        return drawn.predictions(model, config)

    bar = {"desc": "running the backbone", "unit": "batch", "disable": not progress}
    if folder is None:
        held = NoisedWindows.joined([read(batch) for batch in tqdm(batches, **bar)])
        return WindowCache([held], config.evidence_temperature)

    folder = Path(folder)
    if made_by is None:
        made_by = backbone_identity(model.backbone, tokenizer, model.config.mask_token_id)
    head = model.coupling_head
    maps = None if head is None else head.context_maps
    fingerprint = made_by | {
        "forbidden_token_ids": sorted(model.config.forbidden_token_ids or []),
        "examples": data_fingerprint(examples),
        "window_length": length,
        "hidden_states": maps is not None,
        "copy_length": head.config.copy_length if maps is not None and maps.copies else 0,
        **{name: getattr(config, name) for name in SETTINGS},
        "cache_size": min(config.cache_size, model.config.vocab_size),
        "num_draws": num_draws,
        "seed": seed,
    }
    complete = _complete(folder) is not None and _fingerprint(folder) == fingerprint
    state.wait_for_everyone()  # all have looked before the first one writes
    if complete:
        return WindowCache.open(folder)
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock", f"The evidence in {str(folder)!r}", state):
        if state.is_main_process:
            _claim(folder, fingerprint, renew)
        state.wait_for_everyone()
        remedy = "give another `evidence_dir`, or delete this one"
        what = f"The evidence in {str(folder)!r} was"
        check_same(what, _fingerprint(folder), fingerprint, remedy)
        first = read(batches[0])
        each, total = first.size / len(first), num_draws * len(examples)
        number = min(len(batches), MAX_SHARDS, -(-int(total * each) // SHARD_BYTES))
        cuts = [i * len(batches) // number for i in range(number + 1)]
        shards = [batches[begin:end] for begin, end in itertools.pairwise(cuts)]
        paths = _paths(folder, number)
        missing = [i for i, path in enumerate(paths) if not path.exists()]
        state.wait_for_everyone()  # as above
        left = sum(len(rows) for i in missing for _, rows in shards[i])
        if progress:
            tqdm.write(
                f"Evidence about {left:,} of {total:,} windows of {length} tokens: about "
                f"{left * each / 1e9:.2f} GB ({each / length / 1e3:.2f} GB per million tokens) "
                f"in {folder}."
            )
        _check_room(folder, left * each)
        work = [missing[i :: state.num_processes] for i in range(state.num_processes)]
        passes = [sum(len(shards[i]) for i in part) for part in work]
        with tqdm(total=passes[state.process_index], **bar) as shown:
            for i in work[state.process_index]:
                parts = []
                for batch in shards[i]:
                    parts.append(read(batch))
                    shown.update()
                NoisedWindows.joined(parts).write(paths[i])
        if is_sharded(model):  # each process has a part in every pass of the others
            for _ in range(max(passes) - passes[state.process_index]):
                read(batches[0])
        state.wait_for_everyone()
    return WindowCache.open(folder)


def _claim(folder: Path, fingerprint: dict[str, Any], renew: bool) -> None:
    """Writes what makes the evidence, unless something else made it that shall stay."""
    if renew and _fingerprint(folder) not in (None, fingerprint):
        tqdm.write(f"The evidence in {folder} is of something else, and is deleted.")
        for path in (*folder.glob("windows-*"), folder / FINGERPRINT):
            path.unlink()
    if _fingerprint(folder) is None:
        with atomic_write(folder / FINGERPRINT) as new:
            new.write_text(json.dumps(fingerprint, indent=2))


def _check_room(folder: Path, size: float) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OSError(
            f"The evidence takes about {size / 1e9:.2f} GB and the disk of {str(folder)!r} has "
            f"{free / 1e9:.2f} GB left: make room, give another `evidence_dir`, or lower "
            "`cache_size` or `num_draws`."
        )


def _paths(folder: Path, number: int) -> list[Path]:
    """The files of so many shards."""
    return [folder / f"windows-{i:05d}-of-{number:05d}.safetensors" for i in range(number)]


def _complete(folder: Path) -> list[Path] | None:
    """The files of the evidence in a folder, if all are there."""
    found = sorted(folder.glob("windows-*-of-*.safetensors"))
    if found and found == _paths(folder, int(found[0].stem.rpartition("-")[2])):
        return found
    return None


def _fingerprint(folder: Path) -> dict[str, Any] | None:
    path = folder / FINGERPRINT
    return read_json(path) if path.exists() else None
