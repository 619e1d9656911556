"""Commit rules on the package's tasks: right answers at equal backbone passes.

    python examples/rules/table.py --output rules.json

A rule has a small grid of settings, factorized and coupled alike, which are tried on validation
tasks at temperature 0. So that all rules take equally many passes in the mean, whatever their
grids, a rule may give a share of the tasks one setting and the rest another: for each number of
passes a window the two are chosen with which most validation tasks are right, and unseen test tasks
judge. What was answered is kept in OUTPUT.answers.jsonl: the same command goes on after a stop.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import RuleScheduler
from entropy_bound import DependenceBound, EntropyBound
from klass import Klass
from num_candidates import NumCandidates
from wino import Wino

from codd_hf import CoDDPipeline, default_model
from codd_hf.data.fingerprint import json_fingerprint, pipeline_fingerprint
from codd_hf.data.tasks import Task, is_right, sample_tasks
from codd_hf.evaluation import FACTORIZED, AnsweringSettings
from codd_hf.evaluation.answer_sets import AnswerSet
from codd_hf.evaluation.statistics import Estimate, mean, ratio
from codd_hf.runtime.files import append_results, read_results
from codd_hf.runtime.report import Report, as_json, environment, table

Setting = dict[str, Any]
COUPLED = ("latent", "any_order")


@dataclass
class Entry:
    """A rule and its grid.

    Attributes:
        grid: values by argument of the rule or of the call; `passes` are a window's, by default as
            many as it has tokens.
        kind: of the rule; None is the library alone.
        strategy: of the library.
        samplings: those in which it is a rule of its own.
    """

    grid: dict[str, Sequence[Any]]
    kind: type | None = None
    strategy: str = "low_confidence"
    samplings: Sequence[str] = (FACTORIZED, *COUPLED)

    def settings(self) -> Iterator[Setting]:
        """All of the grid."""
        for values in product(*self.grid.values()):
            yield dict(zip(self.grid, values, strict=True))


PACKAGE = {
    "low_confidence": Entry({"passes": (2, 4, 8)}),
    "threshold": Entry({"threshold": (0.2, 0.4, 0.6, 0.8, 0.95)}, strategy="threshold"),
    "joint": Entry({"threshold": (0.001, 0.02, 0.1, 0.4, 0.9)}, strategy="joint"),
}
RULES = PACKAGE | {
    "entropy_bound": Entry({"bound": (0.03, 0.2, 0.8, 2.0, 5.0)}, EntropyBound),
    "dependence_bound": Entry(
        {"bound": (0.01, 0.05, 0.3, 1.0)}, DependenceBound, samplings=COUPLED
    ),
    "klass": Entry({"threshold": (0.4, 0.8), "divergence": (0.01, 0.3)}, Klass, "threshold"),
    "wino": Entry({"threshold": (0.4, 0.8), "least": (0.1, 0.5)}, Wino, "threshold"),
    "num_candidates": Entry(
        {"passes": (2, 4, 8), "number": (8,)}, NumCandidates, samplings=COUPLED
    ),
}


@dataclass
class Answered:
    """What a setting did, task by task.

    Attributes:
        right: 100 or 0.
        passes: of the backbone.
        windows: that the answer took.
        seconds: of the answer, its share of its batch's.
    """

    right: list[float]
    passes: list[float]
    windows: list[float]
    seconds: list[float]

    @property
    def passes_a_window(self) -> Estimate:
        """In the mean."""
        return ratio(self.passes, self.windows)

    def mixed(self, other: Answered, share: float) -> Answered:
        """What is expected if a share of the tasks, drawn at random, has the other's answers."""
        mix = {
            name: [(1 - share) * a + share * b for a, b in zip(ours, theirs, strict=True)]
            for (name, ours), theirs in zip(vars(self).items(), vars(other).values(), strict=True)
        }
        return Answered(**mix)


class Mix(NamedTuple):
    """A setting, and another for a share of the tasks."""

    first: Setting
    second: Setting
    share: float = 0.0


def choose(tried: Sequence[tuple[Setting, Answered]], most: float) -> tuple[float, Mix] | None:
    """The mix of at most so many passes a window with most right answers, and their percentage.

    None if every setting takes more.
    """
    known = [(s, mean(a.right).value, a.passes_a_window.value) for s, a in tried]
    few, many = ([k for k in known if (k[2] <= most) == is_few] for is_few in (True, False))
    found = [(right, Mix(setting, setting)) for setting, right, _ in few]
    for (setting, right, used), (other, more_right, more_used) in product(few, many):
        share = (most - used) / (more_used - used)
        mix = Mix(setting, other, share)
        found.append(((1 - share) * right + share * more_right, mix))
    return max(found, key=lambda pair: pair[0], default=None)


def answer(
    pipeline: CoDDPipeline,
    tasks: Sequence[Task],
    entry: Entry,
    setting: Setting,
    sampling: str,
    answering: AnsweringSettings,
) -> Answered:
    """The tasks' answers by a rule."""
    window, call = pipeline.model.window_length, {"passes": pipeline.model.window_length} | setting
    if entry.kind is not None:
        rule = entry.kind(**{field.name: call.pop(field.name) for field in fields(entry.kind)})
        scheduler = RuleScheduler(rule, pipeline.model, **vars(pipeline.scheduler.settings))
        pipeline = CoDDPipeline(pipeline.model, scheduler, pipeline.tokenizer)
    pipeline.set_progress_bar_config(disable=True)
    answered = AnswerSet("rules", pipeline, [task.question for task in tasks], answering)
    answers = answered.answers(
        call.pop("passes"), sampling, strategy=entry.strategy, temperature=0.0, **call
    )
    number = answered.gen_length // window  # an end token is part of the answer
    return Answered(
        [100.0 * is_right(task, a.text) for task, a in zip(tasks, answers, strict=True)],
        [a.passes for a in answers],
        [min(len(a.tokens) // window + 1, number) for a in answers],
        [a.seconds for a in answers],
    )


def measure(
    pipeline: CoDDPipeline, args: argparse.Namespace, answering: AnsweringSettings
) -> Report:
    """Chooses settings on validation tasks, and marks the answers to test tasks."""
    sizes = {"validation": args.num_validation, "test": args.num_tasks}
    tasks = {split: sample_tasks(f"{split}[:{size}]") for split, size in sizes.items()}
    path = Path(f"{args.output}.answers.jsonl")
    kept, run = read_results(path), json_fingerprint([pipeline_fingerprint(pipeline), sizes])
    if kept.setdefault("run", run) != run:
        raise SystemExit(f"{path} holds answers of another run: move it away")
    append_results(path, [("run", run)])

    def answered(split: str, name: str, sampling: str, setting: Setting) -> Answered:
        key = json.dumps([split, name, sampling, setting])
        if key not in kept:
            new = answer(pipeline, tasks[split], RULES[name], setting, sampling, answering)
            kept[key] = vars(new)
            append_results(path, [(key, kept[key])])
            print(
                f"{mean(new.right):5.1f} % in {new.passes_a_window:.2f} passes: {key}", flush=True
            )
        return Answered(**kept[key])

    def judged(name: str, sampling: str, mix: Mix) -> Answered:
        first, second = (answered("test", name, sampling, s) for s in (mix.first, mix.second))
        return first.mixed(second, mix.share)

    validated, rows = [], []
    for sampling in args.samplings:
        tried = {
            name: [(s, answered("validation", name, sampling, s)) for s in entry.settings()]
            for name, entry in RULES.items()
            if sampling in entry.samplings
        }
        for name, settings in tried.items():
            for setting, found in settings:
                way = {"sampling": sampling, "rule": name, "setting": setting}
                used = found.passes_a_window
                validated.append(way | {"right, %": mean(found.right), "passes used": used})
        for most in args.passes:
            choices = {name: choose(settings, most) for name, settings in tried.items()}
            chosen = {name: choice for name, choice in choices.items() if choice}
            package = max(PACKAGE, key=lambda name: chosen[name][0])
            base = mean(judged(package, sampling, chosen[package][1]).right)
            for name, (right, mix) in chosen.items():
                row = {"sampling": sampling, "rule": name, "passes": most, "setting": mix.first}
                row |= {"other setting": mix.second, "share of the other": mix.share}
                rows.append(row | {"right on validation, %": right})
                if right < chosen[package][0] - args.within:
                    continue
                found = judged(name, sampling, mix)
                rows[-1] |= {
                    "passes used": found.passes_a_window,
                    "right, %": mean(found.right),
                    "against": package,
                    "beyond it, points": mean(found.right) - base,
                    "seconds per answer": mean(found.seconds).value,
                }
    facts = {"tasks": args.num_tasks, "validation tasks": args.num_validation, "seed": 0}
    return Report(facts, {"rows": rows, "validation": validated})


def pivot(rows: Sequence[dict[str, Any]]) -> str:
    """Right answers in Markdown, passes in columns: of validation tasks, and of test tasks."""
    lines: dict[tuple[str, str], dict[str, str]] = {}
    passes = sorted({row["passes"] for row in rows})
    for row in rows:
        way = {"sampling": row["sampling"], "rule": row["rule"]}
        line = lines.setdefault((row["sampling"], row["rule"]), way)
        line[f"validation, {row['passes']}"] = f"{row['right on validation, %']:.0f}"
        if "right, %" in row:
            line[f"test, {row['passes']}"] = "{value:.1f} ± {error:.1f}".format(**row["right, %"])
    columns = ["sampling", "rule", *(f"validation, {n}" for n in passes)]
    columns += [f"test, {n}" for n in passes]
    return table([{name: line.get(name) for name in columns} for line in lines.values()])


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the command; returns the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default=default_model(), help="pipeline; default: the embedded")
    parser.add_argument("--samplings", nargs="+", default=[FACTORIZED, *COUPLED])
    parser.add_argument("--passes", type=int, nargs="+", default=[2, 4, 8], help="a window")
    parser.add_argument("--num-tasks", type=int, default=500)
    parser.add_argument("--num-validation", type=int, default=100)
    parser.add_argument(
        "--within",
        type=float,
        default=100.0,
        help="judge the rules that on validation lie at most so many points behind the package's",
    )
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--output", type=Path, default=Path("model_cards/results/rules.json"))
    args = parser.parse_args(argv)
    pipeline = CoDDPipeline.from_pretrained(args.model)
    answering = AnsweringSettings(batch_size=args.batch_size)
    report = measure(pipeline, args, answering)
    about = {"environment": environment(), "model": pipeline_fingerprint(pipeline)}
    text = as_json(about | report.as_dict())
    args.output.write_text(text)
    results = json.loads(text)
    print(pivot(results["rows"]))
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
