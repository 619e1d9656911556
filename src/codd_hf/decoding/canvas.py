"""The canvas that decoding fills: tokens, positions to generate, and padding at the end of rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..checks.arguments import check_unmasked
from ..coupling.windows import CoupledBackbone, check_size
from .call import DecodingCall


@dataclass
class Canvas:
    """Rows of tokens, `[batch, T]`, some of which are still the mask token.

    Real tokens come first in a row, so that a row meets the same absolute positions however its
    prompt was padded. The generated positions follow a prompt, or are the gaps of a template.

    Attributes:
        tokens: `[batch, T]`.
        attention_mask: `[batch, T]`, 0 at padding.
        generated: `[batch, T]` bool, the positions to generate.
        start: `[batch]`, the first generated position; forced tokens and blocks count from here.
        window_origin: `[batch]`, where the grid of windows begins.
        no_end_before: `[batch]`, positions before this one hold no end token.
        end_ids: `[k]`, the end tokens.
        mask_token_id: the token of a position before one is committed.
        call: the choices of the call.
    """

    tokens: torch.Tensor
    attention_mask: torch.Tensor
    generated: torch.Tensor
    start: torch.Tensor
    window_origin: torch.Tensor
    no_end_before: torch.Tensor
    end_ids: torch.Tensor
    mask_token_id: int
    call: DecodingCall

    @classmethod
    def lay_out(
        cls,
        model: CoupledBackbone,
        call: DecodingCall,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
    ) -> Canvas:
        """Lays each row out as `[prompt][masks][padding]` or, to infill, `[template][padding]`.

        Windows begin where a prompt ends. In a template, as many windows as the span from the first
        gap to the last needs are centred over it, so that they cover text on both sides.

        Args:
            model: gives the mask token and the number of positions.
            call: the choices of the call.
            input_ids: `[batch, length]`, padded on any side.
            attention_mask: `[batch, length]`, 0 at padding, or None.

        Raises:
            ValueError: a prompt holds the mask token, a template has none, or a row exceeds the
                positions.
        """
        mask_token_id, device = model.mask_token_id, input_ids.device
        is_given = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        is_given = is_given.bool()
        given = is_given.sum(-1)
        size = given if call.infill else given + torch.tensor(call.gen_length, device=device)
        longest = int(size.argmax())
        what = f"The {int(size[longest])} tokens of a template"
        if not call.infill:
            rows = (ids[real] for ids, real in zip(input_ids, is_given, strict=True))
            check_unmasked("input_ids", rows, mask_token_id)
            what = f"A prompt of {int(given[longest])} tokens and `gen_length="
            what += f"{call.gen_length[longest]}`"
        check_size(model.max_positions, int(size[longest]), what)
        column = torch.arange(int(size[longest]), device=device)
        real = column < size[:, None]
        tokens = torch.full_like(real, call.behind, dtype=torch.long)
        tokens[column < given[:, None]] = input_ids[is_given].long()
        if not call.infill:
            tokens[real & (column >= given[:, None])] = mask_token_id
        generated = real & (tokens == mask_token_id)
        for row in (~generated.any(-1)).nonzero()[:, 0].tolist():
            raise ValueError(
                f"`infill` fills mask tokens, of which there is none in row {row}: put one (id "
                f"{mask_token_id}) wherever a token is to be found."
            )
        start = origin = generated.long().argmax(-1)
        if call.infill:
            span = torch.where(generated, column, 0).amax(-1) + 1 - start
            origin = start - torch.minimum(-span % call.head.window_length // 2, start)
            no_end_before = size
        else:
            no_end_before = start + torch.tensor(call.min_new_tokens, device=device)
        for row, forced in enumerate(call.forced_tokens):
            for place, token in forced.items():
                tokens[row, start[row] + place] = token
        end_ids = torch.tensor(call.end_ids, dtype=torch.long, device=device)
        return cls(
            tokens,
            real.long(),
            generated,
            start,
            origin,
            no_end_before,
            end_ids,
            mask_token_id,
            call,
        )

    def rows(self, index: torch.Tensor) -> Canvas:
        """A canvas of some rows, by ascending numbers `[n]`; of all of them, this one."""
        if len(index) == len(self.tokens):
            return self
        tensors = {k: v for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        del tensors["end_ids"]
        return replace(self, **{name: tensor[index] for name, tensor in tensors.items()})

    def open(self, early_stop: bool = False) -> torch.Tensor:
        """`[batch, T]` bool, where a token is to be committed; early, none behind an end token."""
        masked = self.generated & (self.tokens == self.mask_token_id)
        return masked & ~self._ends()[1] if early_stop else masked

    def close(self) -> torch.Tensor:
        """`[batch]` bool: the rows with an end token and nothing open before.

        In these rows, tokens that follow an end token become padding.
        """
        end, after = self._ends()
        closed = end.any(-1) & ~self.open(early_stop=True).any(-1)
        self.tokens = self.tokens.masked_fill(after & closed[:, None], self.call.behind)
        return closed

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Texts behind the prompts, or whole templates: tokens `[batch, n]`, and which are text.

        An end token is not text, nor is anything behind it.
        """
        begin = torch.zeros_like(self.start) if self.call.infill else self.start
        size = self.attention_mask.sum(-1) - begin
        number = torch.arange(int(size.max()), device=begin.device)
        inside = number < size[:, None]
        place = (begin[:, None] + number).clamp(max=self.tokens.shape[1] - 1)
        end, after = self._ends()
        is_text = inside & ~(end | after).gather(1, place)
        return torch.where(inside, self.tokens.gather(1, place), self.call.behind), is_text

    def _ends(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`[batch, T]` bool twice: the first end token of each text, and all that follows it."""
        if self.call.infill:  # an end token in a gap ends nothing
            return torch.zeros_like(self.generated), torch.zeros_like(self.generated)
        is_end = self.generated & torch.isin(self.tokens, self.end_ids)
        after = self.generated & (is_end.cumsum(-1) > is_end.long())
        return is_end & ~after, after
