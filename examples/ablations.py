"""What each optional part of the head and its fit earns, on the embedded model.

    python examples/ablations.py --dataset gsm8k_train.jsonl

Each variant is fitted with three seeds to the same evidence; figures are gains in nats per masked
token on the validation windows, and differences with their standard error over seeds. The other
figures in `model_cards/results/ablations.json` are of options that left: the same command at commit
b1a2548 measures them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from codd_hf import CoDDHead, CoDDModel, CoDDPipeline, default_model
from codd_hf.data.canvases import Example, TokenizedExample, tokenize_examples
from codd_hf.runtime.environment import environment
from codd_hf.training import ConditionalConfig, TrainConfig, fit_head, load_examples
from codd_hf.training.evidence.cache import WindowCache, cache_windows
from codd_hf.training.fits.conditional import evaluate_head
from codd_hf.training.stages import conditioned

SEEDS = (0, 1, 2)
FITS = {  # name: (what it is compared with, settings of the run, mean span length of the noise)
    "base": (None, {}, 1.0),
    "noise_conditioning": ("base", {"noise_conditioning": True}, 1.0),
    "mean_span_length 4": ("base", {}, 4.0),
}


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    output = Path(args.output)
    found = json.loads(output.read_text()) if output.exists() else {}
    found.setdefault("environment", environment())
    found["settings"] = {k: v for k, v in vars(args).items() if k != "output"}
    measured = fits(args)
    for name, (against, _, _) in FITS.items():
        if against is not None:
            measured[name] |= {
                "compared with": against,
                "difference": difference(measured[name], measured[against]),
            }
        print(f"{name}: {measured[name]}")
    found.setdefault("fits", {}).update(measured)
    output.write_text(json.dumps(found, indent=2) + "\n")


def fits(args: argparse.Namespace) -> dict[str, dict]:
    """Fits every variant of `FITS` with every seed."""
    pipe = CoDDPipeline.from_pretrained(default_model())
    circuit = CoDDHead.from_pretrained(Path(default_model()) / "stage1")
    train, validation = (tokenize_examples(e, pipe.tokenizer) for e in split(args))
    folder = Path(args.work or tempfile.mkdtemp())
    model = CoDDModel.from_backbone(pipe.model.backbone, pipe.model.coupling_head)
    settings = {"cache_size": 64, "evidence_temperature": 1.15}

    def evidence(name: str, examples: list[TokenizedExample], span: float, **draws) -> WindowCache:
        config = ConditionalConfig(mean_span_length=span, **settings)
        place = folder / f"{name}-{span}"
        return cache_windows(model, pipe.tokenizer, examples, config, place, **draws)

    spans = (1.0, 4.0)
    held_out = {s: evidence("validation", validation, s, seed=1234, num_draws=4) for s in spans}
    seen = {s: evidence("train", train, s) for s in spans}
    found: dict[str, dict] = {}
    for seed in SEEDS:
        for name, (_, changes, span) in FITS.items():
            config = TrainConfig("", str(folder), **changes)
            config.conditional = ConditionalConfig(
                max_steps=args.steps, seed=seed, evaluation_steps=10**6, **settings
            )
            head = conditioned(config, model, circuit)
            began = time.perf_counter()
            fit_head(head, seen[span], held_out[1.0], config.conditional)
            entry = {
                "seconds of the fit": time.perf_counter() - began,
                "gains": evaluate_head(head, held_out[1.0]),
                "gains in spans of 4": evaluate_head(head, held_out[4.0]),
            }
            for key, value in entry.items():
                found.setdefault(name, {}).setdefault(key, {})[str(seed)] = value
    return found


def difference(entry: dict, base: dict) -> dict:
    """Mean and standard error over seeds of the gain's difference, by kind and mask ratio."""
    result = {}
    for kind in ("gains", "gains in spans of 4"):
        for key in next(iter(base[kind].values())):
            values = [entry[kind][str(s)][key] - base[kind][str(s)][key] for s in SEEDS]
            error = statistics.stdev(values) / len(values) ** 0.5
            result[f"{kind}, {key}"] = [statistics.mean(values), error]
    return result


def split(args: argparse.Namespace) -> tuple[list[Example], list[Example]]:
    """Training and validation problems, as the embedded model's recipe holds them out."""
    examples = load_examples(args.dataset, remove_pattern="<<[^>]*>>")
    return examples[: args.problems], examples[-473:-300]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", required=True, help="GSM8K's training problems, a JSONL file")
    parser.add_argument("--output", default="model_cards/results/ablations.json")
    parser.add_argument("--problems", type=int, default=2000, help="to fit to")
    parser.add_argument("--steps", type=int, default=200, help="of the conditional fit")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", help="folder for evidence; default: a new one")
    main(parser.parse_args())
