"""How many tokens the predictions of a window share: what `codd-hf bench` imitates.

    python examples/listed_tokens.py --model path/to/causal-model --dataset my.jsonl

Reads a text with a causal language model, lists the 64 likeliest
tokens of every prediction, and says which share of the tokens listed in a window of 32 positions,
and in eight windows, are distinct.
"""

from __future__ import annotations

import argparse
import random

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from codd_hf.data.sources import load_examples

WINDOW, LISTED, LENGTH = 32, 64, 2048


def distinct_share(windows: list[torch.Tensor]) -> float:
    """Distinct tokens over listed ones, of lists `[WINDOW, LISTED]`."""
    together = torch.cat(windows)
    return len(together.unique()) / together.numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a causal language model: path or id")
    parser.add_argument("--dataset", default="tasks", help="a file, an id on the Hub, or tasks")
    parser.add_argument("--gguf-file", help="a GGUF file of it")
    args = parser.parse_args()
    files = {} if args.gguf_file is None else {"gguf_file": args.gguf_file}
    tokenizer = AutoTokenizer.from_pretrained(args.model, **files)
    model = AutoModelForCausalLM.from_pretrained(args.model, **files).eval()
    examples = load_examples(args.dataset)
    text = "\n\n".join(f"{example.prompt}\n{example.answer}" for example in examples)
    ids = tokenizer(text[: 8 * LENGTH], return_tensors="pt")["input_ids"][:, :LENGTH]
    with torch.no_grad():
        listed = model(ids).logits[0].topk(LISTED, -1).indices
    windows = [w for w in listed.split(WINDOW) if len(w) == WINDOW]
    one = [distinct_share([window]) for window in windows]
    draw = random.Random(0)
    eight = [distinct_share(draw.sample(windows, 8)) for _ in range(50)]
    print(f"{ids.shape[1]} tokens, vocabulary {model.config.vocab_size}, {LISTED} tokens listed")
    print(f"distinct in a window of {WINDOW}: {100 * sum(one) / len(one):.0f} %")
    print(f"distinct in eight windows: {100 * sum(eight) / len(eight):.0f} %")


if __name__ == "__main__":
    main()
