"""ADJUST (arXiv 2509.22738): a one-layer sampler on the frozen states of the backbone.

After a pass of the backbone, tokens are drawn one by one, the surest first. The first one comes
from the backbone's own prediction. For each further one a single transformer layer reads the states
of the pass and the tokens drawn by now, and changes the states that the output embedding reads:

    logits = output_embedding(states + change(layer(join(states, embeddings of tokens))))

The layer learns what the backbone itself would predict, were it run again with these tokens in
place: the loss is the Kullback-Leibler divergence from that, at every position that is still open.
`change` begins with zeros, so that an untrained layer draws as the backbone does.

Differs from the paper in that the tokens in place are right answers, revealed several at a time
with the surest first, instead of tokens that the backbone draws one at a time: a pass then gives
more to learn from in the minutes there are. What the paper gives of the layer's inside is not
followed to the letter: it has the shape of the backbone's last one, and begins with its weights.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from common import Backbone
from learning import fit, masked_window, training_tasks
from loop import Pass, surest
from torch import nn
from torch.nn import functional as F

from codd_hf.data.tasks import Task

BATCH = 32
MOST_PASSES = 8
POOL = 32
"""Pairs of passes that the next one to learn from is drawn from."""
LEAST = -30.0
"""The least log-probability in a divergence."""


class Adjust(nn.Module):
    """The layer, and the sampler that it makes.

    Args:
        backbone: gives the layer's shape.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        network = backbone.model.backbone.get_decoder()
        config = copy.deepcopy(network.config)
        config.num_hidden_layers, config.vocab_size, config.pad_token_id = 1, 1, None
        size = backbone.hidden_size
        self.join = nn.Linear(2 * size, size, bias=False)
        self.layer = type(network)(config)
        self.change = nn.Linear(size, size, bias=False)
        nn.init.zeros_(self.change.weight)
        with torch.no_grad():
            self.join.weight.copy_(torch.eye(size).repeat(1, 2))
        last = f"layers.{network.config.num_hidden_layers - 1}."
        weights = network.state_dict().items()
        own = {name.replace(last, "layers.0."): w for name, w in weights if name.startswith(last)}
        self.layer.load_state_dict(own, strict=False)

    def forward(self, seen: Pass, tokens: torch.Tensor) -> torch.Tensor:
        """Log-probabilities `[batch, L, vocab]`, given `tokens` `[batch, length]` of now."""
        states = seen.states.last_hidden_state
        embedded = seen.backbone.model.get_input_embeddings()(tokens)
        joined = self.join(torch.cat((states, embedded), -1))
        real = seen.canvas.real.long()
        read = self.layer(inputs_embeds=joined, attention_mask=real).last_hidden_state
        row = torch.arange(len(tokens))[:, None]
        changed = states[row, seen.columns] + self.change(read[row, seen.columns])
        return seen.backbone.log_probs(seen.backbone.project(changed))

    @torch.no_grad()
    def draw(self, seen: Pass) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Sampler`."""
        tokens, chosen = seen.canvas.tokens.clone(), torch.zeros_like(seen.open)
        log_probs = seen.log_probs
        for number in range(int(seen.count.max())):
            if number:
                log_probs = self(seen, tokens)
            drawn, confidence = seen.pick(log_probs)
            now = surest(confidence, seen.open & ~chosen, (seen.count > number).long())
            row, at = now.nonzero(as_tuple=True)
            tokens[row, seen.columns[row, at]] = drawn[row, at]
            chosen |= now
        return tokens.gather(1, seen.columns), chosen


def fit_adjust(
    backbone: Backbone,
    layer: Adjust,
    seconds: float,
    seed: int = 0,
    learning_rate: float = 5e-4,
) -> None:
    """Trains the layer for so many processor seconds."""
    generator = torch.Generator().manual_seed(seed)
    batches = training_tasks(seed, BATCH)
    pairs: list[tuple[Pass, Pass]] = []

    def loss() -> torch.Tensor:
        while len(pairs) < POOL:
            pairs.extend(pairs_of_passes(backbone, next(batches), generator))
        chosen = int(torch.randint(len(pairs), (), generator=generator))
        return divergence(layer, *pairs.pop(chosen))

    fit(layer, loss, seconds, learning_rate)


def divergence(layer: Adjust, seen: Pass, later: Pass) -> torch.Tensor:
    """Of the layer on a pass from the backbone in a later one, mean over what is open there."""
    student = layer(seen, later.canvas.tokens)[later.open].clamp(min=LEAST)
    teacher = later.log_probs[later.open].clamp(min=LEAST)
    return F.kl_div(student, teacher, log_target=True, reduction="sum") / max(len(student), 1)


@torch.no_grad()
def pairs_of_passes(
    backbone: Backbone, tasks: Sequence[Task], generator: torch.Generator
) -> list[tuple[Pass, Pass]]:
    """Passes over windows that fill up with right tokens, the surest first; an earlier and a later.

    A pass puts a random number of the open tokens in place. A row whose window is full has none
    open, and counts no more. Each pass but the first is paired with one before it.
    """
    truth, canvas, first = masked_window(backbone, tasks, generator)
    passes = [Pass.over(backbone, canvas, first)]
    while len(passes) < MOST_PASSES and bool((passes[-1].open.sum(-1) > 1).any()):
        seen = passes[-1]
        share = torch.rand(len(first), generator=generator)
        count = (1 + share * (seen.open.sum(-1) - 1)).long()
        known = surest(seen.log_probs.amax(-1), seen.open, count)
        hidden = seen.canvas.tokens == backbone.mask_id
        hidden.scatter_(1, seen.columns, hidden.gather(1, seen.columns) & ~known)
        tokens = truth.tokens.masked_fill(hidden, backbone.mask_id)
        passes.append(Pass.over(backbone, truth.with_tokens(tokens), first))
    earlier = [int(torch.randint(n, (), generator=generator)) for n in range(1, len(passes))]
    return [(passes[i], later) for i, later in zip(earlier, passes[1:], strict=True)]
