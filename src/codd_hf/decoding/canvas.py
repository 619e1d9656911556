"""The canvas that decoding fills: given tokens, positions to generate, and padding at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..checks.arguments import check_unmasked
from ..configuration_codd import CoDDConfig
from ..coupling.windows import check_size


@dataclass
class Canvas:
    """Rows of tokens, `[batch, T]`, some of which are still the mask token.

    Real tokens come first in a row, so that it meets the same absolute positions however its prompt
    was padded. What is generated is one run of positions after a prompt, or the gaps of a template;
    such a run may end early, with an end token of its own.

    Attributes:
        tokens: `[batch, T]`.
        attention_mask: `[batch, T]`, 0 at padding.
        generated: `[batch, T]` bool, the positions that are not given.
        run_start: `[batch, T]`, where the run of generated positions begins that a position is in.
        start: `[batch]`, the first generated position; forced tokens and blocks count from here.
        length: `[batch]`, the positions from there to the last generated one.
        window_origin: `[batch]`, where the grid of windows begins.
        no_end_before: `[batch]`, positions before this one hold no end token.
        end_ids: `[k]`, the tokens that end a run.
        mask_token_id: what a position holds before a token is committed.
        behind: what stands behind the end of a run's text, and behind a row.
    """

    tokens: torch.Tensor
    attention_mask: torch.Tensor
    generated: torch.Tensor
    run_start: torch.Tensor
    start: torch.Tensor
    length: torch.Tensor
    window_origin: torch.Tensor
    no_end_before: torch.Tensor
    end_ids: torch.Tensor
    mask_token_id: int
    behind: int

    @classmethod
    def of_prompts(
        cls,
        config: CoDDConfig,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        end_ids: Sequence[int],
        behind: int,
        gen_length: Sequence[int],
        min_new_tokens: Sequence[int],
        forced_tokens: Sequence[Mapping[int, int]],
        max_positions: int | None = None,
    ) -> Canvas:
        """Lays each row out as `[prompt][masks][padding]`; the windows begin where the prompt ends.

        Args:
            config: gives the token ids.
            input_ids: `[batch, prompt_length]`, padded on any side.
            attention_mask: `[batch, prompt_length]`, 0 at padding, or None.
            end_ids: end-of-text tokens.
            behind: what stands behind the end of a text.
            gen_length: the number of tokens to generate in each row.
            min_new_tokens: for each row, how many of them come before the first end-of-text token.
            forced_tokens: for each row, tokens by their place among the generated ones.
            max_positions: of the backbone; None where nothing bounds them.

        Raises:
            ValueError: a prompt holds the mask token, or the canvas exceeds the positions.
        """
        is_prompt = _real(input_ids, attention_mask)
        start = is_prompt.sum(-1)
        length = torch.tensor(gen_length, device=start.device)
        rows = (ids[real] for ids, real in zip(input_ids, is_prompt, strict=True))
        check_unmasked("input_ids", rows, config.mask_token_id)
        longest = int((start + length).argmax())
        check_size(
            max_positions,
            int(start[longest] + length[longest]),
            f"A prompt of {int(start[longest])} tokens and `gen_length={int(length[longest])}`",
        )
        column = torch.arange(int((start + length).max()), device=start.device)
        real, generated = column < (start + length)[:, None], column >= start[:, None]
        tokens = torch.full_like(real, behind, dtype=torch.long)
        tokens[column < start[:, None]] = input_ids[is_prompt].long()
        tokens[real & generated] = config.mask_token_id
        for row, forced in enumerate(forced_tokens):
            for place, token in forced.items():
                tokens[row, start[row] + place] = token
        return cls(
            tokens,
            real.long(),
            real & generated,
            start[:, None].expand_as(tokens),
            start,
            length,
            start,
            start + torch.tensor(min_new_tokens, device=start.device),
            torch.tensor(end_ids, dtype=torch.long, device=start.device),
            config.mask_token_id,
            behind,
        )

    @classmethod
    def of_templates(
        cls,
        config: CoDDConfig,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        end_ids: Sequence[int],
        behind: int,
        window_length: int,
        max_positions: int | None = None,
    ) -> Canvas:
        """Rows that hold mask tokens, the gaps, anywhere among given ones.

        As many windows as the span from the first gap to the last needs are centred over it, so
        that they cover given text on both sides.

        Args:
            config: gives the token ids.
            input_ids: `[batch, length]`, padded on any side.
            attention_mask: `[batch, length]`, 0 at padding, or None.
            end_ids: end-of-text tokens; in a gap, padding counts as one.
            behind: what stands behind the end of a gap's text.
            window_length: of the circuit.
            max_positions: of the backbone; None where nothing bounds them.

        Raises:
            ValueError: a row holds no mask token, or exceeds the positions.
        """
        is_real = _real(input_ids, attention_mask)
        size = is_real.sum(-1)
        check_size(max_positions, int(size.max()), f"The {int(size.max())} tokens of a template")
        column = torch.arange(int(size.max()), device=size.device)
        real = column < size[:, None]
        tokens = torch.full_like(real, behind, dtype=torch.long)
        tokens[real] = input_ids[is_real].long()
        gaps = real & (tokens == config.mask_token_id)
        for row in (~gaps.any(-1)).nonzero()[:, 0].tolist():
            raise ValueError(
                f"`infill` fills mask tokens, of which there is none in row {row}: put one "
                f"(id {config.mask_token_id}) wherever a token is to be found."
            )
        begins = gaps & ~torch.nn.functional.pad(gaps, (1, 0))[:, :-1]
        start = gaps.long().argmax(-1)
        length = torch.where(gaps, column, 0).amax(-1) + 1 - start
        slack = -length % window_length
        if config.pad_token_id is not None and config.pad_token_id not in end_ids:
            end_ids = [*end_ids, config.pad_token_id]
        return cls(
            tokens,
            real.long(),
            gaps,
            torch.where(begins, column, 0).cummax(-1).values,
            start,
            length,
            start - torch.minimum(slack // 2, start),
            size,
            torch.tensor(end_ids, dtype=torch.long, device=size.device),
            config.mask_token_id,
            behind,
        )

    def result(self, begin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the rows hold from position `begin` `[batch]` on.

        Args:
            begin: the first position that counts.

        Returns:
            Tokens `[batch, n]`, and which of them are text: given or generated, but no end token of
            a run nor what follows it there.
        """
        size = self.attention_mask.sum(-1) - begin
        number = torch.arange(int(size.max()), device=begin.device)
        inside = number < size[:, None]
        place = (begin[:, None] + number).clamp(max=self.tokens.shape[1] - 1)
        end, after = self._ends()
        is_text = inside & ~(end | after).gather(1, place)
        return torch.where(inside, self.tokens.gather(1, place), self.behind), is_text

    def rows(self, index: torch.Tensor) -> Canvas:
        """A canvas of some rows, given by ascending numbers `[n]`; of all of them, this one."""
        if len(index) == len(self.tokens):
            return self
        of_batch = {
            name: value[index]
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor) and name != "end_ids"
        }
        return replace(self, **of_batch)

    def open(self, early_stop: bool) -> torch.Tensor:
        """`[batch, T]` bool, where a token is still wanted.

        Args:
            early_stop: whether none is wanted after the end token of a run.
        """
        masked = self.generated & (self.tokens == self.mask_token_id)
        return masked & ~self._ends()[1] if early_stop else masked

    def close(self) -> torch.Tensor:
        """`[batch]` bool: the rows with an end token and nothing open before.

        What follows an end token in its run becomes `behind` in these rows.
        """
        end, after = self._ends()
        closed = end.any(-1) & ~self.open(early_stop=True).any(-1)
        self.tokens = self.tokens.masked_fill(after & closed[:, None], self.behind)
        return closed

    def _ends(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`[batch, T]` bool twice: the first end token of each run, and what follows it there."""
        is_end = self.generated & torch.isin(self.tokens, self.end_ids)
        before = is_end.cumsum(-1) - is_end.long()
        after = self.generated & (before > before.gather(1, self.run_start))
        return is_end & ~after, after


def _real(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    return attention_mask.bool()


def filler(config: CoDDConfig, end_ids: Sequence[int], pad_token_id: int | None) -> int:
    """What stands behind the end of a text: padding or, as in transformers, an end token."""
    known = (pad_token_id, config.pad_token_id, *end_ids[:1])
    known = [token for token in known if token not in (None, config.mask_token_id)]
    return known[0] if known else config.mask_token_id
