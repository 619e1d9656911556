"""A large head takes little more memory than its file when it is loaded, twice that when converted.

Measured in a process of its own as the highest resident size that Linux saw (`VmHWM`) less the
resident size before; weights are read once, since the file is mapped and counts when it is touched.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from jpc_files import hmm_nodes, write

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
SCRIPT = """
import sys
import torch
from codd_hf import CoDDHead, CoDDHeadConfig
from codd_hf.conversion import convert_jpc

def resident(name):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(x for x in lines if x.startswith(name + ":")).split()[1])

circuit, folder, warm = sys.argv[1:]
CoDDHead(CoDDHeadConfig(vocab_size=8, num_latents=2)).save_pretrained(warm)
CoDDHead.from_pretrained(warm)  # what a first call imports and keeps is no part of the head
for make, path in ((convert_jpc, circuit), (CoDDHead.from_pretrained, folder)):
    open("/proc/self/clear_refs", "w").write("5")
    before = resident("VmRSS")
    head = make(path)
    with torch.no_grad():
        for row in (head.initial, *head.transition, *head.emission, head.token_marginal):
            row.sum()
    print(resident("VmHWM") - before, head.emission.dtype)
    del head
"""


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
    command = [sys.executable, "-c", SCRIPT, str(circuit), str(tmp_path / "head")]
    command.append(str(tmp_path / "warm"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for line, file, most in zip(
        done.stdout.splitlines(), (circuit, weights), (2.3, 1.3), strict=True
    ):
        peak, dtype = line.split()
        size = file.stat().st_size
        assert size > 4 * vocab_size * num_latents
        assert dtype == "torch.float32"
        assert 0.9 < int(peak) / size < most
