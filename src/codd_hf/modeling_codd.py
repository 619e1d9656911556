"""A diffusion language model with a CoDD head."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from .backbones import BackboneFamily, BackboneStates, family_of
from .circuits import CoupledCategorical, Preceding
from .circuits.random import Generators
from .configuration_codd import CoDDConfig, CoDDHeadConfig, check_coupling
from .modeling_head import CoDDHead, forbidden_tokens, trivial_potentials

HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "trust_remote_code")


@dataclass
class CoDDOutput(ModelOutput):
    """Output of [`CoDDModel`].

    Attributes:
        loss: scalar, conditional negative log-likelihood per supervised masked token, in nats; only
            with `labels`.
        logits: `[batch, length, vocab]`; entry `i` predicts token `i`. Where a coupling is asked
            for, the window's entries are log-probabilities of the coupled distribution.
        last_hidden_state: `[batch, length, hidden]`; entry `i` predicted token `i`.
        hidden_states: kept for transformers' conventions; None.
        distribution: the coupled distribution of the window; only with `return_distribution=True`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    distribution: CoupledCategorical | None = None


class CoDDModel(PreTrainedModel):
    """A diffusion language model (`backbone`) with a circuit (`coupling_head`).

    Use [`~CoDDModel.from_backbone`] to join the two, `from_pretrained` to load a saved pair,
    `generate` to decode.
    """

    config_class = CoDDConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _keep_in_fp32_modules_strict = ["coupling_head"]  # noqa: RUF012

    def __init__(
        self,
        config: CoDDConfig,
        backbone: PreTrainedModel | None = None,
        coupling_head: CoDDHead | None = None,
    ):
        super().__init__(config)
        for given in (backbone, coupling_head):
            for module in given.modules() if given is not None else ():
                module._is_hf_initialized = True  # its weights are not to be drawn anew
        if backbone is None:
            backbone = family_of(config.text_config).from_config(config.text_config)
        if coupling_head is None and config.head_config is not None:
            coupling_head = CoDDHead(config.head_config)
        self.backbone = backbone
        self.coupling_head = coupling_head
        self.post_init()

    @classmethod
    def from_backbone(
        cls,
        backbone: PreTrainedModel | str | Path,
        head: CoDDHead | CoDDHeadConfig | str | Path | None = None,
        mask_token_id: int | None = None,
        forbidden_token_ids: list[int] | None = None,
        **kwargs,
    ) -> CoDDModel:
        """Joins a backbone and a head.

        Args:
            backbone: a model, a local path or a Hub id. A decoder is switched to full attention.
            head: a head, a local path or a Hub id; a configuration makes a new, untrained head;
                None leaves the predictions factorized.
            mask_token_id: the mask token; defaults to the head's, then the backbone's.
            forbidden_token_ids: tokens that are never generated; defaults to the head's.
            **kwargs: for the backbone's `from_pretrained` (`dtype`, `device_map`, `revision`, ...).

        Raises:
            ValueError: backbone and head do not fit, or the backbone's family is not known.
            FileNotFoundError: a local path does not exist.
        """
        if isinstance(backbone, str | Path):
            config_kwargs = {k: kwargs[k] for k in HUB_ARGUMENTS if k in kwargs}
            name = _existing(backbone, "backbone")
            config = AutoConfig.from_pretrained(name, **config_kwargs)
            if isinstance(config, CoDDConfig):
                raise ValueError(
                    f"`backbone` {name!r} is a CoDD model already: use `CoDDModel.from_pretrained`."
                )
            backbone = family_of(config).from_pretrained(name, config, **kwargs)
        elif kwargs:
            raise ValueError(
                f"{', '.join(f'`{k}`' for k in kwargs)} cannot be given with a loaded backbone: it "
                "is for loading one by path or id."
            )
        family_of(backbone.config).adopt(backbone.config)
        if isinstance(head, str | Path):
            head = CoDDHead.from_pretrained(_existing(head, "head"))
        elif isinstance(head, CoDDHeadConfig):
            head = CoDDHead(head)
        if head is not None and head.config.vocab_size != backbone.config.vocab_size:
            raise ValueError(
                f"`head` has a vocabulary of {head.config.vocab_size} tokens, but the backbone's "
                f"has {backbone.config.vocab_size}: use a head that was fitted to this backbone."
            )
        size = None if head is None else head.config.context_size
        if size not in (None, backbone.config.hidden_size):
            raise ValueError(
                f"`head` expects hidden states of size {size} (`context_size`), but the backbone's "
                f"have {backbone.config.hidden_size}: use a head that was fitted to this backbone."
            )
        config = CoDDConfig(
            text_config=backbone.config,
            head_config=None if head is None else head.config,
            mask_token_id=mask_token_id,
            forbidden_token_ids=forbidden_token_ids,
        )
        model = cls(config, backbone=backbone, coupling_head=head)
        if head is not None:
            head.to(backbone.device)
        return model.eval()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs) -> CoDDModel:
        """Loads a CoDD model, or a head together with the backbone that its configuration names.

        Args:
            pretrained_model_name_or_path: a folder or Hub id of a model or of a head.
            *model_args: as in transformers.
            **kwargs: as in transformers. For a head they concern the head's repository; of the
                backbone, only `dtype` and `device_map` are taken from here.

        Raises:
            ValueError: a head names no backbone, or a downloaded one names a local path.
        """
        name = _existing(pretrained_model_name_or_path, "pretrained_model_name_or_path")
        hub = {k: v for k, v in kwargs.items() if k in HUB_ARGUMENTS}
        found = {} if kwargs.get("config") else PreTrainedConfig.get_config_dict(name, **hub)[0]
        if found.get("model_type") != CoDDHeadConfig.model_type:
            return super().from_pretrained(name, *model_args, **kwargs)
        head = CoDDHead.from_pretrained(name, **hub)
        base, revision = head.config.base_model_name_or_path, head.config.base_model_revision
        if base is None:
            raise ValueError(
                f"The head {name!r} names no backbone (`base_model_name_or_path`): join them with "
                "`CoDDModel.from_backbone(backbone, head)`."
            )
        if Path(base).exists() and not Path(name).exists():
            raise ValueError(
                f"The downloaded head {name!r} names the local path {base!r} as its backbone: give "
                "the backbone yourself, with `CoDDModel.from_backbone(backbone, head)`."
            )
        own = {k: kwargs[k] for k in ("dtype", "device_map") if k in kwargs}
        if revision is not None:
            own["revision"] = revision
        return cls.from_backbone(base, head, **own)

    @property
    def family(self) -> BackboneFamily:
        """The family that knows how to read the backbone."""
        return family_of(self.config.text_config)

    @property
    def window_length(self) -> int:
        """Length of the head's window; 32 without a head."""
        return 32 if self.coupling_head is None else self.coupling_head.config.window_length

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.backbone.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_output_embeddings(value)

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
        head: CoDDHead | None = None,
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
            head: a head to use in place of the model's own.
        """
        if self.config.mask_token_id is None:
            raise ValueError("`mask_token_id` is not known: give it to `from_backbone`.")
        batch, length = input_ids.shape
        rows = torch.arange(batch, device=input_ids.device) if rows is None else rows
        positions = window_start[:, None] + torch.arange(self.window_length, device=rows.device)
        inside = (positions >= 0) & (positions < length)
        positions = positions.clamp(0, length - 1)
        index = (rows[:, None], positions)
        present = inside if attention_mask is None else inside & attention_mask[index].bool()
        tokens = input_ids[index]
        observed = tokens != self.config.mask_token_id
        wanted = present & ~observed
        at = wanted.nonzero(as_tuple=True)
        known = states.logits((rows[at[0]], positions[at]))
        logits = known.new_zeros(*positions.shape, known.shape[-1]).index_put(at, known)
        head = self.coupling_head if head is None else head
        if head is not None:
            if head.config.emission == "tied":
                head.bind(self.get_output_embeddings().weight)
            preceding = None
            if head.context_maps is not None and head.context_maps.copies:
                preceding = self.preceding(
                    states, input_ids, window_start, attention_mask, rows, head
                )
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
            forbidden=forbidden_tokens(
                logits.shape[-1],
                self.config.mask_token_id,
                self.config.forbidden_token_ids,
                logits.device,
            ),
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

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        window_start: torch.Tensor | None = None,
        coupling: str | None = None,
        return_distribution: bool = False,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> CoDDOutput | tuple:
        """Predicts masked tokens.

        Args:
            input_ids: `[batch, length]`.
            attention_mask: `[batch, length]`, 0 at padding.
            position_ids: `[batch, length]`; default, counted over real tokens.
            labels: `[batch, length]`, the true tokens, -100 where not supervised. The loss is over
                masked, supervised positions, jointly over the windows of each row that are aligned
                with its first supervised token.
            window_start: `[batch]`, start of the window that is coupled; default, the last
                `window_length` real positions of each row.
            coupling: `"none"` (logits stay factorized), `"marginal"` (the window's logits become
                the log of the exact coupled marginals) or `"latent"` (log-probabilities given one
                sampled latent path); default, `config.coupling`.
            return_distribution: also return the window's distribution.
            generator: draws the latent path.
            return_dict: False for a tuple.
        """
        coupling = self.config.coupling if coupling is None else coupling
        check_coupling(coupling)
        states = self.backbone_states(input_ids, attention_mask, position_ids)
        logits = states.logits()
        distribution, loss = None, None
        if return_distribution or coupling != "none":
            if window_start is None:
                window_start = self._trailing_window(input_ids, attention_mask)
            distribution = self.window_distribution(states, input_ids, window_start, attention_mask)
        if coupling != "none":
            logits = self._coupled_logits(logits, distribution, window_start, coupling, generator)
        if labels is not None:
            loss = self._loss(states, input_ids, attention_mask, labels)
        output = CoDDOutput(
            loss=loss,
            logits=logits,
            last_hidden_state=states.last_hidden_state,
            distribution=distribution if return_distribution else None,
        )
        return output if return_dict else output.to_tuple()

    def _trailing_window(self, input_ids, attention_mask) -> torch.Tensor:
        batch, length = input_ids.shape
        if attention_mask is None:
            end = torch.full((batch,), length, device=input_ids.device)
        else:
            end = length - attention_mask.flip(1).long().argmax(1)
        return end - self.window_length

    def _coupled_logits(self, logits, distribution, window_start, coupling, generator):
        if coupling == "marginal":
            coupled = distribution.marginals.log()
        else:
            coupled = distribution.logits_given(distribution.sample_latents(generator))
        rows, columns = distribution.masked.nonzero(as_tuple=True)
        values = coupled[rows, columns].to(logits.dtype)
        return logits.index_put((rows, window_start[rows] + columns), values)

    def _loss(self, states, input_ids, attention_mask, labels) -> torch.Tensor:
        supervised = (labels != -100) & (input_ids == self.config.mask_token_id)
        first = (labels != -100).long().argmax(1)
        window = (torch.arange(labels.shape[1], device=labels.device) - first[:, None]).div(
            self.window_length, rounding_mode="floor"
        )
        rows, columns = supervised.nonzero(as_tuple=True)
        if len(rows) == 0:
            return 0.0 * states.last_hidden_state.sum()
        pairs = torch.stack((rows, window[rows, columns])).unique(dim=1)
        rows, starts = pairs[0], first[pairs[0]] + pairs[1] * self.window_length
        distribution = self.window_distribution(
            states, input_ids, starts, attention_mask, rows=rows
        )
        positions = starts[:, None] + torch.arange(self.window_length, device=labels.device)
        padded = F.pad(labels, (0, self.window_length), value=-100)
        targets = padded[rows[:, None], positions]
        known = (targets != -100) & distribution.masked
        log_prob = distribution.partial_log_prob(targets.clamp(min=0), known)
        return -log_prob.sum() / known.sum().clamp(min=1)

    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        """Decodes by diffusion; see [`~codd_hf.decoding.generate`] for the arguments.

        Args:
            inputs: `[batch, length]` prompt tokens (`input_ids` is another name for it).
            **kwargs: `attention_mask`, `gen_length` (or `max_new_tokens`), `block_length`,
                `num_inference_steps`, `generator`, `scheduler` and its settings.

        Returns:
            `[batch, length + gen_length]`: the prompts, as they were given, and what follows.
        """
        from .decoding import generate

        return generate(self, inputs, **kwargs)


def _existing(name: str | Path, argument: str) -> str:
    """The path or id as a string; something that can only be a path must exist."""
    text = str(name)
    looks_local = isinstance(name, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1
    if looks_local and not Path(text).expanduser().exists():
        raise FileNotFoundError(f"`{argument}`: there is no file or folder {text!r}.")
    return str(Path(text).expanduser()) if looks_local else text
