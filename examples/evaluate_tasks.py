"""How often a backbone's answers to unseen tasks are right, by kind and number of passes.

    python examples/evaluate_tasks.py runs/tasks/backbone --num-tasks 200 --passes 32 8 4 2

Factorized decoding at temperature 0; 32 passes a window are one token at a time. The standard error
of a share `p` over `n` tasks is `sqrt(p * (1 - p) / n)`.
"""

from __future__ import annotations

import argparse
import math
from itertools import islice

from transformers import AutoTokenizer

from codd_hf import CoDDModel, CoDDPipeline, CoDDScheduler
from codd_hf.data.tasks import KINDS, draw_tasks, is_right

WINDOW, NUM_WINDOWS = 32, 2


def load(backbone: str) -> CoDDPipeline:
    """A pipeline of a backbone that `codd-hf train --stages pretraining` left."""
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    model = CoDDModel.from_backbone(backbone, mask_token_id=tokenizer.mask_token_id)
    pipeline = CoDDPipeline(model=model, scheduler=CoDDScheduler(), tokenizer=tokenizer)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def share_right(pipeline: CoDDPipeline, kind: str, num_tasks: int, passes: int, split: str):
    """The share of tasks that are answered rightly, and its standard error."""
    tasks = list(islice(draw_tasks(split, "evaluation", [kind]), num_tasks))
    special = {*pipeline.tokenizer.all_special_ids} - {pipeline.tokenizer.eos_token_id}
    right = 0
    for first in range(0, num_tasks, 50):
        some = tasks[first : first + 50]
        texts = pipeline(
            [task.question for task in some],
            gen_length=NUM_WINDOWS * WINDOW,
            block_length=WINDOW,
            num_inference_steps=NUM_WINDOWS * passes,
            sampling="factorized",
            temperature=0.0,
            forbidden_token_ids=sorted(special - {pipeline.model.config.mask_token_id}),
        ).texts
        right += sum(is_right(task, text) for task, text in zip(some, texts, strict=True))
    share = right / num_tasks
    return share, math.sqrt(share * (1 - share) / num_tasks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("backbone")
    parser.add_argument("--num-tasks", type=int, default=200, help="of each kind")
    parser.add_argument("--passes", type=int, nargs="+", default=[32], help="a window")
    parser.add_argument("--split", default="validation", help="or test, for figures to report")
    args = parser.parse_args()
    pipeline = load(args.backbone)
    for passes in args.passes:
        for kind in KINDS:
            share, error = share_right(pipeline, kind, args.num_tasks, passes, args.split)
            print(
                f"{passes:3} passes  {kind:14} {100 * share:5.1f} ± {100 * error:.1f} %", flush=True
            )


if __name__ == "__main__":
    main()
