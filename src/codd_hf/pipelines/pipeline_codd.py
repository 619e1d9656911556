"""The pipeline of Coupled Discrete Diffusion: from a prompt to text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..backbones import noise_of
from ..checks.arguments import check_callable, check_known, choice, flag, shown
from ..circuits import Generators
from ..coupling.adapters import unwrapped
from ..decoding.call import CHOICES, DecodingCall, PerRow
from ..decoding.choices import SETTINGS, SPECIAL_TOKENS, choices_of, with_settings_of
from ..decoding.layout import lay_out
from ..decoding.loop import denoise
from ..decoding.step import Canvas
from ..hub.publishing import CARD, Publishing, forget_paths
from ..hub.repositories import checked_name
from ..modeling_codd import CoDDModel
from ..schedulers.scheduling_codd import CoDDScheduler
from .loading import load_components
from .pipeline_output import CoDDPipelineOutput
from .prompts import Conversation, encode_prompts

Callback = Callable[[Any, int, torch.Tensor, dict[str, Any]], dict[str, Any]]
PROMPTS = (
    "prompt",
    "messages",
    "input_ids",
    "attention_mask",
    "use_chat_template",
    "chat_template_kwargs",
)


class CoDDPipeline(Publishing, DiffusionPipeline):  # type: ignore[misc]
    """Text generation by denoising with coupled distributions over windows of tokens.

    Args:
        model ([`CoDDModel`]): A diffusion language model, with a head or without one (then it
            decodes factorized).
        scheduler ([`CoDDScheduler`]): Decides which tokens each step commits.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): Needed for text.

    Examples:
        ```python
        >>> from codd_hf import CoDDPipeline

        >>> pipe = CoDDPipeline.from_pretrained("path/to/pipeline")
        >>> output = pipe("What is 3 + 4?", num_inference_steps=8)
        >>> print(output.texts[0])
        >>> mask = pipe.tokenizer.mask_token
        >>> print(pipe(f"Tom has 3{4 * mask} and eats 2.", infill=True).texts[0])
        ```
    """

    model: CoDDModel
    scheduler: CoDDScheduler
    tokenizer: Any
    _callback_tensor_inputs = ["canvas", "generated", "transfer_index"]  # noqa: RUF012
    _optional_components = ["tokenizer"]  # noqa: RUF012
    model_cpu_offload_seq: Any = "model"

    def __init__(
        self,
        model: CoDDModel,
        scheduler: CoDDScheduler,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__()
        model = unwrapped(model)
        mask_token_id = None if tokenizer is None else tokenizer.mask_token_id
        is_mask = noise_of(model.config.text_config) == "mask"
        if is_mask and mask_token_id not in (None, model.config.mask_token_id):
            raise ValueError(
                f"`tokenizer` has the mask token {mask_token_id}, but the model's is "
                f"{model.config.mask_token_id}: give the tokenizer that the model was trained with."
            )
        self.register_modules(model=model, scheduler=scheduler, tokenizer=tokenizer)
        self.num_timesteps = 0  # of the last call

    def __setattr__(self, name: str, value: Any) -> None:
        # PEFT's wrapper would be saved without the model.
        super().__setattr__(name, unwrapped(value) if name == "model" else value)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> CoDDPipeline:
        """Loads a pipeline from what a name or path holds.

        That is a pipeline repository (`model_index.json`), a CoDD model, a head (the backbone that
        it names is loaded as well) or a bare backbone (no head: the factorized baseline). The
        last three get a [`CoDDScheduler`] with the settings of the model's generation configuration
        and the tokenizer beside the weights, if there is one.

        Args:
            pretrained_model_name_or_path (`str`): A folder or an id on the Hub.
            **kwargs: As for [`CoDDModel.from_pretrained`]; `model`, `scheduler` and `tokenizer`
                replace a component.

        Raises:
            OSError: there is no such folder or repository, or it holds none of these.
            TypeError: the name is neither a path nor an id.
        """
        name = checked_name(pretrained_model_name_or_path, "pretrained_model_name_or_path")
        pipeline = cls(**load_components(name, kwargs))
        if kwargs.get("model") is None:
            pipeline.model.generation_config = pipeline.generation_config
        return pipeline

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Saves all components, and a model card (`README.md`) if there is none.

        The arguments are those of diffusers and of `push_to_hub`.
        """
        folder = Path(save_directory, "model")
        card_was_there = (folder / CARD).exists()
        super().save_pretrained(save_directory, *args, **kwargs)
        self.generation_config.save_pretrained(folder)
        if not card_was_there:
            (folder / CARD).unlink(missing_ok=True)  # a pipeline has one card
        forget_paths(Path(save_directory))

    @property
    def generation_config(self) -> GenerationConfig:
        """The model's, with the settings of the scheduler; it is saved with the model.

        Special tokens that the model does not know are the tokenizer's.
        """
        config, task = with_settings_of(self.model.generation_config, self.scheduler), self.task()
        for name in SPECIAL_TOKENS:
            if getattr(config, name) is None and task.get(name) not in (None, []):
                setattr(config, name, task[name])
        return config

    def task(self, **call: Any) -> dict[str, Any]:
        """The choices of a call, by the names of [`~codd_hf.decoding.call.DecodingCall`]."""
        return choices_of(self.model, call, tokenizer=self.tokenizer)

    def prepare(self, **call: Any) -> Canvas:
        """Checks and encodes the prompts and choices of a call, and decodes nothing.

        Args:
            **call: the arguments of `__call__` that concern prompts and decoding.
        """
        call = {name: value for name, value in call.items() if value is not None}
        prompts = {name: call.pop(name) for name in PROMPTS if name in call}
        check_known(call, (*CHOICES, *SETTINGS), "an argument of the pipeline")
        choices = self.task(**call)
        infill = flag("infill", choices.get("infill", False))
        ids, mask = encode_prompts(
            self.model, self.tokenizer, infill=infill, end_ids=choices["eos_token_id"], **prompts
        )
        decoding = DecodingCall(self.model, self.scheduler, len(ids), **choices)
        device = self._execution_device
        return lay_out(self.model, decoding, ids.to(device), mask.to(device))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        messages: Conversation | list[Conversation] | None = None,
        input_ids: torch.Tensor | list[int] | list[list[int]] | None = None,
        attention_mask: torch.Tensor | None = None,
        use_chat_template: bool = True,
        chat_template_kwargs: dict[str, Any] | None = None,
        gen_length: PerRow | None = None,
        num_inference_steps: PerRow | None = None,
        generator: Generators = None,
        output_type: str = "text",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        **settings: Any,
    ) -> CoDDPipelineOutput | Any:
        """Generates text after each prompt, or in the gaps of each.

        Args:
            prompt (`str` or `list[str]`, *optional*): One prompt or several, of any lengths.
            messages (`list[dict]` or `list[list[dict]]`, *optional*): One conversation or several.
            input_ids (`torch.LongTensor`, `list[int]` or `list[list[int]]`, *optional*):
                Prompts as token ids, `(length,)` or `(batch_size, length)`; lists may be of
                different lengths.
            attention_mask (`torch.Tensor`, *optional*): Of the shape of `input_ids`, 0 at padding.
            use_chat_template (`bool`, defaults to `True`):
                Whether a `prompt` becomes a user's message where the tokenizer has a chat template;
                with `infill` it never does.
            chat_template_kwargs (`dict`, *optional*): Passed to `apply_chat_template`.
            gen_length (`int` or `list[int]`, *optional*): As for
                [`~codd_hf.decoding.call.DecodingCall`], as the next two.
            num_inference_steps (`int` or `list[int]`, *optional*): The most backbone passes.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): One, or one a row.
            output_type (`str`, defaults to `"text"`): `"text"`, or `"seq"` for token ids alone.
            return_dict (`bool`, defaults to `True`): Whether to return an output or a tuple.
            callback_on_step_end (`Callable`, *optional*): Called as `callback(pipe, step, timestep,
                callback_kwargs)`; returns a dict, whose `canvas` (if any) replaces the canvas.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*): The tensors that it gets,
                by default `["canvas"]`, of those of [`~codd_hf.decoding.loop.denoise`].
            **settings: The other arguments of [`~codd_hf.decoding.call.DecodingCall`]
                (`block_length`, `infill`, `head`, ...), by default those of the model's generation
                configuration, and the draw settings
                ([`~codd_hf.schedulers.settings.DrawSettings`]), by default the scheduler's.

        Returns:
            [`CoDDPipelineOutput`], or without `return_dict` the tuple `(sequences, texts)`.

        Raises:
            ValueError: an argument is out of range; the sentence says which and what to give.
            TypeError: an argument is unknown or of another kind.
        """
        # 1. Check inputs and encode the prompts.
        choice("output_type", output_type, ("text", "seq"))
        if output_type == "text" and self.tokenizer is None:
            raise ValueError("`output_type='text'` needs a tokenizer: use `output_type='seq'`.")
        return_dict = flag("return_dict", return_dict)
        on_step = self._on_step(callback_on_step_end, callback_on_step_end_tensor_inputs)
        canvas = self.prepare(
            prompt=prompt,
            messages=messages,
            input_ids=input_ids,
            attention_mask=attention_mask,
            use_chat_template=use_chat_template,
            chat_template_kwargs=chat_template_kwargs,
            gen_length=gen_length,
            num_inference_steps=num_inference_steps,
            generator=generator,
            **settings,
        )

        # 2. Denoise, one block after the other.
        self.num_timesteps = canvas.most_passes
        with self.progress_bar(total=canvas.most_passes) as bar:
            denoise(self.model, canvas, on_step=on_step, after_step=bar.update)
            bar.update(max(0, canvas.most_passes - canvas.num_passes))  # those that were not needed

        # 3. Decode the text.
        sequences, is_text = canvas.result()
        texts = None
        if output_type == "text":
            known = is_text & (sequences < len(self.tokenizer))
            texts = [
                self.tokenizer.decode(row[keep], skip_special_tokens=True)
                for row, keep in zip(sequences, known, strict=True)
            ]
        self.maybe_free_model_hooks()
        if not return_dict:
            return sequences, texts
        return CoDDPipelineOutput(sequences, texts, canvas.num_passes, canvas.passes_per_row)

    def _on_step(self, callback: Any, names: Any) -> Callable | None:
        """A callback of diffusers as the denoising loop calls it."""
        check_callable("callback_on_step_end", callback, "callable")
        names = getattr(callback, "tensor_inputs", names)  # of diffusers' callbacks
        names, known = ["canvas"] if names is None else names, self._callback_tensor_inputs
        if not (
            isinstance(names, list | tuple)
            and all(isinstance(name, str) and name in known for name in names)
        ):
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must hold names among {', '.join(known)}, "
                f"got {shown(names)}."
            )

        def on_step(step: int, timestep: torch.Tensor, state: dict[str, torch.Tensor]) -> Any:
            outputs = callback(self, step, timestep, {name: state[name] for name in names})
            if not isinstance(outputs, dict):
                raise ValueError(
                    "`callback_on_step_end` must return a dict (it may be empty), got "
                    f"{shown(outputs)}."
                )
            return outputs.get("canvas")

        return None if callback is None else on_step
