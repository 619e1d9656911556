"""A large head takes little more memory than its file when it is loaded, twice that when converted.

Measured in a process of its own as the highest resident size that Linux saw (`VmHWM`) less the
resident size before; weights are read once, since the file is mapped and counts when it is touched.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from jpc_files import hmm_nodes, write

import launch
from codd_hf import CoDDHead, CoDDHeadConfig
from codd_hf.conversion import convert_jpc

STATUS = Path("/proc/self/status")
LINUX = pytest.mark.skipif(not STATUS.exists(), reason="resident sizes are read from Linux's /proc")
SIZES = pytest.mark.parametrize(
    ("vocab_size", "num_latents"),
    [
        pytest.param(32768, 512, id="64MB"),
        pytest.param(126464, 1024, id="LLaDA-8B", marks=pytest.mark.slow),
    ],
)


def resident(name: str) -> int:
    line = next(x for x in STATUS.read_text().splitlines() if x.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def measure(circuit: Path, folder: Path, report: Path) -> None:
    """The peaks and dtypes of a conversion and of loading, in a process of its own."""
    warm, found = report.with_name("warm"), []
    CoDDHead(CoDDHeadConfig(vocab_size=8, num_latents=2)).save_pretrained(warm)
    CoDDHead.from_pretrained(warm)  # what a first call imports and keeps is no part of the head
    for make, path in ((convert_jpc, circuit), (CoDDHead.from_pretrained, folder)):
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        head = make(path)
        with torch.no_grad():
            for row in (head.initial, *head.transition, *head.emission, head.token_marginal):
                row.sum()
        found.append((resident("VmHWM") - before, str(head.emission.dtype)))
        del head
    report.write_text(json.dumps(found))


@LINUX
@SIZES
def test_a_head_takes_at_most_1_3_times_its_file_and_its_conversion_twice_that(
    vocab_size, num_latents, tmp_path
):
    flat = np.full((num_latents, max(num_latents, vocab_size)), 1 / num_latents, np.float32)
    square, emission = flat[:, :num_latents].copy(), flat[:, :vocab_size] * num_latents / vocab_size
    circuit = write(tmp_path / "model.jpc", hmm_nodes(square[0], [square], [emission], 32))
    convert_jpc(circuit).save_pretrained(tmp_path / "head")
    weights = tmp_path / "head" / "model.safetensors"
    report = tmp_path / "report.json"
    launch.run(measure, circuit, tmp_path / "head", report)
    files, bounds = (circuit, weights), (2.3, 1.3)
    for (peak, dtype), file, most in zip(
        json.loads(report.read_text()), files, bounds, strict=True
    ):
        size = file.stat().st_size
        assert size > 4 * vocab_size * num_latents
        assert dtype == "torch.float32"
        assert 0.9 < peak / size < most
