"""Fit a head to a diffusion LM that you have, stage by stage, in Python.

Each of the paper's stages is one function here; `codd-hf train --backbone ...` runs the same ones,
with checkpoints, several processes and a model card. The backbone is never changed. By default it
is the embedded model's, and the text a thousand tasks.

    python examples/fit_a_head.py                                        # minutes on 2 CPU cores
    python examples/fit_a_head.py --backbone path/or/id --dataset my.jsonl --output my-head
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from codd_hf import CoDDPipeline, default_model
from codd_hf.training import (
    Checkpoints,
    ConditionalConfig,
    GenerativeConfig,
    TrainConfig,
    load_examples,
)
from codd_hf.training.inputs import split_examples
from codd_hf.training.run import Run, condition_head, fit_circuit


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--backbone", default=default_model(), help="a path or an id on the Hub")
    parser.add_argument("--dataset", default="tasks", help="a file, an id on the Hub, or tasks")
    parser.add_argument("--split", default="train[:1000]")
    parser.add_argument("--output", default="runs/fit_a_head")
    parser.add_argument("--num-validation", type=int, default=60)
    parser.add_argument("--num-latents", type=int, default=128, help="states of the circuit")
    parser.add_argument("--epochs", type=int, default=10, help="of EM")
    parser.add_argument("--draws", type=int, default=4, help="windows of each example")
    parser.add_argument("--steps", type=int, help="of the conditional fit; default: by the data")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Fits a head, saves it, and generates with it.

    Returns:
        The validation gain at the end: nats per masked token over factorized prediction, of all
        windows and by the share of tokens that was masked.
    """
    args = arguments(argv)
    config = TrainConfig(
        dataset=args.dataset,
        output_dir=args.output,
        backbone=args.backbone,
        num_latents=args.num_latents,
        conditioning=["latent", "copy"],  # the context steers the circuit; [] for a static one
        generative=GenerativeConfig(num_epochs=args.epochs, windows_per_batch=128),
        conditional=ConditionalConfig(max_steps=args.steps, num_draws=args.draws),
    )

    # 1. The backbone, without a head, and the text as it reads it. The last examples are held out.
    examples = load_examples(args.dataset, split=args.split)
    run = Run(config, split_examples(examples, args.num_validation, 0))

    # 2. A hidden Markov model of the text by EM, from states that tell a text's future from its
    #    past; its unigram distribution, which the backbone knows already, is divided out.
    fit_circuit(run, Checkpoints(Path(args.output, "generative")))

    # 3. The backbone runs over the data once, and the head is fitted to its predictions. A run that
    #    was stopped goes on from its checkpoint.
    history, (head,) = condition_head(run, Checkpoints(Path(args.output, "conditional")))

    # 4. What it gained. A gain below zero would mean that factorized decoding is better there.
    gains = {name: value for name, value in history[-1].items() if name.startswith("gain")}
    for name, value in gains.items():
        print(f"{name:>15}: {history[0][name]:+.3f} before, {value:+.3f} nats per masked token")

    # 5. The head is a small repository of its own; `push_to_hub` shares it.
    head.save_pretrained(Path(args.output, "head"))
    parts = {"model": run.model.eval(), "tokenizer": run.start.tokenizer}
    pipe = CoDDPipeline.from_pretrained(args.backbone, **parts)
    generator = torch.Generator().manual_seed(0)
    prompt = examples[-1].prompt or "Once upon a time"
    print(pipe(prompt, generator=generator).texts[0])
    return gains


if __name__ == "__main__":
    main()
