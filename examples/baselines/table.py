"""What else one could do on the same backbone: rivals of a CoDD head, in one table.

    python examples/baselines/table.py --model runs/tasks/head/pipeline

Rivals are fitted for a share of the processor seconds that the head took. The settings of each are
those with which most validation tasks are right in 4 passes a window; unseen test tasks judge, at
temperature 0. What is fitted and what is answered is kept in OUTPUT.parts: the same command goes on
after a stop, and adds other methods, budgets and passes, or another head of the same backbone.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from adjust import Adjust, fit_adjust
from common import Backbone, load_backbone
from copula import Copula, causal_copy, fit_copula
from demask import Demask, Influence, fit_demask
from grpo import fit_grpo, trainable_copy
from loop import Answering, Factorized, answering, marked
from torch import nn

from codd_hf import default_model
from codd_hf.data.fingerprint import (
    json_fingerprint,
    pipeline_fingerprint,
    weights_fingerprint,
)
from codd_hf.data.tasks import sample_tasks
from codd_hf.evaluation.statistics import mean
from codd_hf.runtime.files import append_results, read_results
from codd_hf.runtime.report import Report, as_json, environment
from codd_hf.runtime.report import table as markdown

TUNED_AT = 4
Choice = dict[str, Any]


@dataclass
class Method:
    """What answers.

    Attributes:
        answer: makes it answer, given the backbone, what was fitted, and a choice of settings.
        choices: settings among which validation tasks decide.
        make: makes what is to be fitted, given the backbone; None if nothing is.
        fit: fits it, given the backbone, processor seconds and a seed.
    """

    answer: Callable[[Backbone, Any, Choice], Answering]
    choices: Sequence[Choice] = ({},)
    make: Callable[[Backbone], nn.Module] | None = None
    fit: Callable[[Backbone, Any, float, int], None] | None = None


def codd(backbone: Backbone, _: None, choice: Choice) -> Answering:
    """The library's pipeline with its head."""

    def answer(questions: Sequence[str], passes: int) -> list[str]:
        never = [token for token in backbone.never.tolist() if token != backbone.mask_id]
        return backbone.pipeline(
            list(questions),
            gen_length=backbone.num_windows * backbone.window,
            block_length=backbone.window,
            num_inference_steps=backbone.num_windows * passes,
            temperature=0.0,
            forbidden_token_ids=never,
            **choice,
        ).texts

    return answer


def copula_alone(backbone: Backbone, model: nn.Module, _: Choice) -> Answering:
    """The autoregressive model without the backbone, which has no use for a second pass."""
    answer = answering(backbone, Copula(model, alpha=0.0))
    return lambda questions, passes: answer(questions, 1)


ORDERS = tuple({"order": order} for order in ("confidence", "margin", "entropy"))
COPULAS = (
    {"reading": "causal", "order": "left_to_right"},
    {"reading": "causal", "order": "surest", "alpha": 0.5},
    {"reading": "exact", "order": "surest"},
    {"reading": "exact", "order": "surest", "alpha": 0.5},
)
THRESHOLDS = tuple({"threshold": threshold} for threshold in (0.0, 0.5, 0.8))
COPULA = Method(
    lambda b, model, c: answering(b, Copula(model, **c)), COPULAS, causal_copy, fit_copula
)
METHODS = {
    "factorized": Method(lambda b, _, c: answering(b, Factorized(**c)), ORDERS),
    "CoDD": Method(codd, ({"sampling": "latent"}, {"sampling": "any_order"})),
    "copula": COPULA,
    "copula alone": replace(COPULA, answer=copula_alone, choices=({},)),
    "ADJUST": Method(lambda b, layer, c: answering(b, layer), ({},), Adjust, fit_adjust),
    "DEMASK": Method(
        lambda b, head, c: answering(b, Demask(head, **c)), THRESHOLDS, Influence, fit_demask
    ),
    "GRPO": Method(
        lambda b, model, c: answering(b.with_model(model), Factorized(**c)),
        ORDERS,
        trainable_copy,
        fit_grpo,
    ),
}


class Parts:
    """The results that a run has so far, in a folder.

    A folder of another backbone, seed or number of tasks is refused.
    """

    def __init__(self, folder: Path, run: str) -> None:
        self.folder, self.file = folder, folder / "results.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self.kept = read_results(self.file)
        if self.result(["run"], lambda: run) != run:
            raise SystemExit(f"{folder} holds parts of another run: move it away")

    def result(self, name: Sequence[Any], make: Callable[[], Any]) -> Any:
        """The result of a name, made if it is not there."""
        key = json.dumps(name)
        if key not in self.kept:
            self.kept[key] = make()
            append_results(self.file, [(key, self.kept[key])])
            print(time.strftime("%X"), *name, flush=True)
        return self.kept[key]

    def fitted(
        self, method: Method, backbone: Backbone, seconds: float, seed: int
    ) -> tuple[nn.Module, float]:
        """What a method is fitted to be in so many processor seconds, and those that it took."""
        torch.manual_seed(seed)
        module, name = method.make(backbone), f"{method.fit.__name__} {seconds:g} s"
        file = self.folder / f"{name}.pt"

        def fit() -> float:
            began = time.process_time()
            method.fit(backbone, module, seconds, seed)
            torch.save(module.state_dict(), file)
            return time.process_time() - began

        took = self.result([name], fit)
        module.load_state_dict(torch.load(file))
        return module.eval().requires_grad_(False), took


def measured(
    name: str, budget: float, backbone: Backbone, parts: Parts, args: argparse.Namespace
) -> dict[str, Any]:
    """A row: a method fitted for a share of the head's time, its settings chosen, and its marks."""
    method, fitted, seconds = METHODS[name], None, budget * args.head_seconds
    took, of_head = seconds, pipeline_fingerprint(backbone.pipeline) if name == "CoDD" else None
    if method.fit is not None:
        fitted, took = parts.fitted(method, backbone, seconds, args.seed)

    def answered(split: str, number: int, passes: int, choice: Choice) -> dict[str, Any]:
        answer, tasks = method.answer(backbone, fitted, choice), sample_tasks(f"{split}[:{number}]")
        key = [name, of_head or seconds, split, passes, choice]
        return parts.result(key, lambda: marked(answer, tasks, passes))

    def on_validation(choice: Choice) -> float:
        return sum(answered("validation", args.num_validation, TUNED_AT, choice)["right"])

    choice = max(method.choices, key=on_validation) if method.choices[1:] else method.choices[0]
    found = {n: answered("test", args.num_tasks, n, choice) for n in args.passes}
    trained = backbone.model.coupling_head if name == "CoDD" else fitted
    return {
        "method": name,
        "of the head's time": budget,
        "fit, s": took,
        "parameters": 0 if trained is None else sum(p.numel() for p in trained.parameters()),
        "choice": choice,
        "right, %": {n: mean(each["right"]) for n, each in found.items()},
        "seconds per answer": {n: each["seconds"] for n, each in found.items()},
    }


def table(results: dict[str, Any]) -> str:
    """The figures in Markdown, right answers in % by passes a window."""
    lines = []
    for row in results["rows"]:
        line = {"": row["method"], "fit, of the head's": row["of the head's time"] or None}
        line |= {"fit, s": row["fit, s"] or None, "parameters": f"{row['parameters']:,}"}
        line["ms per answer"] = ", ".join(
            f"{1000 * each:.0f}" for each in row["seconds per answer"].values()
        )
        right = row["right, %"].items()
        lines.append(line | {n: "{value:.1f} ± {error:.1f}".format(**each) for n, each in right})
    return markdown(lines)


def head_seconds(folder: Path) -> float | None:
    """Processor seconds of the head's fit, as its training wrote them down.

    Those in which the backbone reads the data once are not among them.
    """
    histories = [
        folder / f"training/{stage}_history.json" for stage in ("generative", "conditional")
    ]
    if not all(path.exists() for path in histories):
        return None
    seconds = sum(json.loads(path.read_text())[-1]["seconds"] for path in histories)
    machine = json.loads((folder / "training/run.json").read_text())["environment"]
    return round(seconds * machine["threads"] * machine["processes"], 1)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the command; returns the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default=default_model(), help="pipeline; default: the embedded")
    parser.add_argument("--head-seconds", type=float, help="default: what training/ tells")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    shares = {"type": float, "nargs": "+", "metavar": "SHARE"}
    parser.add_argument("--budgets", default=[1.0], help="of the head's time to fit", **shares)
    parser.add_argument("--grpo-budgets", default=[1.0, 10.0], help="likewise", **shares)
    parser.add_argument("--passes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--num-tasks", type=int, default=1000)
    parser.add_argument("--num-validation", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("model_cards/results/baselines.json"))
    args = parser.parse_args(argv)
    args.head_seconds = args.head_seconds or head_seconds(Path(args.model))
    if args.head_seconds is None:
        parser.error("`--head-seconds` is wanted: the model's folder tells no time of a fit")
    torch.set_num_threads(1)  # so that processor seconds are those of one core
    backbone = load_backbone(args.model)
    about = {"environment": environment(), "model": pipeline_fingerprint(backbone.pipeline)}
    facts, rows = {n: getattr(args, n) for n in ("num_tasks", "num_validation", "seed")}, []
    run = [weights_fingerprint(backbone.model.backbone.state_dict()), backbone.num_windows, facts]
    parts = Parts(Path(f"{args.output}.parts"), json_fingerprint(run))
    facts["head_seconds"] = args.head_seconds
    for name in args.methods:
        shares = args.grpo_budgets if name == "GRPO" else args.budgets
        for share in shares if METHODS[name].fit else [float(name == "CoDD")]:
            rows.append(measured(name, share, backbone, parts, args))
            args.output.write_text(as_json(about | Report(facts, {"rows": rows}).as_dict()))
    results = json.loads(args.output.read_text())
    print(table(results))
    return results


if __name__ == "__main__":
    main()
