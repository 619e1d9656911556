"""The CoDD head: a circuit over a window of tokens, alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init

from .checks.arguments import as_tensor, shown
from .circuits import (
    Context,
    ContextMaps,
    CoupledCategorical,
    DenseEmission,
    DenseEvidence,
    ListedEvidence,
    Potentials,
    Preceding,
    TiedEmission,
)
from .circuits.factorized import forbidden_tokens
from .circuits.fitted_circuit import FittedCircuit
from .circuits.potentials.tables import ONE_PRODUCT
from .configuration_codd import CoDDHeadConfig
from .hub.publishing import Publishing
from .hub.repositories import Repository, checked_name, explain_load_errors, locate
from .hub.stored_weights import StoredWeights

DEFAULT_EVIDENCE_SIZE = 64
"""Tokens kept of a prediction over a large vocabulary."""


@dataclass(frozen=True)
class FrozenHead:
    """A [`CoDDHead`] as it was when it was frozen; it is called as the head is.

    Attributes:
        head: the head.
        potentials: its circuit, which holds what is derived from it.
        forbidden: `[V]` bool, the tokens that are never generated, if any.
    """

    head: CoDDHead
    potentials: Potentials
    forbidden: torch.Tensor | None

    def __call__(self, *args: Any, **kwargs: Any) -> CoupledCategorical:
        """The coupled distribution over a window; the arguments are those of the head."""
        return self.head(*args, **kwargs, frozen=self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.head, name)


class CoDDHead(Publishing, FittedCircuit, PreTrainedModel):
    """A circuit over a window of tokens: the small artifact that people train and share.

    Parameters are log-potentials in float32, whatever the backbone's dtype: `initial [H]`,
    `transition [H, H]` (or `[L-1, H, H]`), `emission [H, V]` (or `[L, H, V]`). The buffer
    `token_marginal [V]` (or `[L, V]`) is the unigram distribution that `config.alpha` refers to.

    With `config.emission = "tied"` the emissions are `emission_latents [H, r]`,
    `emission_projection [r, d]` and `emission_bias [V]`, and the head works only when it is bound
    to the backbone's output embedding (`bind`; a [`CoDDModel`] does it). `context_maps` holds what
    `config.conditioning` asks for.

    A new head changes nothing: its potentials are constant, so the coupled distribution is the
    factorized one.
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

    def __init__(self, config: CoDDHeadConfig):
        super().__init__(config)
        latents, vocab, length = config.num_latents, config.vocab_size, config.window_length
        steps = () if config.tie_transitions else (max(length - 1, 1),)
        self.initial = nn.Parameter(torch.empty(latents))
        self.transition = nn.Parameter(torch.empty(*steps, latents, latents))
        if config.emission == "tied":
            self.emission_latents = nn.Parameter(torch.empty(latents, config.emission_rank))
            shape = (config.emission_rank, config.context_size)
            self.emission_projection = nn.Parameter(torch.empty(shape))
            self.emission_bias = nn.Parameter(torch.empty(vocab))
        else:
            positions = () if config.tie_emissions else (length,)
            self.emission = nn.Parameter(torch.empty(*positions, latents, vocab))
        tied = config.emission == "tied" or (config.tie_transitions and config.tie_emissions)
        self.register_buffer("token_marginal", torch.empty(*(() if tied else (length,)), vocab))
        self.context_maps = None
        if config.conditioning:
            sizes = config.context_size, latents, vocab, config.copy_size
            self.context_maps = ContextMaps(config.conditioning, config.noise_conditioning, *sizes)
        # A default dtype of 16 bits (`_from_config(dtype=...)` sets one) is about the backbone too.
        self.to(torch.promote_types(torch.get_default_dtype(), torch.float32))
        self._bound: list[torch.Tensor] = []  # a list, so that the backbone's weight is not ours
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> CoDDHead:
        """Loads a head, from its own folder or Hub id or out of a CoDD model's or pipeline's.

        Of a model, the head's tensors alone are read.

        Args:
            pretrained_model_name_or_path: a folder or Hub id.
            **kwargs: as in transformers.

        Raises:
            ValueError: there is no head, or its weights are not those that it describes.
            OSError: nothing is found, or the weights are damaged.
        """
        name = checked_name(pretrained_model_name_or_path, "pretrained_model_name_or_path")
        config, with_report = kwargs.get("config"), kwargs.pop("output_loading_info", False)
        repository = locate(name, kwargs) if config is None else Repository(name, kwargs)
        kwargs |= repository.hub
        with explain_load_errors(repository):
            repository.refuse_adapter(kwargs.get("adapter_kwargs"))
            if config is None:
                config, in_model = _stored_config(repository)
                kwargs |= in_model
            # Parts that the user adds to a stored head are new.
            may_lack = any(field in kwargs for field in CoDDHeadConfig.__annotations__)
            stored = StoredWeights.find(repository, kwargs)
            load = super().from_pretrained
            head, report = stored.load(load, config, cls, may_lack=may_lack, **kwargs)
        head._check_suggested(name)
        return (head, report) if with_report else head

    def _check_suggested(self, name: str) -> None:
        """Raises for states that the circuit has not, which would be read beyond its memory."""
        suggested = getattr(self.context_maps, "suggested", None)
        if suggested is None or suggested.device.type == "meta":
            return
        low, high = suggested.min().item(), suggested.max().item()
        if low < 0 or high >= self.config.num_latents:
            raise ValueError(
                f"The weights of the head in {name!r} are damaged: `context_maps.suggested` must "
                f"hold states from 0 to {self.config.num_latents - 1}, got {low} to {high}."
            )

    def _apply(self, fn, recurse: bool = True) -> CoDDHead:
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
        if self.config.emission == "tied":
            init.zeros_(self.emission_latents)  # the projection alone keeps gradients alive
            init.normal_(self.emission_projection, std=self.config.context_size**-0.5)
            init.zeros_(self.emission_bias)
        else:
            init.zeros_(self.emission)
        init.constant_(self.token_marginal, 1 / self.config.vocab_size)

    def bind(self, output_embedding: torch.Tensor) -> None:
        """Tells tied emissions the backbone's output embedding, `[V, d]`; it is not stored.

        Raises:
            ValueError: its shape does not fit the head's configuration.
        """
        expected = (self.config.vocab_size, self.config.context_size)
        if tuple(output_embedding.shape) != expected:
            raise ValueError(
                f"`output_embedding` must have shape {expected} (`vocab_size`, `context_size` of "
                f"the head), got {tuple(output_embedding.shape)}."
            )
        self._bound = [output_embedding]

    @property
    def potentials(self) -> Potentials:
        """The circuit, made anew; gradients flow to the parameters.

        Raises:
            ValueError: the emissions are tied and the head is not bound to a backbone.
        """
        config = self.config
        transition = self.transition[None] if config.tie_transitions else self.transition
        if config.emission == "tied":
            projection = self.emission_projection
            with torch.autocast(projection.device.type, enabled=False):
                embedding = self.output_embedding.to(projection.dtype) @ projection.T
            emission = TiedEmission(self.emission_latents, embedding, self.emission_bias)
        else:
            emission = DenseEmission(self.emission[None] if config.tie_emissions else self.emission)
        return Potentials(self.initial, transition, emission, self.log_spread)

    @torch.no_grad()
    def frozen(self) -> FrozenHead:
        """The head as it is now, for many calls: what inference derives is derived once.

        A loop over steps asks once, before the first, and calls the result in place of the head.
        It has no gradients, and another one is to be made when the weights have changed.

        Raises:
            ValueError: the emissions are tied and the head is not bound to a backbone.
        """
        with align_module_device(self):  # its weights may be offloaded
            return FrozenHead(self, self.potentials, self.forbidden)

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
    def forbidden(self) -> torch.Tensor | None:
        """`[V]` bool, the tokens that are never generated; None if there are none."""
        config = self.config
        ids = config.mask_token_id, config.forbidden_token_ids
        return forbidden_tokens(config.vocab_size, *ids, self.token_marginal.device)

    @property
    def evidence_size(self) -> int:
        """How many of a prediction's likeliest tokens a model's decoding keeps; 0: all, exactly.

        `config.evidence_size`, or, if that is not set, all where one product of the vocabulary
        with the states is cheap and `DEFAULT_EVIDENCE_SIZE` otherwise.
        """
        config = self.config
        if config.evidence_size is not None:
            return min(config.evidence_size, config.vocab_size)
        return 0 if config.num_latents * config.vocab_size <= ONE_PRODUCT else DEFAULT_EVIDENCE_SIZE

    @property
    def log_spread(self) -> torch.Tensor:
        """`[1 or L, V]`, log of the distribution of the mass of tokens that are not listed.

        It is the token marginal without the forbidden tokens.
        """
        log_marginal = self.token_marginal.log().reshape(-1, self.config.vocab_size)
        return DenseEvidence.from_logits(log_marginal, forbidden=self.forbidden).log_probs

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
        """The coupled distribution over a window.

        Args:
            logits: `[batch, L, vocab]`, the backbone's, used at masked positions; or
                [`ListedEvidence`] made of them (at `temperature`).
            tokens: `[batch, L]`, used where `observed`.
            observed: `[batch, L]` bool, True where the position is given by `tokens`.
            last_hidden_state: `[batch, L, hidden]`, the states that predict the window's tokens;
                needed by a head with conditioning, unused by others.
            present: `[batch, L]` bool, False where there is no such position.
            temperature: the evidence temperature; default, that of the evidence or the head's.
            active: `[batch]` bool, False for rows that are to stay factorized.
            preceding: the tokens before the window, needed by `"copy"` conditioning.
            top_k: read `logits` by so many of their likeliest tokens; 0 reads all, exactly.
            frozen: of this head, used in place of what would be derived from its weights.

        Raises:
            ValueError: shapes do not fit, an observed token is outside the vocabulary, or hidden
                states are missing.
        """
        context = None
        if self.context_maps is not None:
            context = self._context(logits, observed, last_hidden_state, present, preceding)
        circuit, own = self if frozen is None else frozen, self.config.evidence_temperature
        return CoupledCategorical(
            logits,
            circuit.potentials,
            tokens=tokens,
            observed=observed,
            present=present,
            context=context,
            active=active,
            temperature=getattr(logits, "temperature", own) if temperature is None else temperature,
            forbidden=circuit.forbidden,
            top_k=top_k,
        )

    def _context(self, logits, observed, last_hidden_state, present, preceding) -> Context:
        if not isinstance(logits, torch.Tensor | DenseEvidence | ListedEvidence):
            raise TypeError(f"`logits` must be a tensor or evidence, got {shown(logits)}.")
        if not isinstance(preceding, Preceding | None):
            raise TypeError(f"`preceding` must be a Preceding, got {shown(preceding)}.")
        leading = logits.shape[:2] if isinstance(logits, torch.Tensor) else logits.batch_shape
        shape, device = (*leading, self.config.context_size), logits.device
        for name, value in (("last_hidden_state", last_hidden_state), ("preceding", preceding)):
            if value is None and (name != "preceding" or self.context_maps.copies):
                raise ValueError(
                    f"`{name}` must be given to a head with conditioning "
                    f"({', '.join(self.config.conditioning)})."
                )
        hidden = as_tensor("last_hidden_state", last_hidden_state, float, shape, device)
        masked = torch.ones(shape[:2], dtype=torch.bool, device=device)
        if observed is not None:
            masked = ~as_tensor("observed", observed, bool, shape[:2], device)
        if present is not None:
            present = as_tensor("present", present, bool, shape[:2], device)
            masked = masked & present
        with torch.autocast(device.type, enabled=False):
            log_marginal = self.token_marginal.log().reshape(-1, self.config.vocab_size)[0]
            return self.context_maps(
                hidden, masked, present, preceding, log_marginal, self.config.alpha
            )


def _stored_config(repository: Repository) -> tuple[CoDDHeadConfig, dict[str, Any]]:
    """The configuration of a head, and the arguments that load it alone out of a model."""
    found = repository.config
    if found.get("model_type") == CoDDHeadConfig.model_type:
        return CoDDHeadConfig.from_dict(dict(found)), {}
    if found.get("model_type") != "codd" or found.get("head_config") is None:
        raise ValueError(
            f"{repository.name!r} holds a model of type {found.get('model_type')!r} without a CoDD "
            "head: give the folder or id of a head, or of a CoDD model that has one."
        )
    config = CoDDHeadConfig.from_dict(dict(found["head_config"]))
    return config, {"config": config, "key_mapping": {r"^coupling_head\.": ""}}


AutoModel.register(CoDDHeadConfig, CoDDHead, exist_ok=True)
