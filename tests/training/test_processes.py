"""Promises of training over processes, and of runs that are killed."""

from __future__ import annotations

import random
import time
from pathlib import Path

import processes
import pytest
import torch
from safetensors.torch import load_file

import launch


def results(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / f"{name}.safetensors")


def folders(tmp_path: Path, *names: str) -> list[Path]:
    made = [tmp_path / name for name in names]
    for folder in made:
        folder.mkdir()
    return made


def test_em_over_two_processes_gives_the_counts_of_one(tmp_path):
    one, two = folders(tmp_path, "one", "two")
    launch.run(processes.em, one, None, 4)
    launch.run(processes.em, two, None, 4, processes=2)
    alone, together = results(one, "em"), results(two, "em")
    assert len(alone["scores"]) == 12
    for name, tensor in alone.items():
        assert torch.allclose(together[name], tensor, rtol=1e-6, atol=0)


@pytest.mark.parametrize("on_disk", [True, False])
def test_conditional_fit_over_two_processes_has_the_curve_of_one(tmp_path, on_disk):
    one, two = folders(tmp_path, "one", "two")
    launch.run(processes.conditional, one, one if on_disk else None)
    where = two if on_disk else None
    launch.run(processes.conditional, two, where, processes=2)
    alone, together = results(one, "conditional"), results(two, "conditional")
    assert len(alone["losses"]) == 12
    assert alone["losses"][-1] < alone["losses"][0] - 0.01
    for name in ("losses", "gains", "validation"):
        assert torch.allclose(together[name], alone[name], rtol=0, atol=1e-4)
    for name, tensor in alone.items():
        assert torch.allclose(together[name], tensor, rtol=0, atol=1e-4), name


def test_em_over_two_processes_is_continued_by_one_and_back(tmp_path):
    whole, parts = folders(tmp_path, "whole", "parts")
    launch.run(processes.em, whole, None, 6)
    for number, epochs in ((2, 2), (1, 4), (2, 6)):
        launch.run(processes.em, parts, parts, epochs, processes=number)
    for name, tensor in results(whole, "em").items():
        if name != "scores":
            assert torch.allclose(results(parts, "em")[name], tensor, rtol=1e-6, atol=0)


def test_conditional_fit_over_two_processes_is_continued_by_one_and_back(tmp_path):
    whole, parts = folders(tmp_path, "whole", "parts")
    launch.run(processes.conditional, whole, None)
    for number, stop_at in ((2, 5), (1, 8), (2, 0)):
        launch.run(processes.conditional, parts, parts, stop_at, processes=number)
    alone, together = results(whole, "conditional"), results(parts, "conditional")
    for name in alone.keys() - {"losses", "gains"}:
        assert torch.allclose(together[name], alone[name], rtol=0, atol=1e-4), name


@pytest.mark.parametrize("enough", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_runs_killed_at_random_moments_end_bit_equal_to_an_undisturbed_one(tmp_path, enough):
    (undisturbed,) = folders(tmp_path, "undisturbed")
    launch.run(time.sleep, 0)  # so that the time is that of the run
    began = time.monotonic()
    launch.run(processes.whole_run, undisturbed)
    longest = time.monotonic() - began
    draw, kills, rounds = random.Random(0), 0, 0
    while kills < enough:
        rounds += 1
        (folder,) = folders(tmp_path, f"round{rounds}")
        while not (folder / "done").exists():
            (process,) = launch.start(processes.whole_run, folder)
            process.join(draw.uniform(0.1, 0.6) * longest)
            if process.is_alive():
                process.kill()
                kills += 1
            process.join()
            assert process.exitcode in (0, -9)
        for name in ("em", "conditional"):
            for key, tensor in results(undisturbed, name).items():
                # What a process tells of its steps ends with the process.
                if key not in ("scores", "losses", "gains"):
                    assert torch.equal(results(folder, name)[key], tensor), key
