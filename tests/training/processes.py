"""Runs of training in processes of their own: several that work together, or one to be killed.

The processes are forked from a server that has imported the package once, so that they start in
no time; what they run must be a function that can be imported.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path

import torch
from fitting import new_model
from hmm_cases import random_hmm, sample_windows
from safetensors.torch import save_file

from codd_hf.cli import main
from codd_hf.data.tokenizers import train_tokenizer
from codd_hf.training import (
    Checkpoints,
    ConditionalConfig,
    GenerativeConfig,
    TrainConfig,
    fit_conditional,
    fit_generative,
    train,
)
from tiny import SENTENCES, correlated_examples

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "codd_hf.cli",
        "codd_hf.pipelines.pipeline_codd",
        "codd_hf.training.run",
        "datasets",
        *(f"transformers.models.{name}.modeling_{name}" for name in ("bert", "llama", "qwen2")),
        "transformers.models.roberta.modeling_roberta",
    ]
)


def start(
    function: Callable, *args, processes: int = 1, told_cpu: bool = True
) -> list[multiprocessing.Process]:
    """Starts `function(*args)` in so many processes, as `torchrun` would.

    Unless `told_cpu`, Accelerate is not told to use the CPU.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        variables = {"OMP_NUM_THREADS": "1"} | ({"ACCELERATE_USE_CPU": "true"} if told_cpu else {})
        if processes > 1:
            variables |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        process = CONTEXT.Process(target=_run, args=(variables, function, args), daemon=True)
        process.start()
        started.append(process)
    return started


def run(function: Callable, *args, processes: int = 1, **launch: bool) -> None:
    """Runs it to the end, and fails if one of the processes does."""
    started = start(function, *args, processes=processes, **launch)
    for process in started:
        process.join(120)
    assert [process.exitcode for process in started] == [0] * processes


def _run(variables: dict[str, str], function: Callable, args: tuple) -> None:
    os.environ.update(variables)
    torch.set_num_threads(1)
    function(*args)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def main_process_saves(tensors: dict[str, torch.Tensor], path: Path) -> None:
    if os.environ.get("RANK", "0") == "0":
        save_file(tensors, path)


def checkpoints(folder: Path | None, stage: str) -> Checkpoints | None:
    return None if folder is None else Checkpoints(folder / stage)


def em(folder: Path, kept_in: Path | None, epochs: int) -> None:
    """An EM run; writes its parameters, and the log-likelihoods of its steps."""
    windows = sample_windows(random_hmm(4, 24, 2.0), 120, 6)
    embeddings = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
    config = GenerativeConfig(
        num_epochs=epochs,
        windows_per_batch=40,
        windows_per_chunk=8,
        checkpointing_steps=1,
    )
    scores = []

    def log(_: int, values: dict[str, float]) -> None:
        scores.append(values["loss"])

    kept = checkpoints(kept_in, "generative")
    parts = (windows[:100], windows[100:], embeddings, 4, config)
    potentials, _ = fit_generative(*parts, kept, log)
    leaves = {str(i): leaf.exp() for i, leaf in enumerate(potentials.leaves())}
    scores = torch.tensor(scores, dtype=torch.float64)
    main_process_saves(leaves | {"scores": scores}, folder / "em.safetensors")


def conditional(folder: Path, kept_in: Path | None, stop_at: int = 0) -> None:
    """A conditional fit; writes the head and the losses of its steps, unless it is to stop."""
    config = ConditionalConfig(
        max_steps=12,
        tokens_per_batch=128,
        windows_per_batch=10,
        windows_per_chunk=4,
        learning_rate=0.1,
        context_learning_rate=0.02,
        warmup_steps=2,
        num_draws=2,
        num_validation_draws=1,
        evaluation_steps=4,
        checkpointing_steps=1,
    )
    tokenizer = train_tokenizer(SENTENCES, vocab_size=300)
    model = new_model(tokenizer, ("latent", "copy"))
    losses, gains = [], []

    def log(step: int, values: dict[str, float]) -> None:
        if step == stop_at:
            os._exit(0)
        losses.append(values["loss"])
        gains.append(values["gain"])

    history = fit_conditional(
        model,
        tokenizer,
        correlated_examples(41),
        correlated_examples(13, seed=1),
        config,
        checkpoints(kept_in, "conditional"),
        log,
    )
    curves = {
        "losses": torch.tensor(losses),
        "gains": torch.tensor(gains),
        "validation": torch.tensor([entry["gain"] for entry in history]),
    }
    tensors = {k: v.detach() for k, v in model.coupling_head.named_parameters()}
    main_process_saves(tensors | curves, folder / "conditional.safetensors")


def whole_run(folder: Path) -> None:
    """EM, the evidence and the conditional fit, each continued from where it stopped."""
    em(folder, folder, 4)
    conditional(folder, folder)
    (folder / "done").touch()


def whole_training(config: TrainConfig) -> None:
    """All stages of a run."""
    train(config)


def command(arguments: list[str]) -> None:
    """The console command."""
    if main(["train", *arguments]) != 0:
        raise SystemExit(1)
