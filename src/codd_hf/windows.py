"""From a pass of the backbone to distributions over windows of tokens, and to the loss."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .backbones import BackboneStates
from .circuits import CoupledCategorical, Preceding
from .factorized import trivial_potentials, without_tokens
from .heads import CallHead, HeadName
from .modeling_head import CoDDHead


class WindowsMixin:
    """The part of a [`CoDDModel`] that reads windows; training and decoding build on it."""

    @property
    def window_length(self) -> int:
        """Length of the default head's window; 32 without a head."""
        return 32 if self.coupling_head is None else self.coupling_head.config.window_length

    def backbone_states(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> BackboneStates:
        """One backbone pass over `[batch, length]` tokens.

        Real tokens are moved to the front of each row first (and the results moved back), so that
        padding on any side leaves positions, absolute ones too, as they are without padding.
        """
        if attention_mask is None or position_ids is not None:
            return self.family.states(self.backbone, input_ids, attention_mask, position_ids)
        order = attention_mask.bool().logical_not().long().argsort(dim=1, stable=True)
        packed = self.family.states(
            self.backbone, input_ids.gather(1, order), attention_mask.gather(1, order)
        )
        place = order.argsort(dim=1)
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
        vocabularies are read by their likeliest tokens (`CoDDHead.evidence_top_k`).

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
                top_k=head.evidence_top_k,
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
        first = (labels != -100).long().argmax(1)
        window = (torch.arange(labels.shape[1], device=labels.device) - first[:, None]).div(
            head.window_length, rounding_mode="floor"
        )
        rows, columns = supervised.nonzero(as_tuple=True)
        if len(rows) == 0:
            return 0.0 * states.last_hidden_state.sum()
        pairs = torch.stack((rows, window[rows, columns])).unique(dim=1)
        rows, starts = pairs[0], first[pairs[0]] + pairs[1] * head.window_length
        distribution = self.window_distribution(
            states, input_ids, starts, attention_mask, rows=rows, head=head
        )
        positions = starts[:, None] + torch.arange(head.window_length, device=labels.device)
        padded = F.pad(labels, (0, head.window_length), value=-100)
        targets = padded[rows[:, None], positions]
        known = (targets != -100) & distribution.masked
        log_prob = distribution.partial_log_prob(targets.clamp(min=0), known)
        return -log_prob.sum() / known.sum().clamp(min=1)

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs) -> dict:
        """The arguments of `forward`, as they are; PEFT asks every language model for this."""
        return {"input_ids": input_ids, **kwargs}
