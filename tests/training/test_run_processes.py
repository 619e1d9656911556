"""Promises of whole training runs over processes, and of commands that are killed."""

from __future__ import annotations

import json
import random
import time
from dataclasses import replace
from pathlib import Path

import processes
import pytest
import torch
from safetensors.torch import load_file

import launch
from codd_hf.training import Checkpoints, TrainConfig


@pytest.fixture(scope="module")
def short_config(trained_config) -> TrainConfig:
    """All stages, a few steps of each."""
    return replace(
        trained_config,
        pretraining=replace(trained_config.pretraining, max_steps=6),
        generative=replace(trained_config.generative, num_epochs=3, windows_per_chunk=8),
        conditional=replace(
            trained_config.conditional,
            max_steps=8,
            windows_per_batch=24,
            windows_per_chunk=8,
            learning_rate=0.02,
            evaluation_steps=1,
        ),
    )


def last_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    return Checkpoints(folder).load({})[0]


@pytest.fixture(scope="module")
def one_process(short_config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    launch.run(processes.whole_training, replace(short_config, output_dir=str(folder)))
    return folder


def test_run_over_two_processes_is_that_of_one(short_config, one_process, tmp_path):
    config = replace(short_config, output_dir=str(tmp_path))
    # Without a GPU nobody has to tell Accelerate that CPUs are meant.
    launch.run(processes.whole_training, config, processes=2, told_cpu=False)
    alone, together = (last_checkpoint(f / "generative") for f in (one_process, tmp_path))
    counts = [name for name in alone if name.startswith("counts.")]
    assert len(counts) == 3
    for name in counts:
        assert torch.allclose(together[name], alone[name], rtol=1e-6, atol=0)
    curves = [
        json.loads((folder / "conditional" / "history.json").read_text())
        for folder in (one_process, tmp_path)
    ]
    assert [entry["step"] for entry in curves[0]] == list(range(9))
    for ours, theirs in zip(*curves, strict=True):
        for name in ours.keys() - {"seconds"}:
            assert theirs[name] == pytest.approx(ours[name], abs=1e-4)
    for name in ("backbone/model", "generative/head/model", "conditional/head/model"):
        files = [load_file(f / f"{name}.safetensors") for f in (one_process, tmp_path)]
        assert files[0].keys() == files[1].keys()
        for key, tensor in files[0].items():
            assert torch.allclose(files[1][key], tensor, atol=1e-4), key
    written = [
        sorted(str(p.relative_to(f)) for p in (f / "pipeline").rglob("*") if p.is_file())
        for f in (one_process, tmp_path)
    ]
    assert written[0] == written[1]


@pytest.mark.parametrize(
    ("enough", "noise"),
    [
        (1, "mask"),
        pytest.param(25, "mask", marks=pytest.mark.slow),
        pytest.param(8, "uniform", marks=pytest.mark.slow),
    ],
)
def test_command_killed_at_random_moments_ends_bit_equal_to_an_undisturbed_one(
    cities_jsonl, tmp_path, enough, noise
):
    arguments = ["--dataset", str(cities_jsonl), "--num-validation", "16"]
    settings = {
        "vocab_size": 300,
        "hidden_size": 64,
        "num_layers": 1,
        "generative.windows_per_batch": 32,
        "generative.checkpointing_steps": 1,
        "pretraining.noise": noise,
    }
    for stage, steps in (("pretraining", 12), ("conditional", 24)):
        few = {"max_steps": steps, "checkpointing_steps": 1, "evaluation_steps": 4}
        few |= {"tokens_per_batch": 512}
        settings |= {f"{stage}.{name}": value for name, value in few.items()}
    arguments += [word for pair in settings.items() for word in ("--set", "{}={}".format(*pair))]
    arguments += ["--num-latents", "8", "--window-length", "4", "--generative-num-epochs", "3"]
    launch.run(time.sleep, 0)  # so that the time is that of the run
    began = time.monotonic()
    launch.run(processes.command, [*arguments, "--output", str(tmp_path / "undisturbed")])
    longest = time.monotonic() - began
    draw, kills, rounds, exit_code = random.Random(0), 0, 0, 0
    while kills < enough:
        rounds += 1
        exit_code = None
        while exit_code != 0:
            argv = [*arguments, "--output", str(tmp_path / f"round{rounds}")]
            (process,) = launch.start(processes.command, argv)
            process.join(draw.uniform(0.2, 0.8) * longest)
            if process.is_alive():
                process.kill()
                kills += 1
            process.join()
            exit_code = process.exitcode
            assert exit_code in (0, -9)
        for name in ("backbone", "generative/head", "conditional/head", "pipeline/model"):
            ours, theirs = (
                load_file(tmp_path / run / name / "model.safetensors")
                for run in ("undisturbed", f"round{rounds}")
            )
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
