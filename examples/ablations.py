"""What each optional part of the head, of its fit and of decoding earns, on the embedded model.

    python examples/ablations.py --dataset gsm8k_train.jsonl --output ablations.json

Three parts, each written to the output as it goes; a run that stopped is continued by the same
command. Every comparison is on validation problems that nothing here was fitted to.

- `fits`: a head is fitted with and without the part, with the same data, steps and seeds. The
  figure is the gain over factorized prediction in nats per masked token, and its difference from
  the fit without the part, with the standard error over seeds. The command started several times
  with one `--work` shares the fits among them.
- `decoding`: the same prompts are answered with and without the part. The figure is how likely the
  backbone finds the answers when it reveals them one token at a time, in nats per token.
- `speed`: seconds of a product, with and without, in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from codd_hf import CoDDHead, CoDDModel, CoDDPipeline, default_model
from codd_hf.benchmarks.timing import median_seconds
from codd_hf.circuits.numerics import product
from codd_hf.data.canvases import Example, TokenizedExample, load_examples, tokenize_examples
from codd_hf.evaluation.gap import measure_gap
from codd_hf.runtime.environment import environment
from codd_hf.training.evidence.cache import WindowCache, cache_windows
from codd_hf.training.fits.conditional import fit_head
from codd_hf.training.fits.gains import evaluate_head
from codd_hf.training.settings import ConditionalConfig, EvidenceConfig, TrainConfig
from codd_hf.training.stages import fit_stage_one, start_of_stage_three

SEEDS = (0, 1, 2)
BASE = ["latent", "copy"]
FITS = {  # name: (what it is compared with, settings of the run, mean span length of the noise)
    "base": (None, {}, 1.0),
    "noise_conditioning": ("base", {"noise_conditioning": True}, 1.0),
    "mean_span_length 4": ("base", {}, 4.0),
    "stepwise, dense 448": (None, {"update": "stepwise"}, 1.0),
    "anemone, dense 448": ("stepwise, dense 448", {"update": "anemone"}, 1.0),
}

DECODING = {
    "confidence latent": ({"sampling": "latent", "confidence": "latent"}, {"sampling": "latent"}),
    "activation_scope row": (
        {"sampling": "latent", "activation_ratio": 0.7, "activation_scope": "row"},
        {"sampling": "latent", "activation_ratio": 0.7},
    ),
    "windowing centred": (
        {"sampling": "latent", "paradigm": "full", "windowing": "centred"},
        {"sampling": "latent", "paradigm": "full"},
    ),
}
PASSES = (4, 8, 16)


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    output = Path(args.output)
    found = json.loads(output.read_text()) if output.exists() else {}
    found.setdefault("environment", environment())
    found["settings"] = {k: v for k, v in vars(args).items() if k not in ("output", "parts")}

    def keep(part: str, name: str, value) -> None:
        found.setdefault(part, {})[name] = value
        output.write_text(json.dumps(found, indent=2) + "\n")

    for part in args.parts:
        {"fits": fits, "decoding": decoding, "speed": speed}[part](args, found.get(part, {}), keep)
    for name, entry in found.get("fits", {}).items():
        print(f"{name}: {entry}")
    for part in ("decoding", "speed"):
        for name, entry in found.get(part, {}).items():
            print(f"{name}: {entry}")


def fits(args: argparse.Namespace, done: dict, keep: Callable) -> None:
    """Fits every variant of `FITS` with every seed."""
    pipe = CoDDPipeline.from_pretrained(default_model())
    embedded = CoDDHead.from_pretrained(Path(default_model()) / "stage1")
    train, validation = (tokenize_examples(e, pipe.tokenizer) for e in split(args))
    folder = Path(args.work or tempfile.mkdtemp())
    model = CoDDModel.from_backbone(pipe.model.backbone, pipe.model.coupling_head)

    def evidence(name: str, examples: Sequence[TokenizedExample], **settings) -> WindowCache:
        config = EvidenceConfig(top_k=64, temperature=1.15, **settings)
        return cache_windows(model, pipe.tokenizer, examples, config, folder / name)

    held_out = {span: evidence(f"validation-{span}", validation, seed=1234, num_draws=4,
                               mean_span_length=span) for span in (1.0, 4.0)}  # fmt: skip
    seen = {span: evidence(f"train-{span}", train, seed=0, mean_span_length=span)
            for span in (1.0, 4.0)}  # fmt: skip
    results = folder / "results"
    results.mkdir(parents=True, exist_ok=True)
    for seed in SEEDS:
        for name, (_, changes, span) in FITS.items():
            result = results / f"{name}-{seed}.json"
            try:
                result.with_suffix(".claimed").touch(exist_ok=False)
            except FileExistsError:  # done, or being done by the same command beside this one
                continue
            changes = dict(changes)
            update = changes.pop("update", None)
            config = TrainConfig("", str(folder / f"{name}-{seed}"), **changes)
            config.conditional = ConditionalConfig(
                max_steps=args.steps, evidence_temperature=1.15, cached_top_k=64, seed=seed,
                mean_span_length=span, evaluation_steps=10**6, checkpointing_steps=10**6,
            )  # fmt: skip
            config.generative.seed = seed
            stage_one = embedded
            if update is not None:
                config.generative.update = update
                torch.manual_seed(seed)
                stage_one = fit_stage_one(
                    config, model, pipe.tokenizer, train, validation,
                    model.config.mask_token_id, "latest", None,
                )  # fmt: skip
            head = start_of_stage_three(config, model, stage_one)
            cache = seen[span]
            began = time.perf_counter()
            fit_head(head, cache, held_out[1.0], None, config.conditional)
            entry = {"seconds of the fit": time.perf_counter() - began}
            entry["gains"] = evaluate_head(head, held_out[1.0])
            entry["gains in spans of 4"] = evaluate_head(head, held_out[4.0])
            result.write_text(json.dumps(entry))
    found: dict[str, dict] = {}
    for name in FITS:
        for seed in SEEDS:
            if (result := results / f"{name}-{seed}.json").exists():
                for key, value in json.loads(result.read_text()).items():
                    found.setdefault(name, {}).setdefault(key, {})[str(seed)] = value
    for name, (against, _, _) in FITS.items():
        entry = found.get(name, {})
        if against is not None and len(entry.get("gains", {})) == len(SEEDS):
            entry |= {
                "compared with": against,
                "difference": difference(entry, found[against]),
            }
        keep("fits", name, entry)


def difference(entry: dict, base: dict) -> dict:
    """Mean and standard error over seeds of the gain's difference, by kind and mask ratio."""
    result = {}
    for kind in ("gains", "gains in spans of 4"):
        for key in next(iter(base[kind].values())):
            values = [entry[kind][str(s)][key] - base[kind][str(s)][key] for s in SEEDS]
            error = statistics.stdev(values) / len(values) ** 0.5
            result[f"{kind}, {key}"] = [statistics.mean(values), error]
    return result


def decoding(args: argparse.Namespace, done: dict, keep: Callable) -> None:
    """Answers the validation prompts with and without every part of `DECODING`."""
    pipe = CoDDPipeline.from_pretrained(default_model())
    pipe.set_progress_bar_config(disable=True)
    _, validation = split(args)
    for name, sides in DECODING.items():
        if name in done:
            continue
        rows = {}
        for passes in PASSES:
            nats = [answers(pipe, validation[: args.answers], passes, side) for side in sides]
            gains = (nats[1] - nats[0]).double()
            rows[passes] = {
                "nats with": nats[0].mean().item(),
                "nats without": nats[1].mean().item(),
                "gain": gains.mean().item(),
                "standard error": (gains.std() / len(gains) ** 0.5).item(),
            }
        keep("decoding", name, rows)


def answers(
    pipe: CoDDPipeline, examples: Sequence[Example], passes: int, settings: dict
) -> torch.Tensor:
    """Nats per token `[N]` of the first window of each answer, revealed one token at a time."""
    generators = [torch.Generator().manual_seed(i) for i in range(len(examples))]
    ids = []
    for start in range(0, len(examples), 32):
        rows = slice(start, start + 32)
        output = pipe([e.prompt for e in examples[rows]], gen_length=64, block_length=32,
                      num_inference_steps=2 * passes, generator=generators[rows], temperature=1.0,
                      **settings)  # fmt: skip
        ids += output.sequences.tolist()
    eos, pad = pipe.tokenizer.eos_token_id, pipe.tokenizer.pad_token_id
    tokenized = []
    for example, row in zip(examples, ids, strict=True):
        (prompt,) = tokenize_examples([example], pipe.tokenizer)
        answer = [eos if t == pad else t for t in row]
        tokenized.append(TokenizedExample(prompt.prompt_ids, [*answer[:32], eos]))
    values = []
    for example in tokenized:  # one window each, so that rows stay paired
        (row,) = measure_gap(pipe.model, {}, pipe.tokenizer, [example], ratios=[1.0],
                             progress=False)  # fmt: skip
        values.append(row.nats["sequential"])
    return torch.tensor(values)


def speed(args: argparse.Namespace, done: dict, keep: Callable) -> None:
    """Seconds with and without the blocked product."""
    torch.manual_seed(0)
    for rows in (1, 2, 8, 32):
        message, matrix = torch.rand(rows, 1024), torch.rand(1024, 1024)
        sides = {
            "blocked": lambda m=message, w=matrix: product(m, w),
            "plain": lambda m=message, w=matrix: m @ w,
        }
        keep("speed", f"product, {rows} rows", median_seconds(sides, 201, "cpu"))


def split(args: argparse.Namespace) -> tuple[list[Example], list[Example]]:
    """Training and validation problems, as the embedded model's recipe holds them out."""
    examples = load_examples(args.dataset, remove_pattern="<<[^>]*>>")
    return examples[: args.problems], examples[-473:-300]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", required=True, help="GSM8K's training problems, a JSONL file")
    parser.add_argument("--output", default="model_cards/results/ablations.json")
    parser.add_argument("--parts", nargs="+", default=["fits", "decoding", "speed"])
    parser.add_argument("--problems", type=int, default=2000, help="to fit to")
    parser.add_argument("--steps", type=int, default=200, help="of the conditional fit")
    parser.add_argument("--answers", type=int, default=96, help="prompts to answer")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", help="folder for evidence and checkpoints; default: a new one")
    main(parser.parse_args())
