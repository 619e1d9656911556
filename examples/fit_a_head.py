"""Fit a head to a diffusion LM that you have, stage by stage, in Python.

Each of the paper's stages is one function here; `codd-hf train --backbone ...` runs the same ones,
with checkpoints, several processes and a model card. The backbone is never changed. By default it
is the embedded model's, and the text the problems that this model never saw.

    python examples/fit_a_head.py                                        # minutes on 2 CPU cores
    python examples/fit_a_head.py --backbone path/or/id --dataset my.jsonl --output my-head
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from codd_hf import CoDDModel, CoDDPipeline, default_model
from codd_hf.data.canvases import load_examples
from codd_hf.training.fits.conditional import fit_conditional
from codd_hf.training.run import split_examples
from codd_hf.training.settings import ConditionalConfig, GenerativeConfig, TrainConfig
from codd_hf.training.stages import (
    fit_stage_one,
    known_mask_token_id,
    load_start,
    start_of_stage_three,
    tokenize_parts,
)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--backbone", default=default_model(), help="a path or an id on the Hub")
    parser.add_argument("--dataset", default=str(Path(default_model(), "test.jsonl")))
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
    Path(args.output).mkdir(parents=True, exist_ok=True)

    # 1. The backbone, without a head, and the text as it reads it. The last examples are held out.
    model, tokenizer = load_start(args.backbone)
    mask_token_id = known_mask_token_id(config, model, tokenizer)
    train, validation, _ = split_examples(load_examples(args.dataset), args.num_validation, 0)
    train, validation = tokenize_parts(
        config, tokenizer, train, validation, mask_token_id=mask_token_id
    )

    # 2. Stages 1 and 2: a hidden Markov model of the text by EM, from clusters of the backbone's
    #    token embeddings; then its unigram law, which the backbone knows already, is divided out.
    parts = (train, validation, mask_token_id)
    stage_one = fit_stage_one(config, model, tokenizer, *parts, "latest", None)

    # 3. Stage 3: the backbone runs over the data once, and the head is fitted to what it said.
    head = start_of_stage_three(config, model, stage_one)
    model = CoDDModel.from_backbone(model.backbone, head)
    history = fit_conditional(
        model, tokenizer, train, validation, args.output, config.conditional
    )  # a run that was stopped goes on from its checkpoint

    # 4. What it gained. A gain below zero would mean that factorized decoding is better there.
    gains = {name: value for name, value in history[-1].items() if name.startswith("gain")}
    for name, value in gains.items():
        print(f"{name:>15}: {history[0][name]:+.3f} before, {value:+.3f} nats per masked token")

    # 5. The head is a small repository of its own; `push_to_hub` shares it.
    head.save_pretrained(Path(args.output, "head"))
    pipe = CoDDPipeline.from_pretrained(args.backbone, model=model.eval(), tokenizer=tokenizer)
    generator = torch.Generator().manual_seed(0)
    prompt = load_examples(args.dataset)[-1].prompt or "Once upon a time"
    print(pipe(prompt, gen_length=64, num_inference_steps=16, generator=generator).texts[0])
    return gains


if __name__ == "__main__":
    main()
