"""The choices of one call of the denoising loop: checked once, and passed on with it."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from transformers import LogitsProcessor, LogitsProcessorList

from ..backbones import block_length_of, noise_of
from ..checks.arguments import (
    check_callable,
    choice,
    flag,
    generators,
    integer,
    number,
    several,
    shown,
    token_id,
)
from ..circuits import Generators
from ..coupling.heads import HeadName
from ..coupling.windows import CoupledBackbone
from ..schedulers.scheduling_codd import MOST_STEPS, CoDDScheduler

ForcedTokens = Mapping[int, int] | Sequence[Mapping[int, int]]
"""Tokens by their place among the generated ones, for all rows or for each."""

PerRow = int | Sequence[int]
"""A number for all rows, or one for each."""

PARADIGMS = ("block", "full")
CACHES = (None, False, "prefix", "dual")
DEFAULT_LENGTH = 128
DEFAULT_BLOCK_LENGTH = 32


class DecodingCall:
    """The choices of a call on `batch` rows, by the names of the arguments.

    `gen_length`, `num_inference_steps`, `min_new_tokens` and `forced_tokens` hold for all rows, or
    are lists with an entry for each; as attributes they are lists.

    Args:
        model: the backbone, with or without a head.
        scheduler: its settings count where the call has none. The attribute is a copy with those of
            the call.
        batch: the number of rows.
        gen_length: number of tokens to generate; without effect on `infill`.
        block_length: tokens in a block (fewer in the last one); default 32, or the blocks of a
            block-causal backbone. Those are counted from the beginning of the row, as its attention
            counts them, and `block_length` divides its own.
        num_inference_steps: the most passes of the backbone for the whole generation, shared evenly
            by a row's blocks that hold masks, the remainder by the first ones, and no more than a
            block has masks; default one for four tokens, or for each with the strategies
            `threshold` and `joint`. Steps that a block does not need are not run. A row that begins
            within a block of a block-causal backbone may take one more, and next-token predictors
            (Fast-dLLM v2) one more a block, for its first token.
        paradigm: `block`, or `full` for no block order.
        infill: whether rows are templates, in which every mask token is a position to fill. No
            end-of-text or padding token is drawn there.
        generator: one for all rows, or a list with one per row: a row's tokens then do not depend
            on the rest of the batch.
        eos_token_id: tokens that end a text. Nothing is decoded behind one: once all before it is
            decided, the rest becomes padding, and the row costs no more passes.
        pad_token_id: the token behind it; default the model's, or else the first that ends a text.
        min_new_tokens: how many generated tokens come before the first end-of-text token. The
            backbone's prediction rules it out before the circuit sees it.
        forced_tokens: tokens by their place among the generated ones (from 0). They stand on the
            canvas from the start.
        logits_processor: transformers' processors of the scores that candidates are drawn from;
            `CoDDScheduler.step` says what they see.
        editing_threshold: replaces committed tokens of a block by those that the backbone holds for
            likelier than this, until nothing changes (LLaDA2.1); 1, the default of other models:
            what is committed stays.
            `num_inference_steps` does not count the passes over full blocks, at most 16 for each.
        cache: None: of a block-causal decoder the keys and values of complete blocks are kept,
            which is exact and takes work in proportion to the text; False: nothing is kept.
            `"prefix"` or `"dual"`: after the first step of a block (or of the whole, in the full
            paradigm) the backbone computes only the block and what follows it, or only the block,
            and reuses the keys and values of the rest: an approximation, for decoders that
            transformers runs.
        head: the name of the head that couples this call; None, the default one; False, none.
        **settings: the scheduler's settings for this call (`strategy`, `sampling`, ...).

    Raises:
        ValueError: a number is out of range, a list has not one entry for each row, a token or a
            place does not exist, or arguments or the backbone's attention do not go together.
        TypeError: an argument is of another kind, or unknown.
    """

    def __init__(
        self,
        model: CoupledBackbone,
        scheduler: CoDDScheduler,
        batch: int,
        *,
        gen_length: PerRow | None = None,
        block_length: int | None = None,
        num_inference_steps: PerRow | None = None,
        paradigm: str = "block",
        infill: bool = False,
        generator: Generators = None,
        eos_token_id: Sequence[int] = (),
        pad_token_id: int | None = None,
        min_new_tokens: PerRow | None = None,
        forced_tokens: ForcedTokens | None = None,
        logits_processor: LogitsProcessor | LogitsProcessorList | None = None,
        editing_threshold: float | None = None,
        cache: str | bool | None = None,
        head: HeadName = None,
        **settings: Any,
    ) -> None:
        config, vocab_size = model.config, model.config.vocab_size
        self.is_uniform, mask = noise_of(config.text_config) == "uniform", None
        if not self.is_uniform:
            mask = token_id("mask_token_id", model.mask_token_id, vocab_size)
        self.mask_token_id = mask
        processor = "transformers' processors, or a function of ids and scores"
        check_callable("logits_processor", logits_processor, processor)
        generators("generator", generator, batch)
        choice("paradigm", paradigm, PARADIGMS)
        choice("cache", cache, CACHES)
        self.logits_processor, self.generator, self.cache = logits_processor, generator, cache

        def of_rows(name: str, value: Any, default: Any, check: Callable[[str, Any], Any]) -> list:
            entries = several(value)
            entries = [value] * batch if entries is None else entries
            if len(entries) != batch:
                raise ValueError(
                    f"`{name}` must have one entry per prompt ({batch}), got {len(entries)}."
                )
            return [default if entry is None else check(name, entry) for entry in entries]

        def forced(name: str, tokens: Any) -> dict[int, int]:
            if not isinstance(tokens, Mapping):
                raise TypeError(f"`{name}` must map places to token ids, got {shown(tokens)}.")
            of_place = {integer(name, k): token_id(name, v, vocab_size) for k, v in tokens.items()}
            if mask is not None and mask in of_place.values():
                raise ValueError(f"`{name}` must hold other tokens than the mask token ({mask}).")
            return of_place

        if editing_threshold is not None:
            editing_threshold = number("editing_threshold", editing_threshold, 0, 1)
        self.editing_threshold = None if editing_threshold == 1 else editing_threshold
        length = partial(integer, least=1, most=MOST_STEPS)
        self.gen_length = of_rows("gen_length", gen_length, DEFAULT_LENGTH, length)
        self.num_inference_steps = of_rows("num_inference_steps", num_inference_steps, None, length)
        self.min_new_tokens = of_rows("min_new_tokens", min_new_tokens, 0, integer)
        self.forced_tokens = of_rows("forced_tokens", forced_tokens, {}, forced)
        for row, most in enumerate(self.gen_length):
            integer("min_new_tokens", self.min_new_tokens[row], 0, most)
            for place in self.forced_tokens[row]:
                integer("forced_tokens", place, 0, most - 1)
        self.infill = flag("infill", infill)
        if self.infill and (any(self.min_new_tokens) or any(self.forced_tokens)):
            raise ValueError(
                "`min_new_tokens` and `forced_tokens` are for text after a prompt: leave them out "
                "with `infill`, and write what is given into the template."
            )

        for name, is_asked in (
            ("infill", self.infill),
            ("editing_threshold", editing_threshold is not None),
            ("cache", isinstance(cache, str)),
        ):
            if self.is_uniform and is_asked:
                raise ValueError(
                    f"`{name}` is about mask tokens, but the noise of this backbone is uniform: "
                    "leave it out."
                )

        # A block-causal backbone sees nothing beyond a block: positions must be filled in order.
        attended = block_length_of(config.text_config)
        default = attended or DEFAULT_BLOCK_LENGTH
        block_length = default if block_length is None else block_length
        block_length = integer("block_length", block_length, least=1)
        if attended is not None and (paradigm == "full" or attended % block_length):
            raise ValueError(
                f"`paradigm` must be 'block' and `block_length` must divide the {attended} tokens "
                f"of a block of the backbone's attention, which sees nothing beyond, got "
                f"{paradigm!r} and {block_length}: give {attended}."
            )
        self.block_length = None if paradigm == "full" else block_length
        if mask is not None and mask in eos_token_id:
            raise ValueError(
                f"`eos_token_id` must not hold the mask token ({mask}), which stands wherever "
                "nothing is decoded yet: give the tokens that end a text."
            )
        self.eos_token_id = list(eos_token_id)
        # As in transformers, an end token stands for padding where there is none.
        padding = (pad_token_id, config.pad_token_id, *eos_token_id[:1])
        self.behind = next((token for token in padding if token not in (None, mask)), mask or 0)
        self.head = model.head_of_call(head)
        self.scheduler = scheduler.for_call(mask, **settings)
        self.scheduler.settings.check_vocabulary(vocab_size)
        if self.scheduler.settings.sampling == "factorized":  # in which no circuit takes part
            self.head = self.head._replace(module=None)


CHOICES = tuple(
    name
    for name, parameter in inspect.signature(DecodingCall).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
)
"""The arguments of a call but for its draw settings."""
