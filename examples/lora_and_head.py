"""LoRA plus head: a coupled model learns a text with its backbone and its head together.

The start is a pipeline that has a fitted head: the embedded default, or what `codd-hf train
--backbone YOURS ...` wrote. A low-rank adapter is put on the backbone (by PEFT) and trained with
the head on the coupled likelihood; the result is a pipeline folder again, with the adapter in
`model/adapter/`, beside the backbone's own weights.

    python examples/lora_and_head.py                                   # a few minutes, 2 CPU cores
    python examples/lora_and_head.py --model runs/mine/pipeline --dataset my.jsonl --steps 300

With `--compare` the head alone is trained from the same start, on the same windows for as many
steps, and held-out text says which of the two is better.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from codd_hf import CoDDPipeline, default_model
from codd_hf.data.canvases import tokenize_examples
from codd_hf.evaluation.statistics import Estimate, ratio
from codd_hf.training import Checkpoints, JointConfig, fit_joint, load_examples
from codd_hf.training.inputs import split_examples
from codd_hf.training.windows import window_scores


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default=default_model(), help="a pipeline folder")
    parser.add_argument("--dataset", default="tasks", help="a file, an id on the Hub, or tasks")
    parser.add_argument("--split", default="train[:1000]")
    parser.add_argument("--remove-pattern", help="deleted from the text, such as '<<[^>]*>>'")
    parser.add_argument("--output", default="runs/lora_and_head")
    parser.add_argument("--num-validation", type=int, default=30)
    parser.add_argument("--num-test", type=int, default=30)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--windows", type=int, default=16, help="windows of text a step")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA")
    parser.add_argument("--draws", type=int, default=4, help="windows of each held-out example")
    parser.add_argument("--compare", action="store_true", help="train the head alone as well")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, Estimate]:
    """Trains, saves and compares.

    Returns:
        By how many nats per masked token of the test examples one model is better than another.
    """
    args = arguments(argv)

    # 1. The text, tokenized as the model reads it; the last examples are held out.
    tokenizer = CoDDPipeline.from_pretrained(args.model).tokenizer
    options = {"split": args.split, "remove_pattern": args.remove_pattern}
    examples = load_examples(args.dataset, **options)
    parts = split_examples(examples, args.num_validation, args.num_test)
    train, validation, test = (tokenize_examples(part, tokenizer) for part in parts)

    # 2. The same training with an adapter and, to compare, with a frozen backbone.
    scores = {}
    for backbone in ("lora", "frozen") if args.compare else ("lora",):
        pipe = CoDDPipeline.from_pretrained(args.model)
        on_gpu = torch.cuda.is_available()
        if not on_gpu:  # there the plain attention has the faster backward pass
            pipe.model.backbone.set_attn_implementation("eager")
        config = JointConfig(
            backbone=backbone,
            lora_rank=args.rank,
            max_steps=args.steps,
            windows_per_batch=args.windows,
            num_validation_draws=args.draws,
            evaluation_steps=max(args.steps, 1),
            mixed_precision="auto",
        )
        folder = Path(args.output, backbone)
        if "start" not in scores:
            scores["start"] = window_scores(pipe.model, tokenizer, test, config, args.draws)
        checkpoints = Checkpoints(folder / "joint")  # where a run that was stopped goes on from
        fit_joint(pipe.model, tokenizer, train, validation, config, checkpoints)
        scores[backbone] = window_scores(pipe.model, tokenizer, test, config, args.draws)
        pipe.save_pretrained(folder / "pipeline")

    # 3. What was gained, on text that neither training nor any choice has seen.
    for name, score in scores.items():
        print(name, {key: round(value, 4) for key, value in score.summary().items()})
    pairs = [("lora", "start"), ("frozen", "start"), ("lora", "frozen")]
    result = {}
    for one, other in (pair for pair in pairs if scores.keys() >= set(pair)):
        gained = scores[one].log_prob - scores[other].log_prob
        examples = [x.view(args.draws, -1).sum(0) for x in (gained, scores[one].masked)]
        result[f"{one} over {other}"] = ratio(*examples)
        print(f"{one} over {other}: {ratio(*examples):+.4f} nats per masked token")
    print(f"The coupled model is in {args.output}/lora/pipeline.")
    return result


if __name__ == "__main__":
    main()
