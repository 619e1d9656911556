"""Windows: where they lie, and from a pass of the backbone to their distributions and the loss."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from transformers import GenerationConfig, PretrainedConfig

from ..backbones import (
    BackboneFamily,
    BackboneStates,
    block_length_of,
    execution_device,
    family_of,
    noise_of,
    shifts_logits,
)
from ..checks.arguments import RowError, several
from ..circuits import CoupledCategorical, Preceding, without_circuit, without_tokens
from .heads import CallHead, HeadName, WithHeads


class CoupledBackbone(WithHeads):
    """A backbone and the heads that couple its predictions: the base of [`CoDDModel`].

    `backbone_states` runs a pass, `window_distribution` reads distributions over windows from it.
    """

    generation_config: GenerationConfig | None

    @property
    def family(self) -> BackboneFamily:
        """The family that knows how to read the backbone."""
        return family_of(self.config.text_config)

    @property
    def device(self) -> torch.device:
        """The device that tokens go to, also while weights are offloaded."""
        return execution_device(self.backbone)

    @cached_property
    def max_positions(self) -> int | None:
        """How many tokens a row may have; None where nothing bounds it."""
        return self.family.max_positions(self.backbone)

    @property
    def mask_token_id(self) -> int:
        """The mask token; raises a ValueError if it is not known, or there is none."""
        if self.config.mask_token_id is None:
            if noise_of(self.config.text_config) == "uniform":
                raise ValueError(
                    "The backbone's noise is uniform, not masks, which this needs: call the model, "
                    "or its `generate`."
                )
            raise ValueError(
                "`mask_token_id` is not known: give it to `from_backbone`, or by `--mask-token-id`."
            )
        return self.config.mask_token_id

    def predicted(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Which tokens are predicted and not observed: masks or, of uniform noise, all; as bool."""
        if noise_of(self.config.text_config) == "uniform":
            return torch.ones_like(input_ids, dtype=torch.bool)
        return input_ids == self.mask_token_id

    def get_output_embeddings(self) -> Any:
        """The backbone's."""
        return self.backbone.get_output_embeddings()

    def real_tokens(
        self,
        input_ids: torch.Tensor,
        pad_token_id: int | None = None,
        end_ids: Sequence[int] | None = None,
    ) -> torch.Tensor | None:
        """The attention mask of tokens `[..., length]` that come without one; None without padding.

        As in transformers' `generate`, padding tokens are padding, unless they end texts too and so
        may be part of one. Tokens that are not given are the backbone's.
        """
        sources = (self.config, self.generation_config)
        pads = [pad_token_id, *(s.pad_token_id for s in sources if s is not None)]
        pad = next((token for token in pads if token is not None), None)
        if end_ids is None:
            end_ids = several(self.config.eos_token_id) or [self.config.eos_token_id]
        if pad is None or pad in end_ids:
            return None
        real = input_ids != pad
        return None if bool(real.all()) else real.long()

    def unpadded(self, rows: Sequence[torch.Tensor], **tokens: Any) -> list[torch.Tensor]:
        """Rows of token ids `[length]` without their padding, as `real_tokens` finds it."""
        masks = [self.real_tokens(row, **tokens) for row in rows]
        return [row if m is None else row[m.bool()] for row, m in zip(rows, masks, strict=True)]

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
        most, length = self.max_positions, input_ids.shape[1]
        if attention_mask is None:
            check_size(most, length, f"`input_ids` of {length} tokens")
        if attention_mask is None or position_ids is not None:
            return self.family.states(self.backbone, input_ids, attention_mask, position_ids)
        order = attention_mask.bool().logical_not().long().argsort(dim=1, stable=True)
        place = order.argsort(dim=1)
        if most is not None and length > most:
            size = int(attention_mask.sum(1).max())
            check_size(most, size, f"The {size} tokens of a row")
            order, place = order[:, :most], place.clamp(max=most - 1)  # the rest is padding
        packed = input_ids.gather(1, order), attention_mask.gather(1, order)
        return self.family.states(self.backbone, *packed).gathered(place)

    def window_distribution(
        self,
        states: BackboneStates,
        input_ids: torch.Tensor,
        window_start: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
        temperature: float | None = None,
        head: HeadName | CallHead = None,
        predicted: torch.Tensor | None = None,
    ) -> CoupledCategorical:
        """The coupled distribution over `N` windows of a batch; factorized without a head.

        Args:
            states: the backbone's pass over `input_ids`; its logits are read where it predicts.
            input_ids: `[batch, length]`.
            window_start: `[N]`, first position of each window; positions outside the sequence are
                absent.
            attention_mask: `[batch, length]`; padding is absent.
            rows: `[N]`, the row each window lies on; default, one window per row.
            temperature: the evidence temperature; default, the head's.
            head: as `head_of_call` takes it, or its result.
            predicted: `[batch, length]` bool, the tokens that are not observed; default, as
                the method `predicted` finds them.
        """
        call = head if isinstance(head, CallHead) else self.head_of_call(head)
        circuit, where = call.module, (input_ids, window_start, attention_mask, rows)
        predicted = self.predicted(input_ids) if predicted is None else predicted
        index, present = _span(*where, 0, call.window_length)
        tokens, observed = input_ids[index], ~predicted[index]
        at = (present & ~observed).nonzero(as_tuple=True)
        row, column = index[0].expand_as(index[1])[at], index[1][at]
        found = states.logits((row, column))
        defined = found.detach().amax(-1).isfinite()
        if not bool(defined.all()):
            raise RowError(
                "The backbone's logits are NaN or infinite in row {row}: look for the cause in its "
                "weights and its dtype.",
                int(row[~defined][0]),
            )
        if circuit is None:
            never = self.config.mask_token_id, self.config.forbidden_token_ids
            found = without_tokens(found, *never)
        logits = found.new_zeros(*tokens.shape, found.shape[-1]).index_put_(at, found)
        if circuit is None:
            return without_circuit(logits, tokens, observed, present, temperature or 1.0)
        own, preceding = circuit.config.evidence_temperature, None
        if "copy" in (circuit.config.conditioning or ()):
            known = self.preceding(states, *where, head=circuit, predicted=predicted)
            preceding = known.packed()
        return circuit(
            logits,
            tokens=tokens,
            observed=observed,
            last_hidden_state=states.last_hidden_state[index],
            present=None if bool(present.all()) else present,
            temperature=own if temperature is None else temperature,
            preceding=preceding,
            top_k=circuit.evidence_size,
        )

    def preceding(
        self,
        states: BackboneStates,
        input_ids: torch.Tensor,
        window_start: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
        head: Any = None,
        predicted: torch.Tensor | None = None,
    ) -> Preceding:
        """The last `copy_length` tokens before each window; predicted ones count as absent."""
        head = self.coupling_head if head is None else head
        length = head.config.copy_length
        index, present = _span(input_ids, window_start, attention_mask, rows, -length, 0)
        tokens = input_ids[index]
        predicted = self.predicted(input_ids) if predicted is None else predicted
        present = present & ~predicted[index]
        return Preceding(tokens, present, states.last_hidden_state[index])

    def _loss(
        self,
        states: BackboneStates,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        labels: torch.Tensor,
        head: CallHead,
    ) -> torch.Tensor:
        """The mean negative log-likelihood of labelled masked tokens, jointly over windows.

        The first window of a row begins at its first label.
        """
        is_label, length = labels != -100, head.window_length
        supervised = is_label & self.predicted(input_ids)
        if attention_mask is not None:
            supervised &= attention_mask.bool()
        if not bool(supervised.any()):
            if bool(is_label.any()):
                raise ValueError(
                    f"`labels` supervise tokens, but `input_ids` hold the mask token "
                    f"({self.config.mask_token_id}) at none of them but padding: mask some, as "
                    "`DataCollatorForMaskedDiffusion` does, or give -100 as all `labels`."
                )
            return 0.0 * states.last_hidden_state.sum()
        config = self.config if head.module is None else head.module.config
        ids = self.config.mask_token_id, *(config.forbidden_token_ids or [])
        never = torch.tensor([token for token in ids if token is not None], dtype=torch.long)
        wrong = (supervised & torch.isin(labels, never.to(labels.device))).nonzero()
        if len(wrong):
            row, column = wrong[0].tolist()
            raise ValueError(
                "`labels` must be -100 or tokens that the model may generate, got "
                f"{int(labels[row, column])} in row {row}."
            )
        rows, columns = supervised.nonzero(as_tuple=True)
        first = is_label.long().argmax(1)
        number = (columns - first[rows]).div(length, rounding_mode="floor")
        on, number = torch.stack((rows, number)).unique(dim=1)
        starts = first[on] + number * length
        distribution = self.window_distribution(
            states, input_ids, starts, attention_mask, rows=on, head=head
        )
        padded = F.pad(labels, (0, length), value=-100)
        index, _ = _span(padded, starts, None, on, 0, length)
        counted = (padded[index] != -100) & distribution.masked
        log_prob = distribution.partial_log_prob(padded[index].clamp(min=0), counted)
        return -log_prob.sum() / counted.sum().clamp(min=1)

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> dict:
        """The arguments of `forward`, as they are; PEFT asks every language model for this."""
        return {"input_ids": input_ids, **kwargs}


class Stretch(NamedTuple):
    """What is decoded together, `[n]` each: all tokens before `begin` are known then.

    Attributes:
        window: where the head's window over it begins.
        begin: its first position.
        stop: the position behind its last one.
        end: the position from which on a block-causal backbone, and the window, see nothing.
    """

    window: torch.Tensor
    begin: torch.Tensor
    stop: torch.Tensor
    end: torch.Tensor


def stretch_at(
    place: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
    length: int,
    config: PretrainedConfig,
) -> Stretch:
    """The stretch that holds a `place` of each of some texts, generated from `start` to `end`.

    It is a window of `length` tokens; of a block-causal backbone (`config`) what of a block of its
    attention is in one, and with shifted logits a block's first token is a stretch by itself. Where
    canvases have one length, windows lie side by side over each, which is seen as a whole.
    """
    block, canvas = block_length_of(config), getattr(config, "canvas_length", None)
    if canvas is not None:
        window = place - (place - start) % canvas % length
        end = place - (place - start) % canvas + canvas
        return Stretch(window, window, torch.minimum(window + length, end), end)
    if block is None:
        window = place - (place - start) % length
        return Stretch(window, window, torch.minimum(window + length, end), end)
    origin = start - start % block if length % block == 0 else start
    window = torch.maximum(place - (place - origin) % length, start)
    begin = place - place % block
    behind = begin + block
    if shifts_logits(config):
        is_first = (place == begin) & (place > 0)
        behind = torch.where(is_first, place + 1, behind)
        begin = begin + (~is_first & (begin > 0)).long()
    behind = torch.minimum(behind, end)
    stop = torch.minimum(behind, window + length)
    return Stretch(window, torch.maximum(begin, window), stop, behind)


def windows_over(
    chosen: torch.Tensor, origin: torch.Tensor, first: torch.Tensor, length: int
) -> torch.Tensor:
    """Places windows: `[n, T]` bool, where those begin that hold a chosen position of `[n, T]`.

    The windows of a row lie on a grid of `length` positions, from its `origin` `[n]` on; the first
    one begins at its `first` `[n]`.
    """
    rows, columns = chosen.nonzero(as_tuple=True)
    starts = torch.zeros_like(chosen)
    line = columns - (columns - origin[rows]) % length
    starts[rows, torch.maximum(line, first[rows])] = True
    return starts


def positions_of(starts: torch.Tensor, length: int) -> torch.Tensor:
    """`[n, T]` bool: the positions in the windows that begin at `starts` `[n, T]`."""
    begun = starts.long().cumsum(-1)
    return begun > F.pad(begun, (length, 0))[:, : begun.shape[1]]


def _span(
    input_ids: torch.Tensor,
    start: torch.Tensor,
    attention_mask: torch.Tensor | None,
    rows: torch.Tensor | None,
    first: int,
    end: int,
) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The places `[N, end - first]` from `start + first` on, and which of them hold tokens."""
    rows = torch.arange(len(input_ids), device=input_ids.device) if rows is None else rows
    positions = start[:, None] + torch.arange(first, end, device=start.device)
    index = rows[:, None], positions.clamp(0, input_ids.shape[1] - 1)
    present = (positions >= 0) & (positions < input_ids.shape[1])
    return index, present if attention_mask is None else present & attention_mask[index].bool()


def check_size(most: int | None, size: int, what: str) -> None:
    """Raises a ValueError if `size` tokens are more than `most`; `what` says what they are."""
    if most is not None and size > most:
        raise ValueError(
            f"{what} exceed the {most} positions of the backbone: shorten one of them."
        )
