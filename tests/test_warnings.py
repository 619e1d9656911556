"""Promise of the commands: no warning, of ours or of a library that we call, in normal runs."""

from __future__ import annotations

import subprocess
import sys

from tiny_pipeline import tiny_pipeline

SHORT = ["--gen-length", "8", "--block-length", "4", "--num-inference-steps", "2"]


def train_arguments(data, folder) -> list[str]:
    """All stages, the joint one with a LoRA and gradient checkpointing."""
    sizes = {
        "num-validation": 8,
        "num-test": 8,
        "num-gap-problems": 2,
        "num-latents": 4,
        "window-length": 4,
        "generative-num-epochs": 1,
        "conditional-max-steps": 2,
    }
    settings = (
        "vocab_size=300",
        "hidden_size=32",
        "num_layers=1",
        "pretraining.max_steps=2",
        "joint.max_steps=2",
    )
    stages = ["pretraining", "generative", "conditional", "joint"]
    argv = ["train", "--dataset", str(data), "--output", str(folder / "run"), "--stages", *stages]
    argv += [part for setting in settings for part in ("--set", setting)]
    return argv + [part for name, value in sizes.items() for part in (f"--{name}", str(value))]


def test_normal_runs_are_quiet(cities_jsonl, tmp_path):
    pipe, folder = tiny_pipeline(), tmp_path / "pipeline"
    pipe.model.backbone.config.max_position_embeddings = 256  # questions of tasks are long
    pipe.save_pretrained(folder)
    model = ["--model", str(folder)]
    commands = [
        ["demo", *model, "--num-tasks", "2", "--passes", "1"],
        ["generate", "hello", *model, *SHORT],
        train_arguments(cities_jsonl, tmp_path),
    ]
    code = f"from codd_hf.cli import main; print([main(argv) for argv in {commands!r}])"
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300)
    assert done.stdout.endswith("[0, 0, 0]\n"), done.stderr
    told = (done.stdout + done.stderr).lower()
    assert not any(word in told for word in ("warning", "deprecated")), done.stderr
