"""A diffusion language model with a CoDD head."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import ModelOutput

from .backbones import decoding_of, family_of, is_known, load_backbone, noise_of
from .checks.arguments import choice, flag, generators
from .circuits import CoupledCategorical, Generators
from .configuration_codd import COUPLINGS, CoDDConfig, CoDDHeadConfig
from .coupling.adapters import (
    AdaptersMixin,
    active_adapter,
    load_adapter,
    save_adapter,
    unwrapped,
    without_adapters,
)
from .coupling.heads import DEFAULT_NAME, HeadName
from .coupling.inputs import checked_inputs, refuse_requests
from .coupling.loading import OWN_ARGUMENTS, adapter_beside, load_head, named_backbone
from .coupling.per_token import per_token_output
from .coupling.scoring import ScoreOutput, Texts, score
from .coupling.windows import CoupledBackbone
from .hub.publishing import Publishing, forget_paths
from .hub.repositories import (
    ADAPTER_FOLDER,
    Repository,
    checked_name,
    explain_load_errors,
    is_local,
    locate,
    shared_arguments,
)
from .hub.stored_weights import load_stored
from .modeling_head import CoDDHead


@dataclass
class CoDDOutput(ModelOutput):
    """Output of [`CoDDModel`].

    Attributes:
        loss: scalar, negative log-likelihood per supervised masked token, in nats; with `labels`.
        logits: `[batch, length, vocab]`; entry `i` predicts token `i`. With a coupling, the
            window's entries are log-probabilities of the coupled distribution.
        last_hidden_state: `[batch, length, hidden]`; entry `i` predicted token `i`.
        hidden_states: kept for transformers' conventions; None.
        distribution: the coupled distribution of the window; with `return_distribution`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    distribution: CoupledCategorical | None = None


class CoDDModel(CoupledBackbone, AdaptersMixin, Publishing, PreTrainedModel):  # type: ignore[misc]
    """A diffusion language model (`backbone`) with a circuit (`coupling_head`).

    `from_backbone` joins the two, `from_pretrained` loads a saved pair, `generate` decodes.
    """

    config_class = CoDDConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean, whatever else transformers' Trainer counts
    # Attention is the backbone's, which knows what it supports.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = ["coupling_head"]  # type: ignore[assignment]  # noqa: RUF012

    def __init__(
        self,
        config: CoDDConfig,
        backbone: PreTrainedModel | None = None,
        coupling_head: CoDDHead | None = None,
    ) -> None:
        super().__init__(config)
        if config.mask_token_id is not None and noise_of(config.text_config) == "uniform":
            raise ValueError(
                "`mask_token_id` must be None for a backbone whose noise is uniform, got "
                f"{config.mask_token_id}: leave it out, and fit the head to this backbone."
            )
        for part in (backbone, coupling_head):
            for module in () if part is None else part.modules():
                module._is_hf_initialized = True  # type: ignore[assignment]  # not drawn anew
        if backbone is None:
            backbone = family_of(config.text_config).from_config(config.text_config)
        if coupling_head is None and config.head_config is not None:
            coupling_head = CoDDHead(config.head_config)
        self.backbone, self.coupling_head = backbone, coupling_head
        self.other_heads: dict[str, CoDDHead] = {}  # which are no submodules
        self.post_init()
        # transformers collects the names that the parts ignore; a head ignores the backbone's.
        ignored = {*(self._keys_to_ignore_on_load_unexpected or ())}
        ignored -= {*CoDDHead._keys_to_ignore_on_load_unexpected}
        self._keys_to_ignore_on_load_unexpected = ignored

    @classmethod
    def from_backbone(
        cls,
        backbone: PreTrainedModel | str | Path,
        head: CoDDHead | CoDDHeadConfig | str | Path | None = None,
        adapter: str | Path | None = None,
        *,
        mask_token_id: int | None = None,
        forbidden_token_ids: list[int] | None = None,
        coupling: str = "none",
        block_length: int | None = None,
        logit_shift: bool | None = None,
        **kwargs: Any,
    ) -> CoDDModel:
        """Joins a backbone, a head and a LoRA.

        Args:
            backbone: a model, or its folder or Hub id. A decoder is switched to full attention.
            head: a head; the folder or Hub id of one, of a model that has one, or of a PyJuice
                circuit (`model.jpc`), which is converted; a configuration makes a new head; None
                leaves the predictions factorized.
            adapter: folder or Hub id of a LoRA for the backbone; default, the one beside the head
                (`adapter/`), if there is one.
            mask_token_id: defaults to the head's, then the backbone's.
            forbidden_token_ids: tokens that are never generated; defaults to the head's.
            coupling: the `logits` of a forward pass, as in [`CoDDConfig`].
            block_length: the backbone's attention is block-causal in blocks of so many tokens;
                default, as its configuration says (`block_length`), or else full attention.
            logit_shift: whether the backbone's logits at a position are of the next token; default,
                as its layout or configuration says (`logit_shift`), or else no.
            **kwargs: for [`~codd_hf.backbones.load_backbone`]. `token` and where to cache hold for
                head and adapter as well.

        Raises:
            ValueError: the parts do not fit, or the backbone's family is not known.
        """
        shared = shared_arguments(kwargs)
        if isinstance(backbone, str | Path):
            model = load_backbone(checked_name(backbone, "backbone"), **kwargs)
        elif refused := sorted(kwargs.keys() - shared.keys()):
            raise ValueError(
                f"`{'`, `'.join(refused)}` cannot be given with a loaded backbone: it is for "
                "loading one by path or id."
            )
        else:
            model = unwrapped(backbone)
        if not isinstance(getattr(model, "config", None), PreTrainedConfig):
            raise TypeError(
                "`backbone` must be a transformers model, or the folder or id of one, got "
                f"{type(model).__name__}."
            )
        for field, value in (("block_length", block_length), ("logit_shift", logit_shift)):
            if value is not None:
                setattr(model.config, field, value)
        family = family_of(model.config)
        family.make_bidirectional(model.config)
        family.check(model)
        adapter = adapter or adapter_beside(head, shared)
        circuit = None if head is None else load_head(head, model, mask_token_id, **shared)
        if adapter is not None:
            load_adapter(model, adapter, DEFAULT_NAME, **shared)
        config = CoDDConfig(
            text_config=model.config,
            head_config=None if circuit is None else circuit.config,
            mask_token_id=mask_token_id,
            forbidden_token_ids=forbidden_token_ids,
            coupling=coupling,
        )
        joined = _class_for(config, cls)(config, model, circuit)
        for name in ("eos_token_id", "pad_token_id"):  # the rest is about autoregressive decoding
            token = getattr(getattr(model, "generation_config", None), name, None)
            if token is not None:
                setattr(joined.generation_config, name, token)
        # transformers reads back what it does not know only if nobody else says it.
        said = decoding_of(model.config)
        vars(joined.generation_config).update(said, _from_model_config=False)
        return joined.eval()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, **kwargs: Any
    ) -> CoDDModel:
        """Loads a CoDD model, or a head together with the backbone that its configuration names.

        A LoRA beside either (`adapter/`) is loaded into the backbone.

        Args:
            pretrained_model_name_or_path: a folder or Hub id of a model, of a pipeline (its model
                is loaded) or of a head.
            **kwargs: as in transformers. For a head, `revision` and `token` concern its repository
                alone; the backbone gets those that say how to load it (`dtype`, `device_map`,
                `cache_dir`, ...).

        Raises:
            ValueError: a head names no backbone, or one that the user has to name, or the weights
                are not those that the configuration describes.
            OSError: nothing is found, or a file is damaged.
        """
        name = checked_name(pretrained_model_name_or_path, "pretrained_model_name_or_path")
        given = kwargs.get("config")
        repository = locate(name, kwargs) if given is None else Repository(name, kwargs)
        adapter = repository.adapter()
        if given is None and repository.config.get("model_type") == CoDDHeadConfig.model_type:
            head: Any = CoDDHead.from_pretrained(name, **repository.hub)
            base, own = named_backbone(name, head.config, kwargs)
            return cls.from_backbone(base, head, adapter, **own)
        generation_config = kwargs.pop("generation_config", None)
        with explain_load_errors(repository):
            if given is None:
                own = {key: kwargs.pop(key) for key in OWN_ARGUMENTS if key in kwargs}
                kwargs["config"] = CoDDConfig.from_dict(repository.config | own)
            config = kwargs["config"]
            if (kind := _class_for(config, cls)) is not cls:
                return kind.from_pretrained(name, generation_config=generation_config, **kwargs)
            unused = family_of(config.text_config).unused_weights
            load: Any = super().from_pretrained
            model = load_stored(repository, load, config, cls, unused, **kwargs)
            if generation_config is None and repository.find("generation_config.json"):
                read = cls.generation_config_class.from_pretrained
                generation_config = read(repository.folder)
        model.generation_config = generation_config or model.generation_config
        if model.coupling_head is not None:
            model.coupling_head.check_states()
        if adapter is not None:
            load_adapter(model.backbone, adapter, DEFAULT_NAME)
        return model

    def save_pretrained(
        self,
        save_directory: Any,
        *args: Any,
        max_shard_size: int | str = "50GB",  # diffusers looks for this name and the next
        variant: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Saves the backbone and the default head, and the backbone's LoRA, if any, in `adapter/`.

        The arguments are those of transformers and of `push_to_hub`.

        Raises:
            ValueError: it could not be loaded again: the backbone is of a class of its own.
        """
        if not is_known(self.backbone.config):
            raise ValueError(
                f"The backbone (model type {self.backbone.config.model_type!r}) is of a class that "
                "transformers does not have, so that the whole could not be loaded: share the head "
                "by `save_head`."
            )
        is_main_process = args[0] if args else kwargs.get("is_main_process", True)
        if is_main_process:
            base = self.backbone.name_or_path
            base = None if not base or is_local(base) else base  # the weights are here
            with self.adapter_lock:
                folder = Path(save_directory, ADAPTER_FOLDER)
                save_adapter(self.backbone, active_adapter(self), folder, base)
        kwargs |= {"state_dict": without_adapters(self, kwargs.get("state_dict"))}
        kwargs |= {"max_shard_size": max_shard_size, "variant": variant}
        super().save_pretrained(save_directory, *args, **kwargs)
        if is_main_process:
            forget_paths(Path(save_directory))

    def _apply(self, fn: Any, recurse: bool = True) -> CoDDModel:
        for head in self.other_heads.values():
            head._apply(fn)
        return super()._apply(fn, recurse)

    @classmethod
    def can_generate(cls) -> bool:
        """True."""
        return True

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replaces the backbone's."""
        self.backbone.set_output_embeddings(value)

    def __call__(self, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        """As `forward`; trl's trainers, which replace that, get what they ask for from here."""
        if fused_lm_head:
            return per_token_output(self, *args, **kwargs)
        return super().__call__(*args, **kwargs)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        window_start: torch.Tensor | None = None,
        coupling: str | None = None,
        return_distribution: bool = False,
        generator: Generators = None,
        head: HeadName = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CoDDOutput | tuple:
        """Predicts masked tokens.

        Args:
            input_ids: `[batch, length]`.
            attention_mask: `[batch, length]`, 0 at padding; default no padding, with a warning
                where a row begins or ends with padding tokens.
            position_ids: `[batch, length]`; default, counted over real tokens.
            labels: `[batch, length]`, the true tokens, -100 where not supervised. The loss is over
                masked, supervised positions, jointly over windows from the first of them on.
            window_start: `[batch]`, start of the window that is coupled; default, the last
                `window_length` real positions of each row.
            coupling: `"none"` (logits stay factorized), `"marginal"` (the window's logits become
                the log of the exact coupled marginals) or `"latent"` (log-probabilities given one
                sampled latent path, at observed tokens too); default, `config.coupling`.
            return_distribution: also return the window's distribution.
            generator: draws the latent path.
            head: the name of the head that couples this call; None, the default one; False, none.
            return_dict: False for a tuple.
            **kwargs: arguments of transformers' models that ask for nothing.

        Raises:
            ValueError: an argument is out of range, or `labels` supervise no masked token.
            TypeError: an argument is of another kind, or asks for what only the backbone can do.
        """
        coupling = self.config.coupling if coupling is None else coupling
        choice("coupling", coupling, COUPLINGS)
        return_distribution = flag("return_distribution", return_distribution)
        refuse_requests(kwargs)
        given = input_ids, attention_mask, position_ids, labels, window_start
        ids, mask, positions, labels, start = checked_inputs(self, *given)
        generators("generator", generator, len(ids))
        call, distribution, loss = self.head_of_call(head), None, None
        with self.adapter_of_call(call):
            states = self.backbone_states(ids, mask, positions)
            logits = states.logits()
            if start is None:
                real = torch.ones_like(ids) if mask is None else mask
                start = ids.shape[1] - real.flip(1).argmax(1) - call.window_length
            if return_distribution or coupling != "none":
                distribution = self.window_distribution(states, ids, start, mask, head=call)
            if distribution is not None and coupling != "none":
                if coupling == "marginal":
                    coupled, where = distribution.marginals.log(), distribution.masked
                else:
                    latents = distribution.sample_latents(generator)
                    coupled, where = distribution.logits_given(latents), distribution.present
                row, column = where.nonzero(as_tuple=True)
                new = coupled[row, column].to(logits.dtype)
                logits = logits.index_put((row, start[row] + column), new)
            if labels is not None:
                loss = self._loss(states, ids, mask, labels, call)
        output = CoDDOutput(loss, logits, states.last_hidden_state)
        if return_distribution:
            output.distribution = distribution
        return output.to_tuple() if return_dict is False else output

    def generate(self, inputs: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        """Decodes by diffusion; see [`~codd_hf.decoding.generation.generate`] for the arguments."""
        from .decoding.generation import generate  # diffusers takes seconds to import

        return generate(self, inputs, **kwargs)

    def score(self, prompts: Texts, answers: Texts, **kwargs: Any) -> ScoreOutput:
        """Log-likelihoods of answers; see [`~codd_hf.coupling.scoring.score`] for the arguments."""
        return score(self, prompts, answers, **kwargs)


def _class_for(config: CoDDConfig, cls: type[CoDDModel]) -> type[CoDDModel]:
    """The class of models with such a backbone: one of its own, or as asked for."""
    if config.text_config.model_type == "diffusion_gemma":
        from .modeling_diffusion_gemma import CoDDDiffusionGemma

        return CoDDDiffusionGemma
    return cls


AutoModel.register(CoDDConfig, CoDDModel, exist_ok=True)
AutoModelForCausalLM.register(CoDDConfig, CoDDModel, exist_ok=True)
