"""From a plain text file to a coupled model: tokenizer, backbone, head, pipeline, model card.

A small masked diffusion LM is trained on the text, then a head is fitted to it, and both become a
pipeline that generates. Without `--text` a story is made up, so that it can be tried.

    python examples/text_to_pipeline.py                                  # minutes on 2 CPU cores
    python examples/text_to_pipeline.py --text book.txt --output runs/book --push you/book

`codd-hf train --dataset book.txt --sample-by paragraph --packing ...` is the same.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch

from codd_hf import CoDDPipeline
from codd_hf.training import (
    ConditionalConfig,
    GenerativeConfig,
    PretrainingConfig,
    TrainConfig,
    train,
)

WHO = ("The old king", "A young fox", "My grandmother", "The tall sailor", "A quiet child")
DID = ("walked to", "dreamt of", "ran away from", "sang about", "came back to")
WHERE = ("San Diego", "New York", "the Black Forest", "Las Vegas", "the Dead Sea")


def made_up_text(number: int = 600) -> str:
    """Paragraphs of three sentences, whose places are of words that belong together."""
    draw = random.Random(0)
    parts = (WHO, DID, WHERE)
    said = [" ".join(map(draw.choice, parts)) + "." for _ in range(3 * number)]
    return "\n\n".join(" ".join(said[i : i + 3]) for i in range(0, len(said), 3))


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--text", help="a .txt file, its paragraphs apart by empty lines")
    parser.add_argument("--output", default="runs/text_to_pipeline")
    parser.add_argument("--push", metavar="YOU/NAME", help="push the pipeline to this repository")
    parser.add_argument("--pretraining-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=200, help="of the conditional fit")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> list[str]:
    """Trains, and returns what the pipeline says in two passes, factorized and coupled."""
    args = arguments(argv)
    if args.text is None:
        args.text = str(Path(args.output, "story.txt"))
        Path(args.output).mkdir(parents=True, exist_ok=True)
        Path(args.text).write_text(made_up_text())
    config = TrainConfig(
        dataset=args.text,
        output_dir=args.output,
        sample_by="paragraph",  # what is held out, and where end-of-text stands
        packing=True,  # paragraphs are joined, and cut into pieces of `max_length` tokens
        max_length=128,
        num_validation=50,
        vocab_size=400,
        hidden_size=128,
        num_layers=2,
        num_latents=32,
        pretraining=PretrainingConfig(max_steps=args.pretraining_steps, tokens_per_batch=2048),
        generative=GenerativeConfig(num_epochs=10, windows_per_batch=64),
        conditional=ConditionalConfig(max_steps=args.steps),
        push_to_hub=args.push is not None,
        hub_model_id=args.push,
    )
    folder = train(config)  # the same call again goes on where it stopped
    history = json.loads(Path(args.output, "conditional", "history.json").read_text())
    print(f"Gain over factorized prediction: {history[-1]['gain']:+.3f} nats per masked token.")

    pipe = CoDDPipeline.from_pretrained(folder)
    texts = []
    for sampling in ("factorized", pipe.scheduler.config.sampling):
        output = pipe(
            "The old king",
            gen_length=32,
            num_inference_steps=2,
            sampling=sampling,
            temperature=1.0,
            generator=torch.Generator().manual_seed(0),
            use_chat_template=False,  # the text has no questions and answers
        )
        texts.append(output.texts[0])
        print(f"{sampling:>10}: {texts[-1]}")
    return texts


if __name__ == "__main__":
    main()
