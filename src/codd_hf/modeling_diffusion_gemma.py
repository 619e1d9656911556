"""DiffusionGemma with a CoDD head."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .backbones.diffusion_gemma import accept_old_names
from .checks.arguments import choice
from .circuits import beside_global
from .configuration_codd import COUPLINGS, CoDDConfig
from .coupling.adapters import adapter_configs
from .coupling.canvas import CoupledCanvas
from .coupling.heads import HeadName
from .decoding.diffusion_gemma import CoDDGenerationConfig, CoupledLoop
from .modeling_codd import CoDDModel


class CoDDDiffusionGemma(CoDDModel):
    """A DiffusionGemma (`backbone`) with a circuit (`coupling_head`).

    `forward` and `generate` are those of transformers' `DiffusionGemmaForBlockDiffusion`, and what
    its users read is where they look for it, so that it runs in diffusers' `DiffusionGemmaPipeline`
    as well. Images pass through. Windows lie side by side over each canvas. Without a head, and
    with a new one, everything is as without this class.
    """

    generation_config_class = CoDDGenerationConfig

    def __init__(self, config: CoDDConfig, *parts: Any) -> None:
        super().__init__(config, *parts)
        if config.head_config is None and config.forbidden_token_ids:
            raise ValueError(
                "`forbidden_token_ids` need a head here: give `generate` a `logits_processor` "
                "(`SuppressTokensLogitsProcessor`)."
            )
        accept_old_names(self.backbone)

    @property
    def generation_config(self) -> Any:
        """The backbone's."""
        return self.backbone.generation_config

    @generation_config.setter
    def generation_config(self, config: Any) -> None:
        if "backbone" in self._modules:  # else it is about to come, with its own
            self.backbone.generation_config = config

    @property
    def model(self) -> nn.Module:
        """The backbone's encoder and decoder, where stock loops look for them."""
        return self.backbone.model

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Ties encoder and decoder; where adapters stand in place of layers, they are already."""
        if not adapter_configs(self.backbone):
            super().tie_weights(*args, **kwargs)

    def bind_head(self, head: Any) -> None:
        """As for any model; a head that copies is refused."""
        if "copy" in (head.config.conditioning or ()):
            raise ValueError(
                "`head` copies tokens before its window (`conditioning`), but the states of a "
                "DiffusionGemma's prompt are not kept: use one without 'copy'."
            )
        super().bind_head(head)

    def forward(  # type: ignore[override]
        self,
        *args: Any,
        coupling: str | None = None,
        generator: torch.Generator | None = None,
        head: HeadName = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Predicts the clean canvas; the arguments but for these are the backbone's.

        Args:
            *args: the backbone's.
            coupling: `"none"` (the backbone's logits), `"marginal"` (the log of the exact coupled
                marginals) or `"latent"` (logits given one latent path a window: draws from them,
                position by position, are a joint draw); default, `config.coupling`.
            generator: draws the paths; default, one that leaves the global generator untouched and
                is told by its state and the canvas.
            head: the name of the head that couples this call; None, the default one; False, none.
            return_dict: False for a tuple.
            **kwargs: the backbone's.

        Returns:
            The backbone's output with other `logits` `[batch, canvas, vocab]`.
        """
        coupling = self.config.coupling if coupling is None else coupling
        choice("coupling", coupling, COUPLINGS)
        call = self.head_of_call(head)
        if coupling == "none":
            call = call._replace(module=None)
        with self.adapter_of_call(call):
            if call.reads_states:
                kwargs["output_hidden_states"] = True
            output = self.backbone(*args, **kwargs)
        if call.module is not None:
            canvas = CoupledCanvas.of(call, output.logits, output)
            if coupling == "marginal":
                output.logits = canvas.marginal_logits
            else:
                own = generator or beside_global(self.device, kwargs.get("decoder_input_ids"))
                output.logits = canvas.logits_given_path(own)
        return output.to_tuple() if return_dict is False else output

    def generate(  # type: ignore[override]
        self,
        *args: Any,
        generator: torch.Generator | None = None,
        head: HeadName = None,
        **kwargs: Any,
    ) -> Any:
        """Decodes as transformers' class; see [`~codd_hf.decoding.diffusion_gemma`] for how.

        Args:
            *args: of transformers' `generate`.
            generator: draws latent paths, for all rows; default, one that is told by the state of
                the global generator, which draws all else.
            head: the name of the head that couples this call; None, the default one; False, none.
            **kwargs: of transformers' `generate`.

        Returns:
            Its output: `sequences`, `tokens_per_forward` and `cache`.
        """
        call, generator = self.head_of_call(head), generator or beside_global(self.device)
        with self.adapter_of_call(call):
            if call.module is None:
                stock: Any = self.backbone.generate
                return stock(*args, **kwargs)
            return CoupledLoop(self.backbone, call.frozen(), generator).generate(*args, **kwargs)
