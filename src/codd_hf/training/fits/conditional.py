"""The fit of a head to the predictions of a frozen backbone about noised windows: its evidence.

Only `log p_w(x) - log Z` depends on the circuit; its gradient is counts under the data minus counts
under the coupled model. So evidence is computed once, and read at every step. A batch's windows and
noise are a function of its number and the settings alone: it is the same whoever writes it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ...backbones import block_length_of
from ...circuits import DenseEvidence, ListedEvidence, Preceding, forbidden_tokens
from ...data.canvases import TokenizedExample, epoch_batches
from ...data.fingerprint import (
    data_fingerprint,
    identity_of,
    json_fingerprint,
    weights_fingerprint,
)
from ...data.noise import canvas_unit
from ...data.sources import tell
from ...modeling_codd import CoDDModel
from ...modeling_head import CoDDHead
from ...runtime.files import atomic_write
from ..checkpoints import Checkpoints
from ..loop import VALIDATION_SEED, Figures, History, Log, announced_precision
from ..settings import ConditionalConfig
from ..windows import CoupledFit, NoisedCanvases, WindowScores, score_all

OF_THE_HEAD = ("num_latents", "emission", "emission_rank", "conditioning")
"""Settings of the head to fit, which a run is continued with."""
DENSE_VOCABULARY = 16384
"""Up to this many tokens evidence is laid out in full: one product is faster than many gathers."""
SHARD_BATCHES = 32
SEEDS = 1_000_003
"""More than there are batches: the noise of two seeds has nothing in common."""
OF_EVIDENCE = (
    "max_extra_windows",
    "mean_span_length",
    "infill",
    "tokens_per_batch",
    "mixed_precision",
)
"""The settings that evidence depends on as they are."""


def fit_conditional(
    model: CoDDModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[TokenizedExample],
    validation: Sequence[TokenizedExample],
    config: ConditionalConfig | None = None,
    checkpoints: Checkpoints | None = None,
    log: Log | None = None,
) -> History:
    """Trains `model.coupling_head`, best that of the generative fit, in place.

    The frozen backbone runs over the data first, unless all steps were made already; its evidence
    is kept in `evidence` beside the folder of the checkpoints, and in memory if there is none. The
    history has the `gain`: nats per masked token over factorized prediction, all and by mask ratio.
    """
    config = (config or ConditionalConfig()).with_steps(len(train))
    config = replace(config, mixed_precision=announced_precision(config))  # type: ignore[arg-type]
    folder = None if checkpoints is None else checkpoints.folder.parent / "evidence"
    fit = _HeadFit(model.eval(), tokenizer, train, validation, config, folder)
    return fit.run(checkpoints, log)


@dataclass
class _HeadFit(CoupledFit):
    """Steps of a head on evidence."""

    config: ConditionalConfig
    folder: Path | None
    name = "conditional fit"

    def __post_init__(self) -> None:
        super().__post_init__()
        config, identity = self.config, identity_of(self.model, self.tokenizer)

        def evidence(part: Sequence[TokenizedExample], draws: int, seed: int) -> Evidence:
            read = self.model, self.tokenizer, part, config, identity
            return Evidence(*read, self.folder, draws, seed)

        self.evidence = evidence(self.train, config.num_draws, config.seed)
        self.measured = evidence(self.validation, config.num_validation_draws, VALIDATION_SEED)
        identity = {name: getattr(self.head.config, name) for name in OF_THE_HEAD}
        identity |= self.evidence.identity
        identity["validation_data"] = self.measured.identity["data"]
        identity["start"] = weights_fingerprint(self.head.state_dict())
        self.set_up(identity, self.head, [self.optimizer()])

    def chunks(self, number: int) -> Sequence[torch.Tensor]:
        rows = self.rows_of_step(len(self.evidence), number)
        return [chunk.sort().values for chunk in rows.split(self.config.windows_per_chunk)]

    def scores(self, rows: torch.Tensor, seed: int) -> WindowScores:
        return self.evidence.scores(self.head, rows)

    def measure(self) -> Figures:
        return self.measured.evaluate(self.head)


@dataclass
class NoisedWindows:
    """`N` noised windows of length `L`, with `M` predicted positions in all, and what is predicted.

    Attributes:
        columns: `tokens [N, L]` (int32, the true ones), `masked [N, L]` (those that are predicted),
            `level [N]` (the probability with which they were replaced), `present [N, L]`
            of a block-causal backbone (those that were seen or predicted); of the masked
            positions, window by window, the likeliest tokens `indices [M, k]` (int32), their
            `log_probs [M, k]` (float16, off by at most 1/2048 of themselves) and `log_rest [M]`,
            the log of the remaining mass; for a head with conditioning `hidden [N, L, d]`
            (bfloat16), and for "copy" the `preceding_tokens [N, C]` (int32, -1 where there is none)
            and `preceding_hidden [N, C, d]`.
    """

    columns: dict[str, torch.Tensor]

    def __len__(self) -> int:
        return len(self.columns["level"])

    @cached_property
    def offsets(self) -> torch.Tensor:
        """`[N + 1]`, where each window's masked positions begin and end among all `M`."""
        sizes = self.columns["masked"].sum(1)
        return torch.cat((torch.zeros(1, dtype=torch.long), sizes.cumsum(0)))

    def take(self, rows: torch.Tensor) -> NoisedWindows:
        """Some windows, `rows [B]`, in that order."""
        ends = zip(self.offsets[rows].tolist(), self.offsets[rows + 1].tolist(), strict=True)
        places = torch.cat([torch.arange(*pair) for pair in ends])
        by_place = ("indices", "log_probs", "log_rest")
        return NoisedWindows(
            {name: t[places if name in by_place else rows] for name, t in self.columns.items()}
        )

    @classmethod
    @torch.no_grad()
    def read(cls, canvases: NoisedCanvases, size: int) -> NoisedWindows:
        """The backbone's `size` likeliest tokens; hidden states if the head is conditioned."""
        model, places, device = canvases.model, canvases.columns, canvases.ids.device
        config, head = model.config, model.coupling_head
        assert head is not None
        maps, temperature = head.context_maps, head.config.evidence_temperature
        window, place = canvases.masked.nonzero(as_tuple=True)
        with canvases.autocast:
            states = canvases.states()
            logits = states.logits((window.to(device), places[window, place].to(device)))
        never = (config.vocab_size, config.mask_token_id, config.forbidden_token_ids, device)
        kept = ListedEvidence.from_logits(logits, size, temperature, forbidden_tokens(*never))
        columns = {
            "tokens": canvases.truth.int(),
            "masked": canvases.masked,
            "level": canvases.level,
            "indices": kept.indices.int(),
            "log_probs": kept.log_probs.half(),
            "log_rest": kept.log_rest[..., 0].half(),
        }
        if block_length_of(config.text_config) is not None:
            columns["present"] = canvases.present
        if maps is not None:
            rows = torch.arange(len(places), device=device)[:, None]
            columns["hidden"] = states.last_hidden_state[rows, places.to(device)].bfloat16()
        if maps is not None and maps.copies:
            where = canvases.ids, canvases.starts, canvases.mask
            before = model.preceding(states, *where, predicted=canvases.predicted)
            columns["preceding_tokens"] = before.tokens.masked_fill(~before.present, -1).int()
            columns["preceding_hidden"] = before.hidden.bfloat16()
        return cls({name: column.cpu() for name, column in columns.items()})

    @classmethod
    def joined(cls, parts: Sequence[NoisedWindows]) -> NoisedWindows:
        """All windows of some parts, in order."""
        names = parts[0].columns
        return cls({name: torch.cat([part.columns[name] for part in parts]) for name in names})

    def scores(self, head: CoDDHead) -> WindowScores:
        """The gains of a head, whose temperature is that of the predictions."""
        held, device, preceding = self.columns, head.device, None
        temperature = head.config.evidence_temperature
        masked, truth = held["masked"], held["tokens"].long().to(device)

        def laid_out(values: torch.Tensor, fill: float) -> torch.Tensor:
            out = values.new_full((*masked.shape, *values.shape[1:]), fill)
            out[masked] = values
            return out.to(device)

        # Half precision costs a prediction its normalisation.
        kept = torch.cat((held["log_probs"], held["log_rest"][:, None]), -1).float().log_softmax(-1)
        log_probs, log_rest = laid_out(kept[:, :-1], 0), laid_out(kept[:, -1:], -torch.inf)
        indices = laid_out(held["indices"].long(), 0)
        listed = ListedEvidence(indices, log_probs, log_rest, temperature)
        evidence: ListedEvidence | DenseEvidence = listed
        if (head.config.vocab_size or 0) <= DENSE_VOCABULARY:
            evidence = listed.laid_out(head.log_spread)
        if "preceding_tokens" in held:
            before = held["preceding_tokens"].long().to(device)
            states = held["preceding_hidden"].to(device)
            preceding = Preceding(before.clamp(min=0), before >= 0, states)
        distribution = head(
            evidence,
            tokens=truth,
            observed=~masked.to(device),
            last_hidden_state=held["hidden"].to(device) if "hidden" in held else None,
            present=held["present"].to(device) if "present" in held else None,
            temperature=temperature,
            preceding=preceding,
        )
        gain, count = distribution.coupling_gain(truth), distribution.masked.sum(1)
        return WindowScores(held["level"].to(device), count, gain, torch.zeros_like(gain))


@dataclass
class Evidence:
    """A backbone's predictions about noised windows of examples, made when they are first read.

    With a folder they are memory-mapped safetensors in a subfolder of it, one for each `identity`,
    which all processes write together; what is there is not written again. Otherwise each process
    holds all of them.

    Attributes:
        model: the backbone, and a head: evidence has its temperature, and hidden states if the head
            is conditioned.
        examples: each is drawn `num_draws` times, with another window and other noise.
        backbone: its identity.
        folder: where it is kept; in memory if None.
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
        maps = head.context_maps
        self.identity = self.backbone | {
            "forbidden_token_ids": sorted(model.config.forbidden_token_ids or []),
            "data": data_fingerprint(self.examples),
            "window_length": model.window_length,
            "hidden_states": maps is not None,
            "copy_length": head.config.copy_length if maps and maps.copies else 0,
            "evidence_temperature": head.config.evidence_temperature,
            "cache_size": min(self.config.cache_size, model.config.vocab_size),
            **{name: getattr(self.config, name) for name in OF_EVIDENCE},
            "num_draws": self.num_draws,
            "seed": self.seed,
        }
        if (block := block_length_of(model.config.text_config)) is not None:
            self.identity["block_length"] = block

    @cached_property
    def parts(self) -> list[NoisedWindows]:
        """The windows; all processes ask for them together, and write what is missing."""
        unit = canvas_unit(self.model.config.text_config, self.model.window_length)
        lengths = [example.length(unit) for example in self.examples]
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
        return self.take(rows).scores(head)

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
            parts.append(NoisedWindows.read(canvases, size))
        return NoisedWindows.joined(parts)
