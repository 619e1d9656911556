"""From a pass of the backbone to distributions over windows of tokens, and to the loss."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedModel

from ..backbones import BackboneFamily, BackboneStates, execution_device, family_of
from ..checks.arguments import RowError, several, token_id
from ..circuits import CoupledCategorical, Preceding
from ..circuits.factorized import forbidden_tokens, trivial_potentials, without_tokens
from ..configuration_codd import CoDDConfig
from ..modeling_head import CoDDHead
from .heads import CallHead, HeadName, Heads


class CoupledBackbone:
    """A backbone and the heads that couple its predictions: the base of [`CoDDModel`].

    Training, scoring and decoding build on it: `backbone_states` runs a pass of the backbone, and
    `window_distribution` reads the distribution over windows from it.
    """

    config: CoDDConfig
    backbone: PreTrainedModel
    coupling_head: CoDDHead | None
    heads: Heads
    generation_config: GenerationConfig | None

    @property
    def family(self) -> BackboneFamily:
        """The family that knows how to read the backbone."""
        return family_of(self.config.text_config)

    @property
    def device(self) -> torch.device:
        """The device that tokens go to, also while weights are offloaded."""
        return execution_device(self.backbone)

    @property
    def window_length(self) -> int:
        """Length of the default head's window; 32 without a head."""
        return 32 if self.coupling_head is None else self.coupling_head.config.window_length

    @cached_property
    def max_positions(self) -> int | None:
        """How many tokens a row may have; None where nothing bounds it."""
        return self.family.max_positions(self.backbone)

    @property
    def mask_token_id(self) -> int:
        """The mask token.

        Raises:
            ValueError: it is not known, or is none of the vocabulary.
        """
        if self.config.mask_token_id is None:
            raise ValueError("`mask_token_id` is not known: give it to `from_backbone`.")
        return token_id("mask_token_id", self.config.mask_token_id, self.config.vocab_size)

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
        pad = self.config.pad_token_id if pad_token_id is None else pad_token_id
        if pad is None and self.generation_config is not None:
            pad = self.generation_config.pad_token_id
        if end_ids is None:
            end_ids = several(self.config.eos_token_id) or [self.config.eos_token_id]
        if pad is None or pad in end_ids:
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
        masks = (self.real_tokens(row[None], **tokens) for row in rows)
        return [
            row if mask is None else row[mask[0].bool()]
            for row, mask in zip(rows, masks, strict=True)
        ]

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
        length, most = input_ids.shape[1], self.max_positions
        if position_ids is not None or attention_mask is None:
            if position_ids is None:
                check_size(most, length, f"`input_ids` of {length} tokens")
            return self.family.states(self.backbone, input_ids, attention_mask, position_ids)
        order = attention_mask.bool().logical_not().long().argsort(dim=1, stable=True)
        place = order.argsort(dim=1)
        if most is not None and length > most:
            size = attention_mask.bool().sum(1)
            row = int(size.argmax())
            check_size(most, int(size[row]), f"The {int(size[row])} tokens in row {row}")
            order, place = order[:, :most], place.clamp(max=most - 1)  # the rest is padding
        packed = self.family.states(
            self.backbone, input_ids.gather(1, order), attention_mask.gather(1, order)
        )
        return packed.gathered(place)

    def window_distribution(
        self,
        states: BackboneStates,
        input_ids: torch.Tensor,
        window_start: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
        temperature: float | None = None,
        head: HeadName | CallHead = None,
    ) -> CoupledCategorical:
        """The coupled distribution over `N` windows of a batch.

        Logits are projected at masked positions only. Without a head it is factorized.

        Args:
            states: the backbone's pass over `input_ids`.
            input_ids: `[batch, length]`; mask tokens are to be predicted, others are observed.
            window_start: `[N]`, first position of each window; positions outside the sequence are
                absent.
            attention_mask: `[batch, length]`; padding is absent.
            rows: `[N]`, the row each window lies on; default, one window per row.
            temperature: the evidence temperature; default, the head's.
            head: as [`Heads.of_call`] takes it.
        """
        call = self.heads.of_call(head)
        head, config, mask_token_id = call.module, self.config, self.mask_token_id
        if temperature is None:
            temperature = 1.0 if head is None else head.config.evidence_temperature
        rows = torch.arange(len(input_ids), device=input_ids.device) if rows is None else rows
        span = torch.arange(call.window_length, device=rows.device)
        index, present = _span(input_ids, rows, window_start, span, attention_mask)
        tokens = input_ids[index]
        observed = tokens != mask_token_id
        at = (present & ~observed).nonzero(as_tuple=True)
        predicted = states.logits((rows[at[0]], index[1][at]))
        check_logits(predicted, rows[at[0]])
        if head is None:
            predicted = without_tokens(predicted, mask_token_id, config.forbidden_token_ids)
        logits = predicted.new_zeros(*tokens.shape, predicted.shape[-1])
        logits = logits.index_put_(at, predicted)
        if head is None:
            return CoupledCategorical(
                logits,
                trivial_potentials(logits.shape[-1], logits.device),
                tokens=tokens,
                observed=observed,
                present=present,
                active=torch.zeros(len(rows), dtype=torch.bool, device=rows.device),
                temperature=temperature,
            )
        if head.config.vocab_size != logits.shape[-1]:
            raise ValueError(
                f"The head has a vocabulary of {head.config.vocab_size} tokens, but the "
                f"backbone's is now of {logits.shape[-1]}: a head cannot be resized, so use one "
                "that was fitted to this vocabulary, or `head=False`."
            )
        preceding = None
        if "copy" in head.config.conditioning:
            where = input_ids, window_start, attention_mask, rows, head
            preceding = self.preceding(states, *where).packed()
        return head(
            logits,
            tokens=tokens,
            observed=observed,
            last_hidden_state=states.last_hidden_state[index],
            present=None if bool(present.all()) else present,
            temperature=temperature,
            preceding=preceding,
            top_k=head.evidence_size,
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
        span = torch.arange(-length, 0, device=rows.device)
        index, present = _span(input_ids, rows, window_start, span, attention_mask)
        tokens = input_ids[index]
        present = present & (tokens != self.config.mask_token_id)
        return Preceding(tokens, present, states.last_hidden_state[index])

    def _trailing_window(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, window_length: int
    ) -> torch.Tensor:
        """`[batch]`, where the last window of each row's real tokens begins."""
        batch, length = input_ids.shape
        if attention_mask is None:
            return torch.full((batch,), length - window_length, device=input_ids.device)
        return length - attention_mask.flip(1).long().argmax(1) - window_length

    def _coupled_logits(self, logits, distribution, window_start, coupling, generator):
        """`logits` with those of the window as `coupling` says."""
        if coupling == "marginal":
            coupled, where = distribution.marginals.log(), distribution.masked
        else:
            latents = distribution.sample_latents(generator)
            coupled, where = distribution.logits_given(latents), distribution.present
        rows, columns = where.nonzero(as_tuple=True)
        values = coupled[rows, columns].to(logits.dtype)
        return logits.index_put((rows, window_start[rows] + columns), values)

    def _loss(self, states, input_ids, attention_mask, labels, head: CallHead) -> torch.Tensor:
        """The mean negative log-likelihood of supervised masked tokens, jointly over windows."""
        is_label = labels != -100
        supervised = is_label & (input_ids == self.config.mask_token_id)
        if attention_mask is not None:
            supervised &= attention_mask.bool()
        rows, columns = supervised.nonzero(as_tuple=True)
        if len(rows) == 0:
            if bool(is_label.any()):
                raise ValueError(
                    "`labels` supervise tokens, but `input_ids` hold the mask token "
                    f"({self.config.mask_token_id}) at none of them but padding: mask some, as "
                    "`DataCollatorForMaskedDiffusion` does, or give -100 as all `labels`."
                )
            return 0.0 * states.last_hidden_state.sum()
        # Windows are aligned with the first supervised token of each row.
        first, length = is_label.long().argmax(1), head.window_length
        window = (columns - first[rows]).div(length, rounding_mode="floor")
        window_rows, window = torch.stack((rows, window)).unique(dim=1)
        starts = first[window_rows] + window * length
        distribution = self.window_distribution(
            states, input_ids, starts, attention_mask, rows=window_rows, head=head
        )
        self._check_labels(labels[supervised], rows, head)
        positions = starts[:, None] + torch.arange(length, device=labels.device)
        targets = F.pad(labels, (0, length), value=-100)[window_rows[:, None], positions]
        counted = (targets != -100) & distribution.masked
        log_prob = distribution.partial_log_prob(targets.clamp(min=0), counted)
        return -log_prob.sum() / counted.sum().clamp(min=1)

    def _check_labels(self, labels: torch.Tensor, rows: torch.Tensor, head: CallHead) -> None:
        """Raises a ValueError for labels `[n]` of rows `[n]` that no prediction can give."""
        source = self.config if head.module is None else head.module.config
        ids = source.mask_token_id, source.forbidden_token_ids
        never = forbidden_tokens(source.vocab_size, *ids, labels.device)
        if never is not None and bool(never[labels].any()):
            place = int(never[labels].long().argmax())
            raise ValueError(
                "`labels` must be -100 or tokens that the model may generate, got "
                f"{int(labels[place])} in row {int(rows[place])}."
            )

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs) -> dict:
        """The arguments of `forward`, as they are; PEFT asks every language model for this."""
        return {"input_ids": input_ids, **kwargs}


def _span(
    input_ids: torch.Tensor,
    rows: torch.Tensor,
    start: torch.Tensor,
    offsets: torch.Tensor,
    attention_mask: torch.Tensor | None,
) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The places `[N, n]` at `offsets` `[n]` from `start` `[N]`, and which of them hold tokens."""
    positions, length = start[:, None] + offsets, input_ids.shape[1]
    index = rows[:, None], positions.clamp(0, length - 1)
    present = (positions >= 0) & (positions < length)
    return index, present if attention_mask is None else present & attention_mask[index].bool()


def check_logits(logits: torch.Tensor, rows: torch.Tensor) -> None:
    """Raises a RowError where logits `[n, vocab]` of rows `[n]` are NaN or infinite."""
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
