"""The CoDD head: a circuit over a window of tokens, alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init

from .checks.arguments import as_tensor, check_tokens
from .circuits import (
    ONE_PRODUCT,
    ContextMaps,
    CoupledCategorical,
    DenseEmission,
    DenseEvidence,
    Emission,
    ListedEvidence,
    Potentials,
    Preceding,
    StepTransitions,
    TiedEmission,
    fit_tied,
    forbidden_tokens,
    token_marginal,
)
from .configuration_codd import CoDDHeadConfig
from .hub.publishing import Publishing
from .hub.repositories import Repository, checked_name, explain_load_errors, locate
from .hub.stored_weights import load_stored

DEFAULT_EVIDENCE_SIZE = 64
"""Tokens kept of a prediction over a large vocabulary."""


@dataclass(frozen=True)
class FrozenHead:
    """A [`CoDDHead`] as it was when it was frozen, called as that is, with its circuit kept."""

    head: CoDDHead
    potentials: Potentials
    forbidden: torch.Tensor | None

    def __call__(self, *args: Any, **kwargs: Any) -> CoupledCategorical:
        """The coupled distribution over a window; the arguments are those of the head."""
        return self.head(*args, **kwargs, frozen=self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.head, name)


class CoDDHead(Publishing, PreTrainedModel):  # type: ignore[misc]
    """A circuit over a window of tokens: the small artifact that people train and share.

    Parameters are log-potentials in float32, whatever the backbone's dtype: `initial [H]`,
    `transition [H, H]` (or `[L-1, H, H]`), `emission [H, V]` (or `[L, H, V]`); tied emissions are
    `emission_latents [H, r]`, `emission_projection [r, d]` and `emission_bias [V]`, and the head
    works only when it is bound to the backbone's output embedding (a [`CoDDModel`] does it). The
    buffer `token_marginal [V]` (or `[L, V]`) is the unigram distribution that `config.alpha` refers
    to. A new head changes nothing: its potentials are constant.
    """

    config_class = CoDDHeadConfig
    base_model_prefix = "codd_head"
    _keys_to_ignore_on_load_unexpected = [r"^backbone\."]  # noqa: RUF012  (of a whole model)
    main_input_name = "logits"
    # It has no attention: whatever is asked of a model that it is part of concerns the backbone.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = [  # noqa: RUF012
        "initial",
        "transition",
        "emission",
        "token_marginal",
        "context_maps",
    ]

    config: CoDDHeadConfig
    token_marginal: torch.Tensor
    context_maps: ContextMaps | None

    def __init__(self, config: CoDDHeadConfig) -> None:
        super().__init__(config)
        latents, length = config.num_latents, config.window_length
        vocab, context_size = config.vocab_size, config.context_size or 0
        steps = () if config.tie_transitions else (max(length - 1, 1),)
        positions = () if config.tie_emissions else (length,)
        self.initial = nn.Parameter(torch.empty(latents))
        self.transition = nn.Parameter(torch.empty(*steps, latents, latents))
        self.is_tied = config.emission == "tied"
        if self.is_tied:
            self.emission_latents = nn.Parameter(torch.empty(latents, config.emission_rank))
            self.emission_projection = nn.Parameter(torch.empty(config.emission_rank, context_size))
            self.emission_bias = nn.Parameter(torch.empty(vocab))
        else:
            self.emission = nn.Parameter(torch.empty(*positions, latents, vocab))
        is_one = self.is_tied or (config.tie_transitions and config.tie_emissions)
        self.register_buffer("token_marginal", torch.empty(*(() if is_one else (length,)), vocab))
        self.context_maps = None
        if config.conditioning:
            kinds, sizes = list(config.conditioning), (context_size, latents, vocab)
            self.context_maps = ContextMaps(kinds, *sizes, config.copy_size)
        # A default dtype of 16 bits (`_from_config(dtype=...)` sets one) is about the backbone too.
        nn.Module.to(self, torch.promote_types(torch.get_default_dtype(), torch.float32))
        self._bound: list[torch.Tensor] = []  # a list, so that the backbone's weight is not ours
        self.post_init()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any
    ) -> Any:
        """Loads a head, from its own folder or Hub id or out of a CoDD model's or pipeline's.

        Of a model, the head's tensors alone are read. The arguments are those of transformers.

        Raises:
            ValueError: there is no head, or its weights are not those that it describes.
            OSError: nothing is found, or the weights are damaged.
        """
        name = checked_name(pretrained_model_name_or_path, "pretrained_model_name_or_path")
        config = kwargs.get("config")
        repository = locate(name, kwargs) if config is None else Repository(name, kwargs)
        with explain_load_errors(repository):
            found = repository.config if config is None else {}
            if found.get("model_type") == "codd" and found.get("head_config") is not None:
                config = CoDDHeadConfig.from_dict(dict(found["head_config"]))
                kwargs |= {"config": config, "key_mapping": {r"^coupling_head\.": ""}}
            elif found.get("model_type") == CoDDHeadConfig.model_type:
                config = CoDDHeadConfig.from_dict(dict(found))
            elif config is None:
                raise ValueError(
                    f"{name!r} holds a model of type {found.get('model_type')!r} without a CoDD "
                    "head: give the folder or id of a head, or of a CoDD model that has one."
                )
            # Parts that the user adds to a stored head are new.
            may_lack = any(field in kwargs for field in CoDDHeadConfig.__annotations__)
            load: Callable = super().from_pretrained
            head = load_stored(repository, load, config, cls, may_lack=may_lack, **kwargs)
        head.check_states()
        return head

    def check_states(self) -> None:
        """Raises a ValueError where weights of `"copy"` name states that the circuit has not."""
        suggested = getattr(self.context_maps, "suggested", torch.zeros(0))
        if not suggested.is_meta:
            size = self.config.num_latents
            check_tokens("context_maps.suggested", suggested, size, "numbers of states")

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # `model.to(torch.bfloat16)` is about the backbone: the circuit needs its float32.
        def keeping_precision(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            lost = moved.is_floating_point() and moved.dtype.itemsize < 4
            return tensor.to(moved.device) if lost else moved

        return super()._apply(keeping_precision, recurse)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_bound": []}  # the backbone's weight is not copied with the head

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        maps = self.context_maps
        if maps is not None and module in (maps, *maps.children()):
            # For its parts too: transformers passes over modules without parameters of their own.
            maps.reset_parameters()
        if module is not self:
            return
        init.constant_(self.initial, -math.log(self.config.num_latents))
        init.constant_(self.transition, -math.log(self.config.num_latents))
        if self.is_tied:
            init.zeros_(self.emission_latents)  # the projection alone keeps gradients alive
            std = self.emission_projection.shape[1] ** -0.5
            init.normal_(self.emission_projection, std=std)
            init.zeros_(self.emission_bias)
        else:
            init.zeros_(self.emission)
        init.constant_(self.token_marginal, 1 / self.token_marginal.shape[-1])

    def bind(self, output_embedding: torch.Tensor) -> None:
        """Tells tied emissions the backbone's output embedding, `[V, d]`; it is not stored."""
        self._bound = [output_embedding]

    @property
    def output_embedding(self) -> torch.Tensor:
        """The backbone's, `[V, d]`, which tied emissions are bound to."""
        if not self._bound:
            raise ValueError(
                "The head's emissions are tied to a backbone's output embedding: join them with "
                "`CoDDModel.from_backbone(backbone, head)`, or call `head.bind(embedding)`."
            )
        return self._bound[0]

    @property
    def potentials(self) -> Potentials:
        """The circuit, made anew; gradients flow to the parameters."""
        emission: Emission
        if self.is_tied:
            projection = self.emission_projection
            with torch.autocast(projection.device.type, enabled=False):
                embedding = self.output_embedding.to(projection.dtype) @ projection.T
            emission = TiedEmission(self.emission_latents, embedding, self.emission_bias)
        else:
            emission = DenseEmission(_by_position(self.emission))
        steps = StepTransitions(_by_position(self.transition))
        return Potentials(self.initial, steps, emission, self.log_spread)

    @torch.no_grad()
    def frozen(self) -> FrozenHead:
        """The head as it is now, without gradients: what inference derives is derived once.

        A loop over steps asks once, before the first, and calls the result in place of the head.
        """
        with align_module_device(self):  # its weights may be offloaded
            return FrozenHead(self, self.potentials, self.forbidden)

    @torch.no_grad()
    def set_potentials(
        self, potentials: Potentials, marginal: torch.Tensor | None = None, alpha: float = 1.0
    ) -> None:
        """Takes over a fitted circuit; tied emissions its least-squares fit in the logarithms.

        Args:
            potentials: a normalised circuit, before any correction.
            marginal: its token marginal `u`, `[V]` or `[L, V]`; computed from it if not given.
            alpha: the emissions are divided by `u ** alpha`.
        """
        embedding = self.output_embedding if self.is_tied else None
        if marginal is None:
            marginal = token_marginal(potentials, self.config.window_length)
        if marginal.ndim > self.token_marginal.ndim:
            marginal = marginal.mean(0)
        self.token_marginal.copy_(marginal)
        initial, transition, emission = potentials.tensors()
        self.initial.copy_(initial)
        _by_position(self.transition).copy_(transition)
        if embedding is None:
            _by_position(self.emission).copy_(emission)
        else:
            tied = self.emission_latents, self.emission_projection, self.emission_bias
            fitted = fit_tied(emission[0], embedding, marginal, self.config.emission_rank)
            for parameter, values in zip(tied, fitted, strict=True):
                parameter.copy_(values)
        self.config.alpha = 0.0
        self.set_alpha(alpha)

    @torch.no_grad()
    def set_alpha(self, alpha: float) -> None:
        """Changes the power of the marginal correction (0 gives the raw product back)."""
        shift = (self.config.alpha - alpha) * self.token_marginal.log()
        shift = shift.reshape(-1, 1, shift.shape[-1])
        if self.is_tied:
            self.emission_bias.add_(shift[0, 0])
        else:
            emission = _by_position(self.emission)
            emission.add_(shift[: len(emission)])
        self.config.alpha = alpha

    @torch.no_grad()
    def temper(self, emission_power: float, transition_power: float) -> None:
        """Flattens emissions and (normalised) transitions to powers below 1.

        The backbone has already seen the observed tokens, whose dependencies a static circuit
        counts again; flattening gives some of that back at low mask ratios.
        """
        tied = (self.emission_latents, self.emission_bias) if self.is_tied else (self.emission,)
        for parameter in tied:
            parameter.mul_(emission_power)
        for parameter in (self.initial, self.transition):
            parameter.copy_((parameter * transition_power).log_softmax(-1))

    @property
    def forbidden(self) -> torch.Tensor | None:
        """`[V]` bool, the tokens that are never generated; None if there are none."""
        ids = self.config.mask_token_id, self.config.forbidden_token_ids
        marginal = self.token_marginal
        return forbidden_tokens(marginal.shape[-1], *ids, marginal.device)

    @property
    def evidence_size(self) -> int:
        """How many of a prediction's likeliest tokens a model's decoding keeps; 0: all, exactly.

        By default all, where one product of the vocabulary with the states is cheap. Always all
        where positions have emissions of their own, to which no tokens are alike.
        """
        size, vocab = self.config.evidence_size, self.token_marginal.shape[-1]
        if size is None:
            is_cheap = self.config.num_latents * vocab <= ONE_PRODUCT
            size = 0 if is_cheap else DEFAULT_EVIDENCE_SIZE
        return min(size, vocab) if self.config.tie_emissions else 0

    @property
    def log_spread(self) -> torch.Tensor:
        """`[V]`, log of the distribution of the mass of tokens that are not listed.

        It is the token marginal, that of a mean position, without the forbidden tokens.
        """
        marginal = self.token_marginal.view(-1, self.token_marginal.shape[-1]).mean(0).log()
        return DenseEvidence.from_logits(marginal, forbidden=self.forbidden).log_probs

    def forward(
        self,
        logits: torch.Tensor | DenseEvidence | ListedEvidence,
        tokens: torch.Tensor | None = None,
        observed: torch.Tensor | None = None,
        last_hidden_state: torch.Tensor | None = None,
        present: torch.Tensor | None = None,
        temperature: float | None = None,
        active: torch.Tensor | None = None,
        preceding: Preceding | None = None,
        top_k: int = 0,
        frozen: FrozenHead | None = None,
    ) -> CoupledCategorical:
        """The [`CoupledCategorical`] over a window, whose arguments these are but for three.

        A head with conditioning needs `last_hidden_state` `[batch, L, hidden]`, the states that
        predict the window's tokens, and with `"copy"` the tokens `preceding` it. `frozen` is of
        this head, used in place of what would be derived from its weights. The default
        `temperature` is that of the evidence, or the head's.
        """
        if temperature is None:
            temperature = getattr(logits, "temperature", self.config.evidence_temperature)
        circuit = self if frozen is None else frozen
        distribution = CoupledCategorical(
            logits,
            circuit.potentials,
            tokens=tokens,
            observed=observed,
            present=present,
            active=active,
            temperature=temperature,
            forbidden=circuit.forbidden,
            top_k=top_k,
        )
        if self.context_maps is None:
            return distribution
        if last_hidden_state is None or (preceding is None and self.context_maps.copies):
            raise ValueError(
                "`last_hidden_state` and, to copy, `preceding` must be given to a head with "
                f"conditioning ({', '.join(self.config.conditioning or ())})."
            )
        present = distribution.present
        shape = (*present.shape, self.config.context_size)
        hidden = as_tensor("last_hidden_state", last_hidden_state, float, shape, present.device)
        with torch.autocast(present.device.type, enabled=False):
            log_marginal = self.token_marginal.view(-1, self.token_marginal.shape[-1])[0].log()
            parts = preceding, log_marginal, self.config.alpha
            distribution.context = self.context_maps(hidden, *parts)
        return distribution


def _by_position(parameter: torch.Tensor) -> torch.Tensor:
    """`[1 or L, n, m]` of a parameter with or without an axis for positions."""
    return parameter.view(-1, *parameter.shape[-2:])


AutoModel.register(CoDDHeadConfig, CoDDHead, exist_ok=True)
