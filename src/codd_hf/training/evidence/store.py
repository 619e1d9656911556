"""Noised windows on disk: an Arrow dataset, read by memory mapping.

A folder holds `fingerprint.json` (what made it), shards `data-00000-of-00012.arrow`, and, once all
shards are there, the two files with which `datasets.load_from_disk` reads it. Each shard is one
record batch, so that its columns are plain arrays in the mapped file: a step reads its rows where
they lie, and nothing else is ever loaded.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from datasets import DatasetInfo, Features, List, Value, load_from_disk
from datasets.arrow_writer import ArrowWriter

from ...runtime.files import atomic_write, read_json
from .noised_windows import NoisedWindows

FINGERPRINT = "fingerprint.json"


def shard_path(folder: Path, shard: int, num_shards: int) -> Path:
    return folder / f"data-{shard:05d}-of-{num_shards:05d}.arrow"


def read_fingerprint(folder: Path) -> dict[str, Any] | None:
    """What made the evidence in a folder; None where nothing says so.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / FINGERPRINT
    return read_json(path) if path.exists() else None


def check_room(folder: Path, size: float) -> None:
    """Raises unless so many bytes have room.

    Raises:
        OSError: they have not.
    """
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OSError(
            f"The evidence takes about {size / 1e9:.2f} GB and the disk of {str(folder)!r} has "
            f"{free / 1e9:.2f} GB left: make room, give another `evidence_dir`, or lower "
            "`cached_top_k` or `num_draws`."
        )


def write_shard(path: Path, windows: NoisedWindows) -> None:
    """Writes one shard; a kill leaves all of it or nothing.

    Raises:
        OSError: there is no room.
    """
    features = _features(windows)
    count = len(windows)
    arrays = {
        "tokens": _fixed(windows.tokens),
        "masked": _fixed(windows.masked.view(torch.uint8)),
        "level": pa.array(windows.level.numpy()),
    }
    for name in ("hidden", "preceding_tokens", "preceding_hidden"):
        column = getattr(windows, name)
        if column is not None:
            arrays[name] = _fixed(_bits(column).reshape(count, -1))
    offsets = pa.array(windows.offsets.int().numpy())
    for name in ("indices", "log_probs"):
        arrays[name] = pa.ListArray.from_arrays(offsets, _fixed(getattr(windows, name)))
    arrays["log_rest"] = pa.ListArray.from_arrays(offsets, pa.array(windows.log_rest.numpy()))
    table = pa.Table.from_arrays(list(arrays.values()), schema=features.arrow_schema)
    with (
        atomic_write(path) as new,
        ArrowWriter(path=str(new), features=features) as writer,
    ):
        writer.write_table(table, writer_batch_size=count)
        writer.finalize()


def finish(folder: Path, num_shards: int, fingerprint: str) -> None:
    """Writes what `datasets.load_from_disk` needs, once all shards are there."""
    first = pa.ipc.open_stream(pa.memory_map(str(shard_path(folder, 0, num_shards))))
    DatasetInfo(features=Features.from_arrow_schema(first.schema)).write_to_directory(str(folder))
    state = {
        "_data_files": [
            {"filename": shard_path(folder, i, num_shards).name} for i in range(num_shards)
        ],
        "_fingerprint": fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    with atomic_write(folder / "state.json") as new:
        new.write_text(json.dumps(state, indent=2))


def open_shards(folder: Path) -> list[NoisedWindows]:
    """The windows of each shard, mapped from disk.

    Raises:
        FileNotFoundError: the folder holds no complete evidence.
        ValueError: a shard is damaged.
    """
    if not (folder / "state.json").exists():
        raise FileNotFoundError(f"{str(folder)!r} holds no complete evidence: write it first.")
    try:
        table = load_from_disk(str(folder)).data
    except (
        pa.ArrowException,
        AttributeError,
        KeyError,
        OSError,
        TypeError,
        ValueError,
    ) as error:
        raise ValueError(
            f"The evidence in {str(folder)!r} is damaged ({error}): delete the folder, and it is "
            "written anew."
        ) from error
    columns = {name: table.column(name).chunks for name in table.column_names}
    shards = []
    for chunk in range(len(columns["tokens"])):
        own = {name: chunks[chunk] for name, chunks in columns.items()}
        length = own["tokens"].type.list_size

        def states(name: str, positions: int, own=own) -> torch.Tensor | None:
            return None if name not in own else _unfixed(own[name], positions)

        before = None if "preceding_tokens" not in own else _unfixed(own["preceding_tokens"])
        shards.append(
            NoisedWindows(
                _unfixed(own["tokens"]),
                _unfixed(own["masked"]).view(torch.bool),
                torch.from_dlpack(own["level"]),
                torch.from_dlpack(own["indices"].offsets),
                states("hidden", length),
                before,
                states("preceding_hidden", 0 if before is None else before.shape[1]),
                _unfixed(own["indices"].values),
                _unfixed(own["log_probs"].values),
                torch.from_dlpack(own["log_rest"].values),
            )
        )
    return shards


def _features(windows: NoisedWindows) -> Features:
    def fixed(column: torch.Tensor, kind: str | None = None) -> List:
        return List(_value(column, kind), length=column[0].numel())

    features = {
        "tokens": fixed(windows.tokens),
        "masked": fixed(windows.masked, "uint8"),
        "level": _value(windows.level),
    }
    for name in ("hidden", "preceding_tokens", "preceding_hidden"):
        column = getattr(windows, name)
        if column is not None:
            features[name] = fixed(column)
    top_k = windows.indices.shape[1]
    for name in ("indices", "log_probs"):
        features[name] = List(List(_value(getattr(windows, name)), length=top_k))
    return Features(features | {"log_rest": List(_value(windows.log_rest))})


def _value(column: torch.Tensor, kind: str | None = None) -> Value:
    return Value(kind or str(_bits(column).dtype).removeprefix("torch."))


def _bits(column: torch.Tensor) -> torch.Tensor:
    """Arrow has no bfloat16: it is kept as the 16-bit integers of the same bits."""
    return column.view(torch.int16) if column.dtype == torch.bfloat16 else column


def _fixed(column: torch.Tensor) -> pa.FixedSizeListArray:
    values = pa.array(column.contiguous().reshape(-1).numpy())
    return pa.FixedSizeListArray.from_arrays(values, column.shape[1])


def _unfixed(column: pa.FixedSizeListArray, positions: int | None = None) -> torch.Tensor:
    """A view `[N, size]` of the file, or the states `[N, positions, size / positions]`."""
    tensor = torch.from_dlpack(column.values).view(-1, column.type.list_size)
    if positions is None:
        return tensor
    if tensor.dtype == torch.int16:
        tensor = tensor.view(torch.bfloat16)
    return tensor.view(len(tensor), positions, -1)
