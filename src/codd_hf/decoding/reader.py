"""How the denoising loop reads the canvas: all of it or a part, with or without guidance.

| `cache` | computed in the first step of a block | in its other steps |
| --- | --- | --- |
| None | the whole canvas | the whole canvas |
| `"prefix"` | the whole canvas | the block and what follows it |
| `"dual"` | the whole canvas | the block |

The rest is kept from the block's first step, when the block and what follows it were masked
(Fast-dLLM, arXiv 2505.22618, which calls the second `DualCache`). With full attention that is an
approximation: tokens committed in the block change the others' keys and values a little.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..backbones import BackboneStates
from ..coupling.windows import CoupledBackbone
from .canvas import Canvas
from .placement import windows_over


class CanvasReader:
    """Runs the backbone for one call of the denoising loop.

    Row numbers are those of the call's batch. Nothing read for a row depends on the others.

    With a guidance scale `s`, a second pass sees mask tokens in place of the prompt, and logits
    become `without_prompt + (s + 1) * (with_prompt - without_prompt)`, as in LLaDA
    ([arXiv 2502.09992](https://arxiv.org/abs/2502.09992), appendix A.2). Both are run as one batch.
    Hidden states are those of the pass with the prompt.

    Args:
        model: the backbone, with or without a head.
        canvas: all rows.

    Raises:
        ValueError: the backbone cannot be read in parts.
    """

    def __init__(self, model: CoupledBackbone, canvas: Canvas) -> None:
        self.canvas, self.family, self.backbone = canvas, model.family, model.backbone
        self.prompt = canvas.attention_mask.bool() & ~canvas.generated
        self.attention_mask, self.scale, self.cache = canvas.attention_mask, None, None
        if any(canvas.call.guidance_scale):
            scales = canvas.call.guidance_scale
            self.scale = torch.tensor(scales, device=canvas.tokens.device)
            self.attention_mask = canvas.attention_mask.repeat(2, 1)
        if canvas.call.cache is not None:
            self.cache = self.family.make_cache(self.backbone, len(self.attention_mask))

    def open_block(self, block: torch.Tensor) -> None:
        """Says where the next steps commit tokens, `[batch, length]` bool; the first reads all."""
        self.end = None
        if getattr(self.backbone.config, "block_length", None) is not None:
            # A block-causal backbone sees nothing beyond: columns behind need not be computed.
            last = int(windows_over(self.canvas, block).any(0).nonzero().max())
            self.end = last + self.canvas.call.head.window_length
        if self.cache is None:
            return
        self.cache.reset()
        again = block
        if self.canvas.call.cache == "prefix":
            again = (block.long().cumsum(1) > 0) & self.canvas.attention_mask.bool()
        if getattr(self.backbone.config, "logit_shift", False):
            again = again | F.pad(again[:, 1:], (0, 1))  # where the first of them is predicted
        columns = _columns(again)
        copies = 1 if self.scale is None else 2
        self.read_again, self.columns = again.repeat(copies, 1), columns.repeat(copies, 1)

    def read(self, rows: torch.Tensor) -> BackboneStates:
        """Predicts the tokens of some rows, by their numbers `[n]`.

        Returns:
            States over the canvas (up to where it is needed), valid until the next call.
        """
        tokens = self.canvas.tokens[rows]
        if self.scale is None:
            return self._read(rows, tokens)
        without_prompt = tokens.masked_fill(self.prompt[rows], self.canvas.mask_token_id)
        both = torch.cat((rows, rows + len(self.prompt))), torch.cat((tokens, without_prompt))
        return guided(self._read(*both), self.scale[rows])

    def _read(self, rows: torch.Tensor, tokens: torch.Tensor) -> BackboneStates:
        mask, end = self.attention_mask[rows], self.end
        if self.cache is None:
            return self.family.states(self.backbone, tokens[:, :end], mask[:, :end])
        # Rows come here in a later step of a block, and tokens outside it change, only by the hand
        # of a caller who edits the canvas.
        old = self.cache.outdated(rows, tokens, self.read_again[rows])
        if bool(old.any()):
            self.cache.whole(rows[old], tokens[old])
            states = self.family.states(self.backbone, tokens[old], mask[old], cache=self.cache)
            if bool(old.all()):
                return states
        self.cache.part(rows, self.columns[rows])
        return self.family.states(self.backbone, tokens, mask, cache=self.cache)


def guided(states: BackboneStates, scale: torch.Tensor) -> BackboneStates:
    """Classifier-free guidance of one half of a batch by the other.

    Args:
        states: of `2 n` rows, first those with the prompt, then the same without.
        scale: `[n]`; 0 leaves a row's logits as they are.
    """
    number, length = len(scale), states.last_hidden_state.shape[1]

    def read_logits(index: tuple[torch.Tensor, ...] | None) -> torch.Tensor:
        if index is None:
            rows = torch.arange(number, device=scale.device)[:, None]
            index = rows, torch.arange(length, device=scale.device)
        rows, columns = index
        with_prompt, without = states.logits(index), states.logits((rows + number, columns))
        # The same as in the formula, but exact where the scale is 0.
        strength = scale[rows][..., None].to(with_prompt.dtype)
        return with_prompt + strength * (with_prompt - without)

    return BackboneStates(states.last_hidden_state[:number], read_logits)


def _columns(chosen: torch.Tensor) -> torch.Tensor:
    """The columns `[batch, n]` where `chosen` `[batch, length]` is True.

    Rows that have fewer repeat their last one: computing it twice gives it twice.
    """
    count = chosen.sum(-1, keepdim=True)
    order = chosen.logical_not().long().argsort(dim=1, stable=True)
    nth = torch.arange(int(count.max()), device=chosen.device)
    return order.gather(1, torch.minimum(nth, (count - 1).clamp(min=0)))
