"""What users do with a backbone of any family: run by `test_families.py`, against the local server.

Each check trains on `tester/KIND`, by id and with no flag but sizes, and comes back to the result.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import checks
import torch

from codd_hf import CoDDPipeline
from codd_hf.cli import main
from codd_hf.coupling.adapters import active_adapter
from tiny import SAMPLING

TEXT = "Tom has 3 boxes"
SMALL = {
    "generative.num_epochs": 1,
    "conditional.max_steps": 20,
    "conditional.windows_per_batch": 4,
    "conditional.num_draws": 1,
    "conditional.num_validation_draws": 1,
    "joint.max_steps": 20,
    "joint.windows_per_batch": 2,
    "joint.lora_rank": 2,
    "joint.num_validation_draws": 1,
    "num_latents": 6,
    "num_validation": 2,
    "num_gap_problems": 1,
}


def texts(pipe: CoDDPipeline) -> list[str]:
    """One in each sampling mode."""
    assert active_adapter(pipe.model) == "default"
    pipe.set_progress_bar_config(disable=True)
    call = {"gen_length": 12, "num_inference_steps": 4, "temperature": 1.0}
    found = [
        pipe(TEXT, sampling=mode, generator=torch.Generator().manual_seed(0), **call)
        for mode in SAMPLING
    ]
    assert all(output.sequences.shape == (1, 12) for output in found)
    return [output.texts[0] for output in found]


def train_and_come_back(kind: str, work: Path) -> None:
    """A head and a LoRA of 20 steps each; pipeline and head are pushed, and loaded by id."""
    name, output = f"tester/{kind}", work / kind
    command = ["train", "--dataset", str(work / "data.jsonl"), "--backbone", name]
    command += ["--output", str(output), "--stages", "generative", "conditional", "joint"]
    command += [part for name, value in SMALL.items() for part in ("--set", f"{name}={value}")]
    assert main([*command, "--push-to-hub", "--hub-model-id", f"{name}-codd"]) == 0
    model = CoDDPipeline.from_pretrained(output / "pipeline").model
    model.save_head(output / "head", push_to_hub=True, repo_id=f"{name}-head")
    for local, shared in (("pipeline", f"{name}-codd"), ("head", f"{name}-head")):
        expected = texts(CoDDPipeline.from_pretrained(output / local))
        found = texts(CoDDPipeline.from_pretrained(shared, cache_dir=work / "new-cache"))
        assert found == expected, shared
    answers = ["evaluate", "answers", "--model", str(output / "pipeline"), "--num-problems", "1"]
    assert main([*answers, "--passes", "32", "--gen-length", "32"]) == 0


if __name__ == "__main__":
    kinds = json.loads(Path(sys.argv[1], "kinds.json").read_text())
    checks.main({f"check_{kind}": partial(train_and_come_back, kind) for kind in kinds})
