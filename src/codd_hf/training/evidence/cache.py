"""What the frozen backbone says of noised windows: computed once, read at every step of the fit.

The backbone is by far the dearest part of a step and does not change, so it runs over the data a
few times, each with other noise. Kept of a window are its tokens, which of them were hidden, the
hidden states that predicted them, and of each masked position the `k` likeliest tokens with the log
of the remaining mass.

With a folder the evidence is an Arrow dataset there (`evidence_store`), written in shards by all
processes and read by memory mapping. Batches, windows and noise are a function of the settings
alone, so the shards are the same whoever writes them, and a run that stopped writes only those that
are missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ...circuits import CoupledCategorical, TopKEvidence
from ...circuits.factorized import forbidden_tokens
from ...data.canvases import TokenizedExample, batch_indices
from ...data.fingerprint import json_fingerprint, tensor_fingerprint
from ...data.noise import draw_windows
from ...modeling_codd import CoDDModel
from ...modeling_head import CoDDHead
from ...runtime.files import atomic_write
from ...runtime.locks import locked
from ...runtime.precision import autocast, chosen_precision, precision_note
from ..processes.sharding import is_sharded
from ..settings import EvidenceConfig
from .fingerprint import check_fingerprint, evidence_fingerprint, model_fingerprint
from .noised_windows import NoisedWindows
from .store import (
    FINGERPRINT,
    check_room,
    finish,
    open_shards,
    read_fingerprint,
    shard_path,
    write_shard,
)

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
        parts = open_shards(Path(folder))
        fingerprint = read_fingerprint(Path(folder)) or {}
        if "temperature" not in fingerprint:
            raise ValueError(
                f"{str(Path(folder) / FINGERPRINT)!r} does not say what made the evidence: delete "
                "the folder, and it is written anew."
            )
        return cls(parts, fingerprint["temperature"], fingerprint)

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

    @property
    def level(self) -> torch.Tensor:
        """`[N]`, the probability with which each window's tokens were masked."""
        return torch.cat([part.level for part in self.parts])

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

    def distribution(self, head: CoDDHead, rows: torch.Tensor) -> CoupledCategorical:
        """The coupled distributions of some windows `rows [B]`, on the head's device."""
        return self.take(rows).distribution(head, self.temperature)


def bytes_per_window(model: CoDDModel, config: EvidenceConfig) -> float:
    """Bytes that the evidence about a window takes, as expected over the noise levels."""
    length, top_k = model.window_length, min(config.top_k, model.config.vocab_size)
    number, state = (dtype.itemsize for dtype in DTYPES[config.precision])
    masked = 0.5 * length  # the mean of `t ~ U(0, 1)`
    size = length * (4 + 1) + 4 + 2 * 4 + masked * (top_k * (4 + number) + number)
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
    config: EvidenceConfig | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
    *,
    made_by: dict[str, Any] | None = None,
    renew: bool = False,
) -> WindowCache:
    """Runs the backbone over noised examples, one window of each a draw.

    With several processes and a folder, which must be on a disk that they share, each process
    writes its part of the shards; without a folder each computes all of it for itself. The backbone
    may be sharded over the processes (`sharding.shard_backbone`): the evidence is the same.

    Args:
        model: the backbone; hidden states are kept if its head is conditioned.
        tokenizer: its tokenizer.
        examples: the examples.
        config: which windows and noise, and what to keep.
        folder: where the evidence is written, or taken from if it is there; without one it is held
            in memory.
        progress: say how large it will be, and show a progress bar.
        made_by: of the backbone, if `fingerprint.model_fingerprint` is known.
        renew: evidence in the folder that something else made gives way.

    Raises:
        OSError: the disk has no room for it, or another run writes it.
        ValueError: the folder holds evidence that something else made.
    """
    config = config or EvidenceConfig()
    precision = chosen_precision(config.mixed_precision, model.device)
    if config.mixed_precision != "no" and progress and PartialState().is_local_main_process:
        tqdm.write(precision_note(precision, model.device))
    config = replace(config, mixed_precision=precision)
    length = model.window_length
    lengths = [len(e.prompt_ids) + -(-len(e.answer_ids) // length) * length for e in examples]
    batches = [
        (draw, batch)
        for draw in range(config.num_draws)
        for batch in _one_epoch(lengths, config.tokens_per_batch, config.seed + draw)
    ]
    state, number = PartialState(), config.num_draws * len(examples)
    each = bytes_per_window(model, config)
    progress = progress and state.is_local_main_process
    if folder is None:
        wanted = set(range(len(batches)))
        made = _noised_windows(model, tokenizer, examples, config, batches, wanted, progress)
        parts = [windows for _, windows in made]
        return WindowCache([NoisedWindows.joined(parts)], config.temperature)

    folder = Path(folder)
    made_by = model_fingerprint(model, tokenizer) if made_by is None else made_by
    fingerprint = evidence_fingerprint(model, made_by, examples, config)
    complete = (folder / "state.json").exists() and read_fingerprint(folder) == fingerprint
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
                with atomic_write(folder / FINGERPRINT) as new:
                    new.write_text(json.dumps(fingerprint, indent=2))
        state.wait_for_everyone()
        check_fingerprint(folder, read_fingerprint(folder), fingerprint)
        shards = _shards(batches, max(SHARD_BYTES, number * each / MAX_SHARDS) / each)
        missing = [i for i in range(len(shards)) if not shard_path(folder, i, len(shards)).exists()]
        state.wait_for_everyone()  # as above
        if missing:
            left = sum(len(batches[i][1]) for shard in missing for i in shards[shard])
            if progress:
                tqdm.write(_announcement(folder, left, number, length, each))
            check_room(folder, left * each)
            parts_of_work = [missing[i :: state.num_processes] for i in range(state.num_processes)]
            own = parts_of_work[state.process_index]
            last = {shards[shard][-1]: shard for shard in own}
            wanted = {i for shard in own for i in shards[shard]}
            parts: list[NoisedWindows] = []
            made = _noised_windows(model, tokenizer, examples, config, batches, wanted, progress)
            for i, windows in made:
                parts.append(windows)
                if i in last:
                    path = shard_path(folder, last[i], len(shards))
                    write_shard(path, NoisedWindows.joined(parts))
                    parts = []
            if is_sharded(model):
                most = max(sum(len(shards[i]) for i in part) for part in parts_of_work)
                _pass_idly(model, most - len(wanted))
        state.wait_for_everyone()
        if state.is_main_process and not (folder / "state.json").exists():
            finish(folder, len(shards), fingerprint["data"])
        state.wait_for_everyone()
    return WindowCache.open(folder)


@torch.no_grad()
def _noised_windows(
    model: CoDDModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[TokenizedExample],
    config: EvidenceConfig,
    batches: Sequence[tuple[int, list[int]]],
    wanted: set[int],
    progress: bool,
) -> Iterator[tuple[int, NoisedWindows]]:
    """The backbone's evidence about the wanted ones of all batches, each with its number.

    The noise of the other batches is drawn too, so that nobody's depends on who does which.
    """
    device, length, vocab_size = model.device, model.window_length, model.config.vocab_size
    maps = None if model.coupling_head is None else model.coupling_head.context_maps
    forbidden = forbidden_tokens(
        vocab_size, model.config.mask_token_id, model.config.forbidden_token_ids, device
    )
    top_k, offsets = min(config.top_k, vocab_size), torch.arange(length)
    number, kept_state = DTYPES[config.precision]
    bar = tqdm(
        total=sum(len(batches[i][1]) for i in wanted),
        desc="running the backbone",
        unit="window",
        disable=not progress,
    )
    current = generator = None
    for i, (draw, batch) in enumerate(batches):
        if draw != current:
            current, generator = draw, torch.Generator()
            generator.manual_seed(config.seed * 1_000_003 + draw)
        canvas, noise, starts = draw_windows(
            [examples[j] for j in batch],
            tokenizer,
            length,
            config.max_extra_windows,
            generator,
            config.mean_span_length,
        )
        if i not in wanted:
            continue
        ids = canvas.input_ids.masked_fill(noise.masked, model.config.mask_token_id)
        with autocast(config.mixed_precision, device):
            states = model.backbone_states(ids.to(device), canvas.attention_mask.to(device))
            rows, columns = torch.arange(len(ids))[:, None], starts[:, None] + offsets
            masked = noise.masked[rows, columns]
            window, column = masked.nonzero(as_tuple=True)
            logits = states.logits((window.to(device), columns[window, column].to(device)))
        kept = TopKEvidence.from_logits(logits, top_k, config.temperature, forbidden)
        hidden = before = before_hidden = None
        if maps is not None:
            hidden = states.last_hidden_state[rows.to(device), columns.to(device)]
            hidden = hidden.to("cpu", kept_state)
            if maps.copies:
                preceding = model.preceding(
                    states, ids.to(device), starts.to(device), canvas.attention_mask.to(device)
                )
                before = preceding.tokens.masked_fill(~preceding.present, -1).int().cpu()
                before_hidden = preceding.hidden.to("cpu", kept_state)
        counts = masked.sum(1)
        bar.update(len(batch))
        yield (
            i,
            NoisedWindows(
                canvas.input_ids[rows, columns].int(),
                masked,
                noise.level,
                torch.cat((counts.new_zeros(1), counts.cumsum(0))),
                hidden,
                before,
                before_hidden,
                kept.indices.int().cpu(),
                kept.log_probs.to("cpu", number),
                kept.log_rest.to("cpu", number),
            ),
        )
    bar.close()


@torch.no_grad()
def _pass_idly(model: CoDDModel, times: int) -> None:
    """Passes over a single token: a process's part in the passes of others with more work."""
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    for _ in range(times):
        model.backbone_states(token)


def _one_epoch(lengths: list[int], tokens_per_batch: int, seed: int) -> Iterator[list[int]]:
    seen = 0
    for batch in batch_indices(lengths, tokens_per_batch, seed):
        yield batch
        seen += len(batch)
        if seen >= len(lengths):
            return


def _shards(batches: Sequence[tuple[int, list[int]]], windows: float) -> list[list[int]]:
    """The numbers of the batches in each shard, of about so many windows."""
    shards: list[list[int]] = [[]]
    held = 0
    for i, (_, batch) in enumerate(batches):
        if shards[-1] and held + len(batch) > windows:
            shards.append([])
            held = 0
        shards[-1].append(i)
        held += len(batch)
    return shards


def _announcement(folder: Path, left: int, number: int, length: int, each: float) -> str:
    some = "" if left == number else f"{left:,} of "
    return (
        f"Evidence about {some}{number:,} windows of {length} tokens: about "
        f"{left * each / 1e9:.2f} GB ({each / length / 1e3:.2f} GB per million tokens) in {folder}."
    )
