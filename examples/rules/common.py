"""What the commit rules share: a scheduler that asks one, and the draw in any order that one stops.

The backbone's pass, the windows, the coupled law and the draws are the library's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch

from codd_hf import CoDDModel, CoDDScheduler, CoDDSchedulerOutput
from codd_hf.circuits import IncrementalPosterior
from codd_hf.schedulers.drawing import StepDraw


@dataclass
class Step:
    """What a rule sees of a step, over rows of windows in succession.

    Attributes:
        draw: the law of the tokens, and the library's draws from it.
        committable: `[batch, length]` bool, where a token may be committed.
        at_least: `[batch]`, the tokens of an even pace, which are always committed.
        steps_left: of the stage, this one included.
        memory: of the call, for rules that look back.
        scheduler: of the call.
    """

    draw: StepDraw
    committable: torch.Tensor
    at_least: torch.Tensor
    steps_left: int
    memory: dict[Any, torch.Tensor]
    scheduler: RuleScheduler

    @property
    def is_in_any_order(self) -> bool:
        """Are tokens drawn one after the other?"""
        return self.draw.settings.sampling == "any_order"

    def drawn(self, committable: torch.Tensor | None = None) -> CoDDSchedulerOutput:
        """What the call's strategy commits, of all that may be or of `committable`."""
        draw = self.draw.in_any_order if self.is_in_any_order else self.draw.independently
        return draw(self.committable if committable is None else committable, self.at_least)

    def marginals(self) -> torch.Tensor:
        """`[batch, length, vocab]`, exact; without a circuit, the backbone's."""
        return self.draw.join(self.draw.plain.marginals)


Rule = Callable[[Step], CoDDSchedulerOutput]


class RuleScheduler(CoDDScheduler):
    """A scheduler whose steps commit what a rule says.

    Args:
        rule: of the steps.
        model: whose predictions they are of.
        **settings: `DrawSettings`.
    """

    def __init__(self, rule: Rule, model: CoDDModel, **settings: Any) -> None:
        super().__init__(**settings)
        self.rule, self.model = rule, model

    def for_call(self, mask_token_id: int, **overrides: Any) -> Self:
        scheduler = super().for_call(mask_token_id, **overrides)
        scheduler.memory = {}
        return scheduler

    @torch.no_grad()
    def step(
        self, model_output, timestep, sample, *, eligible, at_least, text, generator=None, **_
    ) -> CoDDSchedulerOutput:
        draw = StepDraw(model_output, sample, self.settings, generator, [], text)
        left = self._steps_left(timestep)
        return self.rule(Step(draw, draw.masked & eligible, at_least, left, self.memory, self))


GoesOn = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Of rows `[n]`, columns `[n]` and laws `[n, vocab]`: `[n]` bool, may these tokens be committed?"""


def draw_while(step: Step, goes_on: GoesOn) -> CoDDSchedulerOutput:
    """As the library draws in any order, the surest token first and at temperature 0.

    `goes_on` is asked about each token before it is drawn, by its law given those drawn before. The
    library's own loop asks nobody: it stops by the thresholds of its strategies.
    """
    draw, left = step.draw, step.committable.clone()
    tokens, where = draw.sample.clone(), torch.zeros_like(left)
    probs = (~draw.masked).to(draw.plain.latents.dtype)
    both = list(dict.fromkeys((draw.plain, draw.sharpened)))
    known = IncrementalPosterior([law.latents for law in both], draw.split(left))

    def place(rows: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        flat = rows * tokens.shape[1] + columns
        return flat // draw.length, flat % draw.length

    for number in range(tokens.shape[1]):
        scores, at = torch.full_like(probs, -torch.inf), left.nonzero(as_tuple=True)
        scores[at] = known.token_probs(0, place(*at)).amax(-1)
        rows = left.any(-1).nonzero()[:, 0]
        columns = scores.argmax(-1)[rows]
        law = known.token_probs(0, place(rows, columns))
        stays = goes_on(rows, columns, law) | (step.at_least[rows] > number)
        left[rows[~stays]] = False
        at = rows[stays], columns[stays]
        if not len(at[0]):
            break
        new = known.token_probs(len(both) - 1, place(*at)).argmax(-1)
        tokens[at], probs[at] = new, known.prob_of(new, 0, place(*at))
        where[at], left[at] = True, False
        known.reveal(place(*at), new)
    return CoDDSchedulerOutput(tokens, where, tokens, probs)
