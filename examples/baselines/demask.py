"""DEMASK (arXiv 2604.02560): tokens that hardly depend on each other are committed together.

The influence of position j on position i is how far the backbone's prediction at i moves, in total
variation, when a token drawn from its prediction at j is put there:

    D[i, j] = E_{v ~ p_j} TV(p_i(. | x, x_j = v), p_i(. | x))

A head on the states of a pass predicts it for all pairs of the window. A pass goes down the open
positions, the surest first, and takes one while the influences of those taken before on those taken
after them add up to at most a bound. Tokens are drawn independently; if influences add up, the
bound holds for the total variation between these draws and the backbone's joint.

Differs from the paper in that the number of passes is given, and with it how many positions a pass
takes, so that the bound is for each pass the least of a few that admits so many; and in the head's
inside, which is a product of two small networks with a term for the distance. Positions below a
`threshold` of confidence, as in the paper, come last.
"""

from __future__ import annotations

import math

import torch
from common import Backbone
from learning import fit, masked_window, training_tasks
from loop import Pass, surest
from torch import nn
from torch.nn import functional as F

BATCH = 32
RANK = 64
BOUNDS = (*(0.05 * 3.0**power for power in range(6)), math.inf)


class Influence(nn.Module):
    """Predicts influences between the positions of a window.

    Args:
        backbone: gives the sizes of its states and of a window.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        size = backbone.hidden_size
        self.on = nn.Sequential(nn.Linear(size, RANK), nn.GELU(), nn.Linear(RANK, RANK))
        self.of = nn.Sequential(nn.Linear(size, RANK), nn.GELU(), nn.Linear(RANK, RANK))
        self.distance = nn.Parameter(torch.full((2 * backbone.window - 1,), -2.0))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Logits `[batch, L, L]` of the influence on the first position of the second one.

        Args:
            states: `[batch, L, hidden]`.
        """
        place = torch.arange(states.shape[1])
        offset = place[:, None] - place + len(self.distance) // 2
        product = self.on(states) @ self.of(states).transpose(1, 2)
        return product / RANK**0.5 + self.distance[offset]


class Demask:
    """Commits positions by the predicted influences.

    Args:
        head: predicts them.
        threshold: positions whose token is less probable are taken only if there are no others.
    """

    def __init__(self, head: Influence, threshold: float = 0.0) -> None:
        self.head, self.threshold = head, threshold

    @torch.no_grad()
    def draw(self, seen: Pass) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Sampler`."""
        tokens, log_probs = seen.pick(seen.log_probs)
        probs, influence = log_probs.exp(), self.head(window_states(seen)).sigmoid()
        sure = seen.open & (probs >= self.threshold)
        every = [bounded(influence, probs, sure, bound) for bound in BOUNDS]
        admitted = torch.stack(every)  # [bounds, batch, L]
        enough = (admitted.sum(-1) >= seen.count).long()
        enough[-1] = 1
        chosen = admitted[enough.argmax(0), torch.arange(len(probs))]
        return tokens, surest(probs + chosen, seen.open, seen.count)


def window_states(seen: Pass) -> torch.Tensor:
    """`[batch, L, hidden]`, the states of a window."""
    row = torch.arange(len(seen.columns))[:, None]
    return seen.states.last_hidden_state[row, seen.columns]


def bounded(
    influence: torch.Tensor, scores: torch.Tensor, open_: torch.Tensor, bound: float
) -> torch.Tensor:
    """`[batch, L]` bool: positions whose influences on each other add up to at most the bound.

    Args:
        influence: `[batch, L, L]`, on the first position of the second one.
        scores: `[batch, L]`; positions are tried in the order of their scores.
        open_: `[batch, L]` bool, the positions to try.
        bound: of the sum over the pairs of an earlier and a later position of the order.
    """
    order = scores.masked_fill(~open_, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    taken, total = torch.zeros_like(open_), torch.zeros(len(open_))
    row = torch.arange(len(open_))
    for position in order.unbind(-1):
        more = (influence[row, position] * taken).sum(-1)
        fits = open_[row, position] & (total + more <= bound)
        total = total + more * fits
        taken[row, position] = fits
    return taken


def fit_demask(
    backbone: Backbone,
    head: Influence,
    seconds: float,
    seed: int = 0,
    learning_rate: float = 2e-3,
) -> None:
    """Trains the head for so many processor seconds.

    In each row one open position gets a token that is drawn from the prediction; a second pass
    shows by how much the predictions at the others moved. Since the loss is a cross-entropy, the
    head learns the mean over such draws.
    """
    generator = torch.Generator().manual_seed(seed)
    batches = training_tasks(seed, BATCH)

    def loss() -> torch.Tensor:
        _, canvas, first = masked_window(backbone, next(batches), generator)
        seen = Pass.over(backbone, canvas, first, temperature=1.0, generator=generator)
        source, moved, others = measured(seen)
        predicted = head(window_states(seen))[torch.arange(len(source)), :, source]
        return F.binary_cross_entropy_with_logits(predicted[others], moved[others])

    fit(head, loss, seconds, learning_rate)


@torch.no_grad()
def measured(seen: Pass) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draws a token at one open position of each row, and looks what that changes.

    Returns:
        The positions `[batch]`; the total variation `[batch, L]` between the predictions before and
        after; and `[batch, L]` bool, where there is one: at all other open positions.
    """
    noise = torch.rand(seen.open.shape, generator=seen.generator)
    source = noise.masked_fill(~seen.open, -1.0).argmax(-1)
    row = torch.arange(len(source))
    drawn, _ = seen.pick(seen.log_probs[row, source])
    tokens = seen.canvas.tokens.clone()
    tokens[row, seen.columns[row, source]] = drawn
    after = Pass.over(seen.backbone, seen.canvas.with_tokens(tokens), seen.columns[:, 0])
    moved = 0.5 * (after.log_probs.exp() - seen.log_probs.exp()).abs().sum(-1)
    others = seen.open.clone()
    others[row, source] = False
    return source, moved, others
