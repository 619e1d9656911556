"""How the denoising loop reads the canvas: all of it or a part, with or without guidance.

| `cache` | computed in the first step of a block | in its other steps |
| --- | --- | --- |
| None | the whole canvas | the whole canvas |
| `"prefix"` | the whole canvas | the block and what follows it |
| `"dual"` | the whole canvas | the block |

What is not computed is kept from the block's first step, when the block and what follows it were
masked (Fast-dLLM, arXiv 2505.22618, which calls the second `DualCache`). With full attention that
is an approximation: tokens committed in the block change the others' keys and values a little.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from ..backbones import BackboneStates
from ..checks.arguments import LARGEST_FACTOR, choice, number, per_row

if TYPE_CHECKING:
    from ..modeling_codd import CoDDModel

CACHES = (None, "prefix", "dual")


class CanvasReader:
    """Runs the backbone for one call of the denoising loop.

    Row numbers are those of the call's batch. Nothing read for a row depends on the others.

    Args:
        model: the backbone, with or without a head.
        attention_mask: `[batch, length]`, 0 at padding, which comes last in every row.
        generated: `[batch, length]` bool, what is generated; the other real tokens are the prompt.
        cache: what is computed in each step; see the table above.
        guidance_scale: strength `s` of classifier-free guidance, for all rows or for each; 0 or
            None: none. A second pass sees mask tokens in place of the prompt, and logits become
            `without_prompt + (s + 1) * (with_prompt - without_prompt)`, as in LLaDA
            ([arXiv 2502.09992](https://arxiv.org/abs/2502.09992), appendix A.2). Both are run as
            one batch. Hidden states are those of the pass with the prompt.

    Raises:
        ValueError: `cache` is unknown or the backbone cannot be read in parts, or `guidance_scale`
            is not a number of at least 0, or one for each row.
        TypeError: `guidance_scale` is no number.
    """

    def __init__(
        self,
        model: CoDDModel,
        attention_mask: torch.Tensor,
        generated: torch.Tensor,
        cache: str | None = None,
        guidance_scale: float | Sequence[float] | None = None,
    ):
        choice("cache", cache, CACHES)
        self.model, self.mode, self.batch = model, cache, len(attention_mask)
        scales = _scale_of_each_row(guidance_scale, self.batch)
        self.scale = torch.tensor(scales, device=attention_mask.device) if any(scales) else None
        self.attention_mask, self.prompt = attention_mask, attention_mask.bool() & ~generated
        if self.scale is not None:
            self.attention_mask = attention_mask.repeat(2, 1)
        self.is_block_causal = getattr(model.config.text_config, "block_length", None) is not None
        self.cache = None
        if cache is not None:
            self.cache = model.family.make_cache(model.backbone, len(self.attention_mask))

    def open_block(self, block: torch.Tensor, end: int | None = None) -> None:
        """Says what the next steps fill; what they read first is read whole.

        Args:
            block: `[batch, length]` bool, columns in which tokens may be committed.
            end: columns from this one on are not asked for; None: all may be.
        """
        self.end = end if self.is_block_causal else None
        if self.cache is None:
            return
        self.cache.reset()
        again = block
        if self.mode == "prefix":
            again = (block.long().cumsum(1) > 0) & self.attention_mask[: self.batch].bool()
        if getattr(self.model.backbone.config, "logit_shift", False):
            again = again | F.pad(again[:, 1:], (0, 1))  # where the first of them is predicted
        self.read_again, self.positions = again, _columns(again)
        self.run = _run(self.positions)
        if self.scale is not None:
            self.read_again, self.positions = again.repeat(2, 1), self.positions.repeat(2, 1)

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
        without_prompt = canvas.masked_fill(self.prompt[rows], self.model.config.mask_token_id)
        states = self._read(
            torch.cat((rows, rows + self.batch)), torch.cat((canvas, without_prompt))
        )
        return guided(states, self.scale[rows])

    def _read(self, rows: torch.Tensor, canvas: torch.Tensor) -> BackboneStates:
        family, backbone = self.model.family, self.model.backbone
        mask = self.attention_mask[rows]
        if self.cache is None:
            return family.states(backbone, canvas[:, : self.end], mask[:, : self.end])
        # Rows come here in a later step of a block, and tokens outside it change, only by the hand
        # of a caller who edits the canvas.
        outdated = self.cache.outdated(rows, canvas, self.read_again[rows])
        if bool(outdated.any()):
            self.cache.whole(rows[outdated], canvas[outdated])
            states = family.states(backbone, canvas[outdated], mask[outdated], cache=self.cache)
            if bool(outdated.all()):
                return states
        self.cache.part(rows, self.positions[rows], self.run)
        return family.states(backbone, canvas, mask, cache=self.cache)


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


def _columns(wanted: torch.Tensor) -> torch.Tensor:
    """The columns `[batch, n]` where `wanted` `[batch, length]` is True.

    Rows that have fewer repeat their last one: computing it twice gives it twice.
    """
    count = wanted.sum(-1, keepdim=True)
    order = wanted.logical_not().long().argsort(dim=1, stable=True)
    nth = torch.arange(int(count.max()), device=wanted.device)
    return order.gather(1, torch.minimum(nth, (count - 1).clamp(min=0)))


def _run(columns: torch.Tensor) -> tuple[int, int] | None:
    """The first of the columns `[batch, n]` and the last plus one, if all rows have that run."""
    first, number = int(columns[0, 0]), columns.shape[1]
    run = torch.arange(first, first + number, device=columns.device)
    return (first, first + number) if bool((columns == run).all()) else None


def _scale_of_each_row(scale: float | Sequence[float] | None, batch: int) -> list[float]:
    wanted = f"at least 0 (off) and at most {LARGEST_FACTOR:g}"

    def check(name: str, value: Any) -> float:
        return float(number(name, value, wanted, lambda x: 0 <= x <= LARGEST_FACTOR))

    return per_row("guidance_scale", 0.0 if scale is None else scale, batch, check)
