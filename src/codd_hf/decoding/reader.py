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

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from ..backbones import BackboneStates
from ..coupling.windows import CoupledBackbone


class CanvasReader:
    """Runs the backbone for one call of the denoising loop.

    Row numbers are those of the call's batch. Nothing read for a row depends on the others.

    Args:
        model: the backbone, with or without a head.
        attention_mask: `[batch, length]`, 0 at padding, which comes last in every row.
        generated: `[batch, length]` bool, the generated positions; the other real ones are prompt.
        cache: None, `prefix` or `dual`; see the table above.
        guidance_scale: strength `s` of classifier-free guidance for each row; 0: none. A second
            pass sees mask tokens in place of the prompt, and logits become `without_prompt +
            (s + 1) * (with_prompt - without_prompt)`, as in LLaDA
            ([arXiv 2502.09992](https://arxiv.org/abs/2502.09992), appendix A.2). Both are run as
            one batch. Hidden states are those of the pass with the prompt.

    Raises:
        ValueError: the backbone cannot be read in parts.
    """

    def __init__(
        self,
        model: CoupledBackbone,
        attention_mask: torch.Tensor,
        generated: torch.Tensor,
        cache: str | None = None,
        guidance_scale: Sequence[float] = (),
    ):
        self.family, self.backbone, self.mode = model.family, model.backbone, cache
        self.mask_token_id = model.config.mask_token_id
        self.batch, self.prompt = len(attention_mask), attention_mask.bool() & ~generated
        self.attention_mask, self.scale = attention_mask, None
        if any(guidance_scale):
            self.scale = torch.tensor(guidance_scale, device=attention_mask.device)
            self.attention_mask = attention_mask.repeat(2, 1)
        self.cache = None
        if cache is not None:
            self.cache = self.family.make_cache(self.backbone, len(self.attention_mask))

    def open_block(self, block: torch.Tensor, end: int | None = None) -> None:
        """Says what the next steps fill; their first reading is of the whole canvas.

        Args:
            block: `[batch, length]` bool, columns in which tokens may be committed.
            end: columns from this one on are not asked for; None: all may be.
        """
        # A block-causal backbone sees nothing beyond: the columns need not be computed.
        is_block_causal = getattr(self.backbone.config, "block_length", None) is not None
        self.end = end if is_block_causal else None
        if self.cache is None:
            return
        self.cache.reset()
        again = block
        if self.mode == "prefix":
            again = (block.long().cumsum(1) > 0) & self.attention_mask[: self.batch].bool()
        if getattr(self.backbone.config, "logit_shift", False):
            again = again | F.pad(again[:, 1:], (0, 1))  # where the first of them is predicted
        self.read_again, self.columns = again, _columns(again)
        first, number = int(self.columns[0, 0]), self.columns.shape[1]
        run = torch.arange(first, first + number, device=again.device)
        self.run = (first, first + number) if bool((self.columns == run).all()) else None
        if self.scale is not None:
            self.read_again, self.columns = again.repeat(2, 1), self.columns.repeat(2, 1)

    def read(self, rows: torch.Tensor, canvas: torch.Tensor) -> BackboneStates:
        """Predicts the tokens of some rows.

        Args:
            rows: `[n]`, their numbers.
            canvas: `[n, length]`, their tokens.

        Returns:
            States over the canvas (up to where it is needed), valid until the next call.
        """
        if self.scale is None:
            return self._read(rows, canvas)
        without_prompt = canvas.masked_fill(self.prompt[rows], self.mask_token_id)
        both = torch.cat((rows, rows + self.batch)), torch.cat((canvas, without_prompt))
        return guided(self._read(*both), self.scale[rows])

    def _read(self, rows: torch.Tensor, canvas: torch.Tensor) -> BackboneStates:
        mask = self.attention_mask[rows]
        if self.cache is None:
            return self.family.states(self.backbone, canvas[:, : self.end], mask[:, : self.end])
        # Rows come here in a later step of a block, and tokens outside it change, only by the hand
        # of a caller who edits the canvas.
        outdated = self.cache.outdated(rows, canvas, self.read_again[rows])
        if bool(outdated.any()):
            self.cache.whole(rows[outdated], canvas[outdated])
            states = self.family.states(
                self.backbone, canvas[outdated], mask[outdated], cache=self.cache
            )
            if bool(outdated.all()):
                return states
        self.cache.part(rows, self.columns[rows], self.run)
        return self.family.states(self.backbone, canvas, mask, cache=self.cache)


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
