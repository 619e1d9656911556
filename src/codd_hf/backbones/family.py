"""A family of diffusion language models: how its models are built, and how they are read.

A backbone is an ordinary `PreTrainedModel`. A family builds it so that every position sees the
whole sequence, and reads for position `i` the logits of token `i` and the hidden state that they
are made of. Families are stateless. Four fields of a configuration count for all of them:

- `block_length`: attention is block-causal, as SDAR's and LLaDA2's: token `i` belongs to block
  `i // block_length`, and a position sees its own block, both ways, and all earlier ones;
- `logit_shift`: the logits at a position predict the next one (Dream);
- `noise`: what it denoises, `"mask"` tokens or `"uniform"` ones; default, its family's;
- `decoding`: how a model decodes for those who say nothing else: as its published code does, in
  canvases no longer than those of its training.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ..checks.arguments import integer
from .canvas_cache import CanvasCache, cache_argument
from .layout import CheckpointLayout

Index = tuple[torch.Tensor, ...]


def block_length_of(config: PretrainedConfig) -> int | None:
    """The length of the blocks of a backbone's attention; None where it sees the whole row."""
    found = getattr(config, "block_length", None)
    return None if found is None else integer("block_length", found, least=1)


def shifts_logits(config: PretrainedConfig) -> bool:
    """Whether a backbone's logits at a position predict the next one."""
    return getattr(config, "logit_shift", False)


def noise_of(config: PretrainedConfig) -> str:
    """What a backbone denoises: `"mask"` tokens, or `"uniform"` ones, which can be any."""
    return getattr(config, "noise", None) or family_of(config).noise


def decoding_of(config: PretrainedConfig) -> dict[str, Any]:
    """The choices that a backbone's configuration makes, as `generate` names them.

    Blocks within those of the attention divide them, whatever the length of the latter.
    """
    said, attended = dict(getattr(config, "decoding", None) or {}), block_length_of(config)
    if attended is not None and "block_length" in said:
        said["block_length"] = math.gcd(said["block_length"], attended)
    known = ("strategy", "threshold", "editing_threshold", "block_length", "max_new_tokens")
    return {name: said[name] for name in known if name in said}


@dataclass
class BackboneStates:
    """One pass of a backbone over `[batch, length]` tokens.

    Attributes:
        last_hidden_state: `[batch, length, hidden]`; entry `i` is what predicts token `i`.
        read_logits: maps an index into the first two dimensions (None: everything) to logits, so
            that the output projection runs only where logits are needed.
    """

    last_hidden_state: torch.Tensor
    read_logits: Callable[[Index | None], torch.Tensor]

    def logits(self, index: Index | None = None) -> torch.Tensor:
        """Logits `[..., vocab]` at `index` (as in `x[index]`); by default of all positions."""
        return self.read_logits(index)

    def shifted(self, attention_mask: torch.Tensor | None = None) -> BackboneStates:
        """The states of a next-token predictor: entry `i - 1` becomes entry `i`.

        A row's first real position, which no other predicts, keeps its own, as in Dream's code.
        """
        batch, length = self.last_hidden_state.shape[:2]
        position = torch.arange(length, device=self.last_hidden_state.device).expand(batch, -1)
        source = (position - 1).clamp(min=0)
        if attention_mask is not None:
            source = torch.where(attention_mask.gather(1, source).bool(), source, position)
        return self.gathered(source)

    def gathered(self, columns: torch.Tensor) -> BackboneStates:
        """The states whose entry `i` of a row is now at `columns` `[batch, n]` of that row."""
        row = torch.arange(len(columns), device=columns.device)[:, None].expand_as(columns)

        def read_logits(index: Index | None) -> torch.Tensor:
            return self.logits((row, columns) if index is None else (row[index], columns[index]))

        return BackboneStates(self.last_hidden_state[row, columns], read_logits)


class BackboneFamily:
    """Builds and reads models by the conventions of transformers alone.

    Attributes:
        auto_class: transformers' class that builds and loads the models.
        model_types: those of transformers that belong to the family.
        bidirectional: fields of a configuration by which a model sees the whole sequence.
        unused_weights: a pattern of the names of stored weights that denoising does not need.
        noise: as `noise_of` has it.
    """

    auto_class: Any = AutoModelForCausalLM
    model_types: Container[str] = ()
    bidirectional: dict[str, Any] = {}  # noqa: RUF012
    unused_weights: str | None = None
    noise = "mask"

    def make_bidirectional(self, config: PretrainedConfig) -> None:
        """Changes a configuration, also that of a loaded model, to see the whole sequence."""
        for name, value in {"use_cache": False, **self.bidirectional}.items():
            setattr(config, name, value)

    def from_config(self, config: PretrainedConfig, **kwargs: Any) -> PreTrainedModel:
        """A randomly initialised backbone."""
        self.make_bidirectional(config)
        return self.auto_class.from_config(config, **kwargs)

    def check(self, model: PreTrainedModel) -> None:
        """Raises a ValueError for a model that the family cannot run."""

    def lora_targets(self, model: PreTrainedModel) -> str | list[str]:
        """The layers that a new LoRA is for: linear ones, but the projection to logits.

        Where experts are fused, those of the attention: PEFT takes the names of all others for
        those of experts and routers.
        """
        if all(weight.ndim < 3 for weight in model.parameters()):
            return "all-linear"
        linear = [key for key, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
        return [key for key in linear if ".self_attn." in key]

    def max_positions(self, model: PreTrainedModel) -> int | None:
        """How many tokens a row may have; None where nothing bounds it."""
        return getattr(model.config, "max_position_embeddings", None)

    def why_no_cache(self, model: PreTrainedModel) -> str | None:
        """The sentence that says why no pass can be over parts of a canvas; None if they can."""
        return (
            "`cache` needs a decoder that transformers runs (as llama and qwen2), got the model "
            f"type {model.config.model_type!r}: leave `cache` out."
        )

    def run(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
    ) -> BackboneStates:
        """One forward pass; entry `i` of the result is what the model computes at position `i`.

        `attention_mask` is `[batch, length]`, 0 at padding, or `[batch, 1, length, length]`,
        additive. By default the whole model runs, and its `logits` and `hidden_states` are read.
        """
        positions = {} if position_ids is None else {"position_ids": position_ids}
        if positions and "position_ids" not in inspect.signature(model.forward).parameters:
            raise ValueError(f"{type(model).__name__} takes no `position_ids`: leave them out.")
        output = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            output_hidden_states=True,
            return_dict=True,
            **positions,
        )
        logits = output.logits
        return BackboneStates(
            output.hidden_states[-1], lambda index: logits if index is None else logits[index]
        )

    def states(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: CanvasCache | None = None,
    ) -> BackboneStates:
        """Runs `model` so that entry `i` of the result predicts token `i`.

        Args:
            model: the backbone.
            input_ids: `[batch, length]`.
            attention_mask: `[batch, length]`, 0 at padding.
            position_ids: `[batch, length]`; default, counted from the left end.
            cache: with a pass announced; the rest is as it was last computed.

        Raises:
            ValueError: the attention implementation cannot be block-causal.
        """
        visible, block_length = attention_mask, block_length_of(model.config)
        if block_length is not None:
            implementation = model.config._attn_implementation or "eager"
            if implementation.startswith(("flash", "flex", "paged")):
                raise ValueError(
                    "`attn_implementation` must be 'sdpa' or 'eager' for block-causal attention, "
                    f"got {implementation!r}."
                )
            window = getattr(model.config, "sliding_window", None)
            if window is not None and window < input_ids.shape[1]:
                raise ValueError(
                    f"`sliding_window` ({window}) cannot be had with block-causal attention over "
                    f"{input_ids.shape[1]} tokens: set it to None in the backbone's configuration, "
                    "or give shorter rows."
                )
            real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            columns = None if cache is None else cache.columns
            visible = block_causal_mask(real, block_length, model.dtype, columns)
        cached = {} if cache is None else {"cache": cache}
        states = self.run(model, input_ids, visible, position_ids, **cached)
        return states.shifted(attention_mask) if shifts_logits(model.config) else states


class DecoderFamily(BackboneFamily):
    """Decoders that see both ways: transformers heeds `is_causal = False`."""

    model_types: Container[str] = (
        "llama",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "glm4_moe",
        "mistral",
        "gemma3_text",
    )
    bidirectional = {"is_causal": False}  # noqa: RUF012

    def why_no_cache(self, model: PreTrainedModel) -> str | None:
        """Needs attention by a mask over the whole canvas."""
        implementation = model.config._attn_implementation or "eager"
        window = getattr(model.config, "sliding_window", None)
        if implementation in ("sdpa", "eager") and window is None:
            return None
        return (
            "`cache` needs `attn_implementation` 'sdpa' or 'eager' and no sliding window, got "
            f"{implementation!r} with `sliding_window={window}`: leave `cache` out."
        )

    def run(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: CanvasCache | None = None,
    ) -> BackboneStates:
        """Runs the decoder, and projects where logits are read."""
        decoder, project = model.get_decoder(), model.get_output_embeddings()
        cached: dict[str, Any] = {}
        if cache is not None:
            cached = {"use_cache": True, cache_argument(decoder): cache}
            position_ids = cache.columns
            input_ids = input_ids.gather(1, position_ids)
        hidden = decoder(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **cached
        ).last_hidden_state.to(input_ids.device)
        if cache is not None:
            hidden = cache.keep(hidden)

        def read_logits(index: Index | None) -> torch.Tensor:
            # With a device map over several devices, the last layer is not where the tokens are.
            return project(hidden if index is None else hidden[index]).to(input_ids.device)

        return BackboneStates(hidden, read_logits)


FAMILIES: list[BackboneFamily] = []
LAYOUTS: list[CheckpointLayout] = []
NOT_SUPPORTED = {
    "nemotron_labs_diffusion": (
        "whose attention depends on where decoding stands, causal over what is decoded and full in "
        "the current block, so that no mask of a pass over rows is its own: use its own code"
    ),
}
"""Diffusion LMs that are known and do not load, and what to do."""


def layout_of(config: dict[str, Any]) -> CheckpointLayout | None:
    """The foreign layout that the content of a `config.json` describes, if it is one."""
    return next((layout for layout in LAYOUTS if layout.reads(config)), None)


def family_of(config: PretrainedConfig) -> BackboneFamily:
    """The family that a backbone with this configuration belongs to, or a ValueError."""
    known = is_known(config)
    if config.model_type in NOT_SUPPORTED:
        raise unsupported(config.model_type)
    for family in reversed(FAMILIES):
        if known and config.model_type in family.model_types:
            return family
    kind = CONFIG_MAPPING[config.model_type] if known else type(config)
    if kind.__module__.startswith(("transformers.", "codd_hf.")):
        raise unsupported(config.model_type)
    return BackboneFamily()


def is_known(config: PretrainedConfig) -> bool:
    """Whether transformers can read such a configuration again, without code of a repository."""
    is_remote = type(config).__module__.startswith("transformers_modules.")
    return config.model_type in CONFIG_MAPPING and not is_remote


def unsupported(model_type: str) -> ValueError:
    """The error for a model type that no family knows."""
    if model_type in ("codd", "codd-head"):
        return ValueError(
            f"`backbone` must be a backbone, got a CoDD model or head ({model_type!r}): load it by "
            "`CoDDModel.from_pretrained`, or give a head as `head`."
        )
    if model_type in NOT_SUPPORTED:
        return ValueError(
            f"`text_config.model_type` is {model_type!r}, a diffusion language model that does not "
            f"load here, {NOT_SUPPORTED[model_type]}, or another backbone."
        )
    decoders = [n for f in FAMILIES if isinstance(f.model_types, tuple) for n in f.model_types]
    return ValueError(
        f"`text_config.model_type` is {model_type!r}, which no backbone family supports: "
        "use a masked language model, a decoder that transformers has (known are "
        f"{', '.join(decoders)}), a LLaDA, Dream or SDAR checkpoint, or an object whose class is "
        "not of transformers."
    )


def block_causal_mask(
    attention_mask: torch.Tensor,
    block_length: int,
    dtype: torch.dtype,
    columns: torch.Tensor | None = None,
) -> torch.Tensor:
    """An additive mask `[batch, 1, query, key]`, block-causal from each row's first real token on.

    Padding is seen by itself alone, so that no row of scores is empty. The queries are at `columns`
    `[batch, query]`, by default everywhere.
    """
    real, key = attention_mask.bool(), torch.arange(attention_mask.shape[1]).to(attention_mask)
    columns = key.expand_as(real) if columns is None else columns
    block = (real.long().cumsum(1) - 1).div(block_length, rounding_mode="floor")
    sees = block.gather(1, columns)[:, :, None] >= block[:, None, :]
    sees = sees & real[:, None, :] & real.gather(1, columns)[:, :, None]
    sees = sees | (columns[:, :, None] == key)
    hidden = torch.zeros(sees.shape, dtype=dtype, device=real.device)
    return hidden.masked_fill(~sees, torch.finfo(dtype).min)[:, None]


def execution_device(model: PreTrainedModel) -> torch.device:
    """The device that a backbone takes its tokens on, also while its weights are offloaded."""
    embedding = model.get_input_embeddings()
    if not hasattr(embedding, "_hf_hook"):
        return next(embedding.parameters()).device
    # Offloaded weights are on no device until a hook fetches them: where, the result shows.
    return embedding(torch.zeros(1, dtype=torch.long)).device
