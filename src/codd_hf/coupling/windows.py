"""From a pass of the backbone to distributions over windows of tokens, and to the loss."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch.nn import functional as F

from ..backbones import BackboneStates
from ..checks.arguments import LARGEST_INTEGER, RowError, as_tensor, several
from ..circuits import CoupledCategorical, Preceding
from ..circuits.factorized import forbidden_tokens, trivial_potentials, without_tokens
from ..modeling_head import CoDDHead
from .heads import CallHead, HeadName


class WindowsMixin:
    """The part of a [`CoDDModel`] that reads windows; training and decoding build on it."""

    @property
    def window_length(self) -> int:
        """Length of the default head's window; 32 without a head."""
        return 32 if self.coupling_head is None else self.coupling_head.config.window_length

    @cached_property
    def max_positions(self) -> int | None:
        """How many tokens a row may have; None where nothing bounds it."""
        return self.family.max_positions(self.backbone)

    def real_tokens(
        self,
        input_ids: torch.Tensor,
        pad_token_id: int | None = None,
        end_ids: Sequence[int] | None = None,
    ) -> torch.Tensor | None:
        """The attention mask of tokens that come without one, as transformers' `generate` finds it.

        Padding tokens are padding, unless they end texts too and so may be part of one.

        Args:
            input_ids: `[batch, length]`.
            pad_token_id: the padding token; default, the backbone's.
            end_ids: tokens that end a text; default, the backbone's.

        Returns:
            `[batch, length]`, 0 at padding; None where there is none.
        """
        pad = pad_token_id
        if pad is None:
            pad = self.config.pad_token_id
        if pad is None and self.generation_config is not None:
            pad = self.generation_config.pad_token_id
        if end_ids is None:
            end_ids = several(self.config.eos_token_id) or [self.config.eos_token_id]
        if pad is None or pad in end_ids or torch.compiler.is_compiling():
            return None
        real = input_ids != pad
        return None if bool(real.all()) else real.long()

    def _warn_of_padding(self, input_ids: torch.Tensor) -> None:
        """Tells, as transformers' models do, that padding is read as text without a mask."""
        real = self.real_tokens(input_ids)
        if real is not None and not bool(real[:, [0, -1]].all()):
            warnings.warn(
                f"`input_ids` begin or end with the padding token ({self.config.pad_token_id}), "
                "which is read as text without an `attention_mask`: give one.",
                stacklevel=3,
            )

    def unpadded(self, rows: Sequence[torch.Tensor], **tokens: Any) -> list[torch.Tensor]:
        """Rows of token ids `[length]` without their padding, as `real_tokens` finds it."""
        masks = [self.real_tokens(row[None], **tokens) for row in rows]
        return [
            row if mask is None else row[mask[0].bool()]
            for row, mask in zip(rows, masks, strict=True)
        ]

    def _check_positions(self, position_ids: Any, input_ids: torch.Tensor) -> torch.Tensor:
        """`position_ids` `[batch or 1, length]`, all of which the backbone has."""
        positions = as_tensor("position_ids", position_ids, int, device=input_ids.device)
        batch, length = input_ids.shape
        if tuple(positions.shape) not in ((batch, length), (1, length)):
            raise ValueError(
                f"`position_ids` must have shape {(batch, length)}, got {tuple(positions.shape)}."
            )
        most = LARGEST_INTEGER if self.max_positions is None else self.max_positions
        if not torch.compiler.is_compiling() and bool(
            ((positions < 0) | (positions >= most)).any()
        ):
            raise ValueError(
                f"`position_ids` must be from 0 to {most - 1}, got "
                f"{int(positions.min())} to {int(positions.max())}."
            )
        return positions

    def backbone_states(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> BackboneStates:
        """One backbone pass over `[batch, length]` tokens.

        Real tokens are moved to the front of each row first (and the results moved back), so that
        padding on any side leaves positions, absolute ones too, as they are without padding.

        Raises:
            ValueError: a row has more tokens than the backbone has positions.
        """
        if position_ids is not None:
            return self.family.states(self.backbone, input_ids, attention_mask, position_ids)
        length, most = input_ids.shape[1], self.max_positions
        too_long = most is not None and length > most
        if attention_mask is None:
            if too_long:
                check_size(most, length, f"`input_ids` of {length} tokens")
            return self.family.states(self.backbone, input_ids, attention_mask, position_ids)
        order = attention_mask.bool().logical_not().long().argsort(dim=1, stable=True)
        place = order.argsort(dim=1)
        if too_long:
            size = attention_mask.bool().sum(1)
            row = int(size.argmax())
            check_size(most, int(size[row]), f"The {int(size[row])} tokens in row {row}")
            order, place = order[:, :most], place.clamp(max=most - 1)  # the rest is padding
        packed = self.family.states(
            self.backbone, input_ids.gather(1, order), attention_mask.gather(1, order)
        )
        all_rows = torch.arange(len(input_ids), device=input_ids.device)[:, None]

        def read_logits(index: tuple[torch.Tensor, ...] | None) -> torch.Tensor:
            rows, columns = (all_rows, slice(None)) if index is None else index
            columns = place[rows, columns] if index is not None else place
            return packed.logits((rows, columns))

        return BackboneStates(packed.last_hidden_state[all_rows, place], read_logits)

    def window_distribution(
        self,
        states: BackboneStates,
        input_ids: torch.Tensor,
        window_start: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
        temperature: float = 1.0,
        active: torch.Tensor | None = None,
        head: HeadName | CallHead = None,
    ) -> CoupledCategorical:
        """The coupled distribution over `N` windows of a batch.

        Logits are projected at masked positions only. Without a head it is factorized. Large
        vocabularies are read by their likeliest tokens (`CoDDHead.evidence_size`).

        Args:
            states: the backbone's pass over `input_ids`.
            input_ids: `[batch, length]`; mask tokens are to be predicted, others are observed.
            window_start: `[N]`, first position of each window; what lies outside the sequence is
                absent.
            attention_mask: `[batch, length]`; padding is absent.
            rows: `[N]`, the row each window lies on; default, one window per row.
            temperature: the evidence temperature.
            active: `[N]` bool, False for windows that are to stay factorized.
            head: as `head_of_call` takes it.
        """
        _, head, window_length = self.head_of_call(head)
        if self.config.mask_token_id is None:
            raise ValueError("`mask_token_id` is not known: give it to `from_backbone`.")
        batch, length = input_ids.shape
        rows = torch.arange(batch, device=input_ids.device) if rows is None else rows
        positions = window_start[:, None] + torch.arange(window_length, device=rows.device)
        inside = (positions >= 0) & (positions < length)
        positions = positions.clamp(0, length - 1)
        index = (rows[:, None], positions)
        present = inside if attention_mask is None else inside & attention_mask[index].bool()
        tokens = input_ids[index]
        observed = tokens != self.config.mask_token_id
        wanted = present & ~observed
        at = wanted.nonzero(as_tuple=True)
        known = states.logits((rows[at[0]], positions[at]))
        check_logits(known, rows[at[0]])
        if head is None:
            config = self.config
            known = without_tokens(known, config.mask_token_id, config.forbidden_token_ids)
        logits = known.new_zeros(*positions.shape, known.shape[-1]).index_put_(at, known)
        if head is not None:
            if head.config.vocab_size != logits.shape[-1]:
                raise ValueError(
                    f"The head has a vocabulary of {head.config.vocab_size} tokens, but the "
                    f"backbone's is now of {logits.shape[-1]}: a head cannot be resized, so use "
                    "one that was fitted to this vocabulary, or `disable_head()`."
                )
            if head.config.emission == "tied":
                self._bind(head)
            preceding = None
            if head.context_maps is not None and head.context_maps.copies:
                preceding = self.preceding(
                    states, input_ids, window_start, attention_mask, rows, head
                )
                if not torch.compiler.is_compiling():
                    preceding = preceding.packed()
            return head(
                logits,
                tokens=tokens,
                observed=observed,
                last_hidden_state=states.last_hidden_state[index],
                present=None if bool(present.all()) else present,
                temperature=temperature,
                active=active,
                preceding=preceding,
                top_k=head.evidence_size,
            )
        return CoupledCategorical(
            logits,
            trivial_potentials(logits.shape[-1], logits.device),
            tokens=tokens,
            observed=observed,
            present=present,
            active=torch.zeros(len(rows), dtype=torch.bool, device=rows.device),
            temperature=temperature,
        )

    def preceding(
        self,
        states: BackboneStates,
        input_ids: torch.Tensor,
        window_start: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
        head: CoDDHead | None = None,
    ) -> Preceding:
        """The last `copy_length` tokens before each window; masked ones do not count as present.

        The arguments are those of `window_distribution`.
        """
        length = (self.coupling_head if head is None else head).config.copy_length
        rows = torch.arange(len(input_ids), device=input_ids.device) if rows is None else rows
        positions = window_start[:, None] + torch.arange(-length, 0, device=rows.device)
        present = (positions >= 0) & (positions < input_ids.shape[1])
        index = (rows[:, None], positions.clamp(0, input_ids.shape[1] - 1))
        tokens = input_ids[index]
        present = present & (tokens != self.config.mask_token_id)
        if attention_mask is not None:
            present = present & attention_mask[index].bool()
        return Preceding(tokens, present, states.last_hidden_state[index])

    def _bind(self, head: CoDDHead) -> None:
        """Gives tied emissions the output embedding; where that is offloaded, a copy, once."""
        embedding = self.get_output_embeddings()
        if not embedding.weight.is_meta:
            head.bind(embedding.weight)
        elif not head._bound:
            embedding._hf_hook.pre_forward(embedding)  # accelerate's, which fetches the weight
            try:
                head.bind(embedding.weight)
            finally:
                embedding._hf_hook.post_forward(embedding, None)

    @staticmethod
    def _trailing_window(input_ids, attention_mask, window_length: int) -> torch.Tensor:
        batch, length = input_ids.shape
        if attention_mask is None:
            end = torch.full((batch,), length, device=input_ids.device)
        else:
            end = length - attention_mask.flip(1).long().argmax(1)
        return end - window_length

    def _coupled_logits(self, logits, distribution, window_start, coupling, generator):
        if coupling == "marginal":
            coupled, where = distribution.marginals.log(), distribution.masked
        else:
            latents = distribution.sample_latents(generator)
            coupled, where = distribution.logits_given(latents), distribution.present
        rows, columns = where.nonzero(as_tuple=True)
        values = coupled[rows, columns].to(logits.dtype)
        return logits.index_put((rows, window_start[rows] + columns), values)

    def _loss(self, states, input_ids, attention_mask, labels, head: CallHead) -> torch.Tensor:
        supervised = (labels != -100) & (input_ids == self.config.mask_token_id)
        if attention_mask is not None:
            supervised &= attention_mask.bool()
        first = (labels != -100).long().argmax(1)
        window = (torch.arange(labels.shape[1], device=labels.device) - first[:, None]).div(
            head.window_length, rounding_mode="floor"
        )
        rows, columns = supervised.nonzero(as_tuple=True)
        if len(rows) == 0:
            if bool((labels != -100).any()):
                raise ValueError(
                    "`labels` supervise tokens, but `input_ids` hold the mask token "
                    f"({self.config.mask_token_id}) at none of them but padding: mask some, as "
                    "`DataCollatorForMaskedDiffusion` does, or give -100 as all `labels`."
                )
            return 0.0 * states.last_hidden_state.sum()
        supervised_rows = rows
        pairs = torch.stack((rows, window[rows, columns])).unique(dim=1)
        rows, starts = pairs[0], first[pairs[0]] + pairs[1] * head.window_length
        distribution = self.window_distribution(
            states, input_ids, starts, attention_mask, rows=rows, head=head
        )
        self._check_labels(labels[supervised], supervised_rows, head)
        positions = starts[:, None] + torch.arange(head.window_length, device=labels.device)
        padded = F.pad(labels, (0, head.window_length), value=-100)
        targets = padded[rows[:, None], positions]
        known = (targets != -100) & distribution.masked
        log_prob = distribution.partial_log_prob(targets.clamp(min=0), known)
        return -log_prob.sum() / known.sum().clamp(min=1)

    def _check_labels(self, labels: torch.Tensor, rows: torch.Tensor, head: CallHead) -> None:
        """Raises a ValueError for labels `[n]` of rows `[n]` that no prediction can give."""
        config = self.config
        if head.module is None:
            never = config.vocab_size, config.mask_token_id, config.forbidden_token_ids
            never = forbidden_tokens(*never, labels.device)
        else:
            never = head.module.forbidden
        if never is None or torch.compiler.is_compiling():
            return
        outside = never.to(labels.device)[labels]
        if bool(outside.any()):
            raise ValueError(
                "`labels` must be -100 or tokens that the model may generate, got "
                f"{int(labels[outside][0])} in row {int(rows[outside][0])}."
            )

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs) -> dict:
        """The arguments of `forward`, as they are; PEFT asks every language model for this."""
        return {"input_ids": input_ids, **kwargs}


def check_logits(logits: torch.Tensor, rows: torch.Tensor) -> None:
    """Raises a RowError where logits `[n, vocab]` of rows `[n]` are NaN or infinite."""
    if torch.compiler.is_compiling():
        return
    defined = logits.detach().amax(-1).isfinite()
    if not bool(defined.all()):
        raise RowError(
            "The backbone's logits are NaN or infinite in row {row}: look for the cause in its "
            "weights and its dtype.",
            int(rows[~defined][0]),
        )


def check_size(most: int | None, size: int, what: str) -> None:
    """Raises a ValueError if `size` tokens are more than `most`; `what` says what they are."""
    if most is not None and size > most:
        raise ValueError(
            f"{what} exceed the {most} positions of the backbone: shorten one of them."
        )
