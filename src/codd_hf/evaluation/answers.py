"""Right answers against backbone passes, and against tokens per pass.

Each answer is checked, not judged: a task by the checker of its kind, an example by one of a name.
Factorized and coupled decoding have the same settings.
"""

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from tqdm.auto import tqdm

from ..data.sources import Example
from ..data.tasks import is_right
from ..pipelines.pipeline_codd import CoDDPipeline
from ..runtime.report import Report
from . import FACTORIZED, AnswersSettings
from .answer_sets import AnswerSet, ways
from .checkers import checker
from .statistics import mean, ratio


def measure(
    pipeline: CoDDPipeline, examples: Sequence[Example], settings: AnswersSettings
) -> Report:
    """`codd-hf evaluate answers`."""
    pipeline.set_progress_bar_config(disable=True)
    checks: list[Any] = [
        partial(is_right, e.task) if e.task else checker(settings.checker, e.answer)
        for e in examples
    ]
    kinds = [example.task.kind if example.task else settings.checker for example in examples]
    answered = AnswerSet("answers", pipeline, [e.prompt for e in examples], settings)
    rows, by_kind, points = [], [], defaultdict(list)
    shares: dict[Any, Any] = {}
    for mode, strategy, passes in tqdm(ways(pipeline, settings), "answering", disable=None):
        way = {"sampling": mode, "strategy": strategy, "passes": passes}
        answers = answered.answers(passes, mode, strategy=strategy)
        right = [100.0 * check(a.text) for check, a in zip(checks, answers, strict=True)]
        share = shares[mode, strategy, passes] = mean(right)
        used = [answer.passes for answer in answers]
        parallelism = ratio([len(answer.tokens) for answer in answers], used)
        points[mode, strategy].append((parallelism.value, share.value))
        found = {
            "right, %": share,
            "beyond factorized, points": share - shares[FACTORIZED, strategy, passes],
            "passes used": mean(used),
            "tokens per pass": parallelism,
            "seconds per answer": mean([answer.seconds for answer in answers]).value,
        }
        rows.append(way | found)
        of_kind = {k: [r for r, own in zip(right, kinds, strict=True) if own == k] for k in kinds}
        by_kind.append(way | {kind: mean(of_kind[kind]) for kind in sorted(of_kind)})
    best = max(share.value for share in shares.values())
    aups = [
        {"sampling": mode, "strategy": strategy, "AUP": aup(of_way, best)}
        for (mode, strategy), of_way in points.items()
    ]
    facts = {"problems": len(examples), "gen_length": answered.gen_length, "seed": settings.seed}
    return Report(facts, {"rows": rows, "AUP": aups, "right by kind, %": by_kind})


def aup(points: Sequence[tuple[float, float]], best: float) -> float:
    """Accuracy under parallelism (arXiv 2601.07568): the area below accuracy over parallelism.

    Args:
        points: tokens per pass, and accuracy in percent. Those more than 5 below the point of least
            parallelism do not count.
        best: the best accuracy that is known; accuracies `y` weigh `exp(-3 * (1 - y / best))`.
    """
    ordered = sorted(points)
    x, y = torch.tensor([p for p in ordered if p[1] >= ordered[0][1] - 5], dtype=torch.float64).T
    weights = (-3 * (1 - y / max(best, 1e-9))).exp().clamp(max=1)
    return (x[0] * y[0] + torch.trapezoid(y * weights, x)).item()
