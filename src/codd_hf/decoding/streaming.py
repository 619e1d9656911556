"""Streaming: how the denoising loop speaks transformers' protocol for diffusion streamers."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from .loop import OnStep


class DiffusionStreamer(Protocol):
    """What `generate` needs of a streamer, as `transformers.TextDiffusionStreamer` has it.

    A streamer may also have `put_draft(value)`; one without (`TextStreamer`,
    `TextIteratorStreamer`) hears of complete blocks only.
    """

    def put(self, value: torch.Tensor) -> None:
        """Takes tokens `[batch, n]` that stay as they are: the prompts first, then blocks."""

    def end(self) -> None:
        """Is told that nothing follows."""


class BlockStream:
    """Passes the steps of one generation on to a streamer.

    The streamer gets `put(prompts)`, after every step `put_draft(block)` with the block that is
    being filled, the mask token where nothing is committed yet, and `put(block)` once nothing in
    the block or before it changes any more, which the first step of the next block shows. All are
    token ids `[batch, n]` on the CPU. The blocks put, one after the other, are the beginning of
    what `generate` returns after the prompts, and blocks that were not decoded because all texts
    had ended are left out.

    Args:
        streamer: the receiver.
        mask_token_id: what a position holds before it is committed.
        block_length: tokens in a block; None for one block, everything.
        behind: what stands behind the end of rows that are shorter than the longest one.
    """

    def __init__(
        self,
        streamer: DiffusionStreamer,
        mask_token_id: int,
        block_length: int | None,
        behind: int,
    ) -> None:
        self.streamer = streamer
        self.mask_token_id = mask_token_id
        self.block_length = block_length
        self.behind = behind
        self._complete = 0
        self._begun = 0

    def begin(self, prompts: torch.Tensor) -> None:
        """Puts the prompts `[batch, prompt_length]`, as they were given."""
        self.streamer.put(prompts.cpu())

    def after(self, on_step: OnStep | None) -> OnStep:
        """A callback for `denoise` that calls `on_step` and shows the canvas that results."""

        def report(step: int, timestep: Any, state: dict[str, torch.Tensor]) -> torch.Tensor | None:
            returned = None if on_step is None else on_step(step, timestep, state)
            self._step(state if returned is None else state | {"canvas": returned})
            return returned

        return report

    def finish(self, sequences: torch.Tensor) -> None:
        """Puts the blocks that are still open, from the result `[batch, n]`, and ends."""
        self._put_until(self._begun, sequences)
        self.streamer.end()

    def _step(self, state: dict[str, torch.Tensor]) -> None:
        generated = state["generated"]
        size = generated.sum(-1, keepdim=True)
        number = torch.arange(int(size.max()), device=generated.device)
        place = generated.long().argmax(-1, keepdim=True) + number
        place = place.clamp(max=generated.shape[1] - 1)
        tokens = torch.where(number < size, state["canvas"].gather(1, place), self.behind)
        changed = state["transfer_index"].gather(1, place) & (number < size)
        in_work = ((tokens == self.mask_token_id) | changed).any(0).nonzero()[:, 0].tolist()
        block_length = self.block_length or tokens.shape[1]
        start = in_work[0] // block_length * block_length
        self._put_until(start, tokens)
        self._begun = start + block_length
        if hasattr(self.streamer, "put_draft"):
            self.streamer.put_draft(tokens[:, start : self._begun].cpu())

    def _put_until(self, end: int, tokens: torch.Tensor) -> None:
        while self._complete < min(end, tokens.shape[1]):
            following = self._complete + (self.block_length or tokens.shape[1])
            self.streamer.put(tokens[:, self._complete : following].cpu())
            self._complete = following
