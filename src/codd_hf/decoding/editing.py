"""Second thoughts: committed tokens are replaced where the backbone is sure of others.

LLaDA2.1 (arXiv 2602.08676) was trained to see wrong tokens beside masks. Its code lets each pass
over a block fill masks and edit tokens, and goes on until the block is full and nothing is edited.
"""

import torch

from ..backbones import BackboneStates
from ..circuits import without_tokens
from ..coupling.windows import CoupledBackbone
from .step import Canvas, Stage, without_early_ends

MOST_PASSES = 16
"""Passes over a full block, as in LLaDA2.1's code."""


def edit(
    model: CoupledBackbone,
    canvas: Canvas,
    rows: torch.Tensor,
    states: BackboneStates,
    stage: Stage,
    threshold: float,
) -> None:
    """Replaces tokens of a stage that were committed before a pass over the `rows` `[n]`.

    The backbone alone judges: its likeliest token takes the place of another if its probability is
    above `threshold`. Forced tokens stay, and so does what follows an end token.
    """
    call, mask_token_id = canvas.call, canvas.call.mask_token_id
    editable = canvas.generated & stage.within & ~canvas.ends()[1]
    editable &= canvas.tokens != mask_token_id
    for row, forced in enumerate(call.forced_tokens):
        editable[row, [int(canvas.start[row]) + place for place in forced]] = False
    at = editable[rows].nonzero(as_tuple=True)
    logits = without_early_ends(states, canvas.rows(rows)).logits(at).float()
    for ids in (model.config.forbidden_token_ids, call.scheduler.settings.forbidden_token_ids):
        logits = without_tokens(logits, mask_token_id, ids)
    prob, token = logits.softmax(-1).max(-1)
    sure = prob > threshold
    canvas.tokens[rows[at[0][sure]], at[1][sure]] = token[sure]
