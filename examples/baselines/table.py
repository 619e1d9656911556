"""What else one could do on the same backbone: rivals of a CoDD head, in one table.

    python examples/baselines/table.py --model runs/tasks/pipeline

The folder holds a pipeline with a head. Every method may fit for the processor seconds that the
head took (`grpo x10` for ten times as many) and has its settings chosen on validation tasks, those
that are best at 4 passes a window. Test tasks follow, at temperature 0. The figures go to a JSON
file, method by method: run the command again to go on after a stop, or with other `--methods`.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from adjust import fit_adjust
from common import Backbone, load_backbone
from copula import Copula, fit_copula
from demask import Demask, fit_demask
from grpo import fit_grpo
from loop import Answering, Factorized, answering, score

from codd_hf.data.tasks import KINDS

PASSES = (1, 2, 4, 8, 16, 32)
TUNED_AT = 4
Choice = dict[str, Any]


@dataclass
class Method:
    """A rival.

    Attributes:
        answer: makes it answer, given the backbone, what was fitted, and a choice of settings.
        fit: fits something, given the backbone, seconds and a seed; None if nothing is fitted.
        share: of the head's seconds that it may fit.
        choices: settings among which validation tasks decide.
    """

    answer: Callable[[Backbone, Any, Choice], Answering]
    fit: Callable[[Backbone, float, int], Any] | None = None
    share: float = 1.0
    choices: Sequence[Choice] = field(default_factory=lambda: ({},))


def codd(backbone: Backbone, _: None, choice: Choice) -> Answering:
    """The library's pipeline with its head."""

    def answer(questions: Sequence[str], passes: int, num_windows: int) -> list[str]:
        never = [token for token in backbone.never.tolist() if token != backbone.mask_id]
        return backbone.pipeline(
            list(questions),
            gen_length=num_windows * backbone.window,
            block_length=backbone.window,
            num_inference_steps=num_windows * passes,
            temperature=0.0,
            forbidden_token_ids=never,
            **choice,
        ).texts

    return answer


def copula(num_layers: int | None, choices: Sequence[Choice] = ({},)) -> Method:
    """A copula with so many of the backbone's layers; None: all of them."""

    def fit(backbone: Backbone, seconds: float, seed: int) -> torch.nn.Module:
        layers = num_layers or backbone.model.config.text_config.num_hidden_layers
        return fit_copula(backbone, seconds, layers, seed)

    return Method(lambda b, fitted, c: answering(b, Copula(fitted, **c)), fit, choices=choices)


def copula_alone(backbone: Backbone, fitted: torch.nn.Module, _: Choice) -> Answering:
    """The autoregressive model without the backbone, which has no use for a second pass."""
    answer = answering(backbone, Copula(fitted, alpha=0.0))
    return lambda questions, passes, num_windows: answer(questions, 1, num_windows)


def of_factorized(backbone: Backbone, fitted: Backbone | None, choice: Choice) -> Answering:
    """Factorized decoding of the backbone, or of a fine-tuned one."""
    return answering(fitted or backbone, Factorized(**choice))


ORDERS = tuple({"order": order} for order in ("confidence", "margin", "entropy"))
COPULAS = (
    {"reading": "causal", "order": "left_to_right"},
    {"reading": "causal", "order": "surest", "alpha": 0.5},
    {"reading": "exact", "order": "surest"},
    {"reading": "exact", "order": "surest", "alpha": 0.5},
)
METHODS = {
    "factorized": Method(of_factorized, choices=ORDERS),
    "codd": Method(codd, choices=({}, {"sampling": "any_order"}, {"sampling": "latent"})),
    "copula, 2 layers": copula(2, COPULAS),
    "copula, all layers": copula(None, COPULAS),
    "copula alone, all layers": replace(copula(None), answer=copula_alone),
    "adjust": Method(lambda b, layer, c: answering(b, layer), fit_adjust),
    "demask": Method(
        lambda b, head, c: answering(b, Demask(head, **c)),
        fit_demask,
        choices=tuple({"threshold": threshold} for threshold in (0.0, 0.5, 0.8)),
    ),
    "grpo x1": Method(of_factorized, fit_grpo, choices=ORDERS),
    "grpo x10": Method(of_factorized, fit_grpo, share=10.0, choices=ORDERS),
}


def measure(method: Method, name: str, backbone: Backbone, args: argparse.Namespace) -> dict:
    """Fits a method, chooses its settings on validation tasks, and marks its test answers."""
    fitted, began = None, time.process_time()
    if method.fit is not None:
        fitted = method.fit(backbone, method.share * args.head_seconds, args.seed)
    seconds = time.process_time() - began
    if name == "codd":
        fitted, seconds = backbone.model.coupling_head, args.head_seconds
    network = fitted.model if isinstance(fitted, Backbone) else fitted
    parameters = 0 if network is None else sum(p.numel() for p in network.parameters())
    best, choice = -1.0, method.choices[0]
    for tried in method.choices if len(method.choices) > 1 else ():
        answer = method.answer(backbone, fitted, tried)
        marked = [
            score(backbone, answer, kind, TUNED_AT, args.num_validation, "validation")
            for kind in KINDS
        ]
        mean = sum(row["accuracy"] for row in marked) / len(marked)
        print(f"{name}: {100 * mean:.1f} % of validation tasks with {tried}", flush=True)
        if mean > best:
            best, choice = mean, tried
    rows, answer = [], method.answer(backbone, fitted, choice)
    for passes in args.passes:
        for kind in KINDS:
            marked = score(backbone, answer, kind, passes, args.num_tasks, "test")
            rows.append({"passes": passes, "kind": kind, **marked})
            print(f"{name}: {passes} passes, {kind}: {100 * marked['accuracy']:.1f} %", flush=True)
    return {
        "choice": choice,
        "fit_seconds": round(seconds, 1),
        "parameters": parameters,
        "rows": rows,
    }


def table(results: dict[str, Any]) -> str:
    """The figures in Markdown: means over the kinds, each of equal weight."""
    passes = results["passes"]
    names = ["", "fit, s", "parameters", f"s per answer at {TUNED_AT}", *map(str, passes)]
    lines = [names, ["---"] * len(names)]
    for name, entry in results["methods"].items():
        cells, seconds = [], "-"
        for number in passes:
            rows = [row for row in entry["rows"] if row["passes"] == number]
            mean = sum(row["accuracy"] for row in rows) / len(rows)
            error = math.sqrt(sum(row["error"] ** 2 for row in rows)) / len(rows)
            cells.append(f"{100 * mean:.1f} ± {100 * error:.1f}")
            if number == TUNED_AT:
                seconds = f"{sum(row['seconds'] for row in rows) / len(rows):.3f}"
        size = f"{entry['parameters']:,}"
        lines.append([name, f"{entry['fit_seconds']:.0f}", size, seconds, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def head_seconds(folder: Path) -> float:
    """Processor seconds that the head's fit took, as its training wrote them down; or else 600."""
    training = folder / "training"
    histories = [training / f"{stage}_history.json" for stage in ("generative", "conditional")]
    found = [json.loads(path.read_text())[-1]["seconds"] for path in histories if path.exists()]
    if not found:
        print(f"{folder} does not tell how long its head was fitted: every method has 600 s.")
        return 600.0
    machine = json.loads((training / "run.json").read_text())["environment"]
    return round(sum(found) * machine["threads"] * machine["processes"], 1)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the command; returns the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True, help="folder of a pipeline with a head")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--passes", type=int, nargs="+", default=list(PASSES), help="a window")
    parser.add_argument("--num-tasks", type=int, default=200, help="test tasks of each kind")
    parser.add_argument("--num-validation", type=int, default=50, help="of each kind")
    parser.add_argument("--head-seconds", type=float, help="default: what training took")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("model_cards/results/baselines.json"))
    args = parser.parse_args(argv)
    args.head_seconds = args.head_seconds or head_seconds(Path(args.model))
    torch.set_num_threads(1)  # so that processor seconds are those of one core
    backbone = load_backbone(args.model)
    facts = {"model": Path(args.model).resolve().name, "machine": platform.machine()}
    facts |= {name: version(name) for name in ("torch", "transformers", "codd-hf")}
    facts |= {n: getattr(args, n) for n in ("head_seconds", "passes", "num_tasks", "seed")}
    results = {**facts, "methods": {}}
    if args.output.exists():
        results = json.loads(args.output.read_text())
        if {name: results.get(name) for name in facts} != facts:
            parser.error(f"`--output` {args.output} holds figures of another run: move it away")
    for name in args.methods:
        if name not in results["methods"]:
            results["methods"][name] = measure(METHODS[name], name, backbone, args)
            args.output.parent.mkdir(parents=True, exist_ok=True)
            new = args.output.with_suffix(".new")
            new.write_text(json.dumps(results, indent=2) + "\n")
            new.replace(args.output)
    print(table(results))
    return results


if __name__ == "__main__":
    main()
