"""Streaming: how the denoising loop speaks transformers' protocol for diffusion streamers."""

from __future__ import annotations

import torch
from transformers.generation.streamers import BaseStreamer

from ..checks.arguments import shown
from .call import DecodingCall
from .loop import OnStep


class BlockStream:
    """Passes the steps of one generation on to a streamer.

    The streamer gets `put(prompts)`, after every step `put_draft(block)` with the block that is
    being filled, the mask token where nothing is committed yet, and `put(block)` once nothing in
    the block or before it changes any more, which the first step of the next block shows. All are
    token ids `[batch, n]` on the CPU. The blocks put, one after the other, are the beginning of
    what `generate` returns after the prompts. A streamer without `put_draft` (`TextStreamer`) hears
    of blocks only.

    Args:
        streamer: the receiver.
        prompts: `[batch, prompt_length]`.
        call: gives the length of blocks and the padding behind rows that are shorter than others.
        on_step: is called before the streamer hears of a step.
    """

    def __init__(
        self,
        streamer: BaseStreamer,
        prompts: torch.Tensor,
        call: DecodingCall,
        on_step: OnStep | None = None,
    ) -> None:
        if call.infill:
            raise ValueError(
                "`streamer` is told what follows a prompt, which `infill` has not: leave it out."
            )
        if not (hasattr(streamer, "put") and hasattr(streamer, "end")):
            raise TypeError(f"`streamer` must have `put` and `end`, got {shown(streamer)}.")
        self.streamer, self.call, self.on_step = streamer, call, on_step
        self.block_length = call.block_length or max(call.gen_length)
        self._complete = self._begun = 0
        streamer.put(prompts.cpu())

    def __call__(
        self, step: int, timestep: torch.Tensor, state: dict[str, torch.Tensor]
    ) -> torch.Tensor | None:
        """A callback for `denoise`: calls `on_step` and shows the canvas that results."""
        returned = None if self.on_step is None else self.on_step(step, timestep, state)
        canvas = state["canvas"] if returned is None else returned
        generated = state["generated"]
        size = generated.sum(-1, keepdim=True)
        number = torch.arange(int(size.max()), device=generated.device)
        place = generated.long().argmax(-1, keepdim=True) + number
        place = place.clamp(max=generated.shape[1] - 1)
        tokens = torch.where(number < size, canvas.gather(1, place), self.call.behind)
        changed = state["transfer_index"].gather(1, place) & (number < size)
        in_work = (tokens == self.call.mask_token_id) | changed
        first = int(in_work.any(0).nonzero()[0])
        start = first // self.block_length * self.block_length
        self._put_until(start, tokens)
        self._begun = start + self.block_length
        if hasattr(self.streamer, "put_draft"):
            self.streamer.put_draft(tokens[:, start : self._begun].cpu())
        return returned

    def finish(self, sequences: torch.Tensor) -> None:
        """Puts the blocks that are still open, from the result `[batch, n]`, and ends."""
        self._put_until(self._begun, sequences)
        self.streamer.end()

    def _put_until(self, end: int, tokens: torch.Tensor) -> None:
        while self._complete < min(end, tokens.shape[1]):
            following = self._complete + self.block_length
            self.streamer.put(tokens[:, self._complete : following].cpu())
            self._complete = following
