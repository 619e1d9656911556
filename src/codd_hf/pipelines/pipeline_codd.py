"""The pipeline of Coupled Discrete Diffusion: from a prompt to text."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
)

from ..checks.arguments import choice, flag, several, shown
from ..circuits.random import Generators
from ..coupling.adapters import unwrapped
from ..coupling.heads import HeadName
from ..decoding.call import DecodingCall, ForcedTokens, PerRow
from ..decoding.generation_settings import said_of_task, task_of_call, with_settings_of
from ..decoding.loop import denoise
from ..hub.cards import Artifact
from ..hub.publishing import CARD, Publishing, forget_paths
from ..hub.repositories import Repository, checked_name, explain_load_errors
from ..modeling_codd import CoDDModel
from ..schedulers import CoDDScheduler
from .loading import load_components
from .pipeline_output import CoDDPipelineOutput
from .prompts import Conversation, check_prompts, encode_prompts

Callback = Callable[[Any, int, torch.Tensor, dict[str, Any]], dict[str, Any]]


class CoDDPipeline(Publishing, DiffusionPipeline):
    r"""Text generation by denoising with coupled distributions over windows of tokens.

    Args:
        model ([`CoDDModel`]): A diffusion language model, with a head or without one (then it
            decodes factorized).
        scheduler ([`CoDDScheduler`]): Decides which tokens each step commits.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): Needed for text.

    Raises:
        ValueError: model and tokenizer have different mask tokens.

    Examples:
        ```python
        >>> from codd_hf import CoDDPipeline

        >>> pipe = CoDDPipeline.from_pretrained("path/to/pipeline")
        >>> output = pipe("What is 3 + 4?", gen_length=64, block_length=32, num_inference_steps=8)
        >>> print(output.texts[0])
        >>> mask = pipe.tokenizer.mask_token
        >>> print(pipe(f"Tom has 3{4 * mask} and eats 2.", infill=True).texts[0])
        ```
    """

    _callback_tensor_inputs = [  # noqa: RUF012
        "canvas",
        "generated",
        "transfer_index",
        "sampled_tokens",
        "sampled_probs",
    ]
    _optional_components = ["tokenizer"]  # noqa: RUF012
    model_cpu_offload_seq = "model"

    def __init__(
        self,
        model: CoDDModel,
        scheduler: CoDDScheduler,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__()
        model = unwrapped(model)
        if tokenizer is not None and tokenizer.mask_token_id not in (
            None,
            model.config.mask_token_id,
        ):
            raise ValueError(
                f"`tokenizer` has the mask token {tokenizer.mask_token_id}, but the model's is "
                f"{model.config.mask_token_id}: give the tokenizer that the model was trained with."
            )
        self.register_modules(model=model, scheduler=scheduler, tokenizer=tokenizer)
        self._num_timesteps = 0

    def __setattr__(self, name: str, value: Any) -> None:
        # PEFT's wrapper would be saved without the model.
        super().__setattr__(name, unwrapped(value) if name == "model" else value)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, **kwargs: Any) -> CoDDPipeline:
        """Loads a pipeline from what a name or path holds.

        That is a pipeline repository (`model_index.json`), a CoDD model, a head (the backbone that
        it names is loaded as well) or a bare backbone (no head: the factorized baseline). The
        last three get a [`CoDDScheduler`] with the settings of the model's generation configuration
        and the tokenizer beside the weights, if there is one.

        Args:
            pretrained_model_name_or_path (`str`): A folder or an id on the Hub.
            **kwargs: As for [`~diffusers.DiffusionPipeline.from_pretrained`] or, for the last
                three, [`~transformers.PreTrainedModel.from_pretrained`]; `model`, `scheduler` and
                `tokenizer` replace a component.

        Raises:
            OSError: there is no such folder or repository, or it holds none of these.
            TypeError: the name is neither a path nor an id.
        """
        name = checked_name(pretrained_model_name_or_path, "pretrained_model_name_or_path")
        folder, arguments = load_components(name, kwargs)
        if folder is None:
            return cls(**arguments)
        repository = Repository(str(folder))
        with explain_load_errors(repository):
            for component in ("scheduler", "tokenizer"):
                repository.inside(component).check()
            pipeline = super().from_pretrained(str(folder), **arguments)
        if kwargs.get("model") is None:
            pipeline.model.generation_config = pipeline.generation_config
        return pipeline

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Saves all components, and a model card (`README.md`) if there is none.

        Args:
            save_directory: A folder, created if it does not exist.
            **kwargs: As in diffusers, and the keyword arguments of `push_to_hub`.
        """
        folder = Path(save_directory, "model")
        card_was_there = (folder / CARD).exists()
        super().save_pretrained(save_directory, **kwargs)
        self.generation_config.save_pretrained(folder)
        if not card_was_there:
            (folder / CARD).unlink(missing_ok=True)  # a pipeline has one card
        forget_paths(Path(save_directory))

    def _artifact(self) -> Artifact:
        model = self.model
        return Artifact(
            "pipeline", model.coupling_head, model.backbone, self.tokenizer, model.config
        )

    @property
    def generation_config(self) -> GenerationConfig:
        """The model's, with the settings of the scheduler; what is saved with the model.

        Special tokens that the model does not know are the tokenizer's.
        """
        config = with_settings_of(self.model.generation_config, self.scheduler)
        said = self.said_of_task()
        if config.eos_token_id is None and said["eos_token_id"]:
            config.eos_token_id = said["eos_token_id"]
        if config.pad_token_id is None:
            config.pad_token_id = said["pad_token_id"]
        return config

    @property
    def num_timesteps(self) -> int:
        """The `num_inference_steps` of the last call."""
        return self._num_timesteps

    def check_inputs(
        self,
        prompt: str | list[str] | None,
        messages: Conversation | list[Conversation] | None,
        input_ids: torch.Tensor | list[int] | list[list[int]] | None,
        attention_mask: torch.Tensor | None,
        output_type: str,
        callback_on_step_end: Callback | None,
        callback_on_step_end_tensor_inputs: list[str] | None,
    ) -> None:
        """Raises for what cannot be used, before anything is computed.

        Raises:
            ValueError: one sentence on the argument, its value, and what to give.
        """
        check_prompts(prompt, messages, input_ids, attention_mask, self.tokenizer)
        choice("output_type", output_type, ("text", "seq"))
        if output_type == "text" and self.tokenizer is None:
            raise ValueError("`output_type='text'` needs a tokenizer: use `output_type='seq'`.")
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise ValueError(
                f"`callback_on_step_end` must be callable, got {shown(callback_on_step_end)}."
            )
        names = several(callback_on_step_end_tensor_inputs)
        if names is None:
            raise TypeError(
                "`callback_on_step_end_tensor_inputs` must be a list, got "
                f"{shown(callback_on_step_end_tensor_inputs)}."
            )
        for key in names:
            if not isinstance(key, str) or key not in self._callback_tensor_inputs:
                raise ValueError(
                    f"`callback_on_step_end_tensor_inputs` must be among "
                    f"{', '.join(self._callback_tensor_inputs)}, got {shown(key)}."
                )

    def said_of_task(self, **call: Any) -> dict[str, Any]:
        """What a call decodes where it says `call`, by the names in `generation_settings.TASK`."""
        return said_of_task(self.model, call, tokenizer=self.tokenizer)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        messages: Conversation | list[Conversation] | None = None,
        input_ids: torch.Tensor | list[int] | list[list[int]] | None = None,
        attention_mask: torch.Tensor | None = None,
        use_chat_template: bool = True,
        add_generation_prompt: bool = True,
        chat_template_kwargs: dict[str, Any] | None = None,
        gen_length: PerRow | None = None,
        block_length: int | None = None,
        num_inference_steps: PerRow | None = None,
        paradigm: str | None = None,
        infill: bool = False,
        strategy: str | None = None,
        sampling: str | None = None,
        temperature: float | None = None,
        evidence_temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        threshold: float | None = None,
        activation_ratio: float | None = None,
        repetition_penalty: float | None = None,
        forbidden_token_ids: list[int] | None = None,
        remask_threshold: float | None = None,
        min_new_tokens: PerRow | None = None,
        forced_tokens: ForcedTokens | None = None,
        logits_processor: LogitsProcessor | LogitsProcessorList | None = None,
        cache: str | None = None,
        guidance_scale: float | list[float] | None = None,
        early_stop: bool = True,
        eos_token_id: int | list[int] | None = None,
        head: HeadName = None,
        generator: Generators = None,
        output_type: str = "text",
        return_dict: bool = True,
        callback_on_step_end: Callback | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> CoDDPipelineOutput | tuple:
        """Generates text after each prompt, or in the gaps of each.

        Args:
            prompt (`str` or `list[str]`, *optional*): One prompt or several, of any lengths.
            messages (`list[dict]` or `list[list[dict]]`, *optional*): One conversation or several.
            input_ids (`torch.LongTensor`, `list[int]` or `list[list[int]]`, *optional*):
                Prompts as token ids, `(length,)` or `(batch_size, length)`; lists may be of
                different lengths.
            attention_mask (`torch.Tensor`, *optional*): With a tensor of `input_ids`, of the same
                shape: 0 at padding, which may be on either side.
            use_chat_template (`bool`, defaults to `True`):
                Whether a `prompt` becomes a user's message where the tokenizer has a chat template.
            add_generation_prompt (`bool`, defaults to `True`): As in `apply_chat_template`.
            chat_template_kwargs (`dict`, *optional*): Passed to `apply_chat_template`.
            gen_length (`int` or `list[int]`, *optional*): Number of tokens to generate, for all
                prompts or for each; with `infill` the mask tokens say it. What is None here and in
                the next four is what the model's generation configuration says (for the length,
                `max_new_tokens`) or, of the length, 128.
            block_length (`int`, *optional*): Tokens that are decoded together; by default 32. It
                divides the blocks of a block-causal backbone (then the default), and is counted
                from the first token with one.
            num_inference_steps (`int` or `list[int]`, *optional*):
                The most backbone passes for the whole generation, for all prompts or for each, at
                least one per block; the remainder of an uneven share goes to the first blocks. The
                strategies `threshold` and `joint` need fewer where they are sure. By default one
                for four tokens, and at least one per block.
            paradigm (`str`, *optional*): `block` (the default), from left to right, or `full`: any
                position of the whole text in any step; needs no `block_length`.
            infill (`bool`, defaults to `False`): Whether each prompt holds mask tokens, which are
                filled in given the text on both sides; nothing is generated after it, and there is
                no chat template but for `messages`. `sequences` and `texts` are the whole texts.
            strategy (`str`, *optional*): How positions are ranked. This and what follows up to
                `remask_threshold` are settings of [`CoDDScheduler`], which says what they do, for
                this call; None takes the scheduler's.
            sampling (`str`, *optional*): `factorized`, `latent`, `any_order`, `marginal` or
                `viterbi`.
            temperature (`float`, *optional*): Of the final draw; 0 takes the most probable token.
            evidence_temperature (`float`, *optional*): Divides the backbone's logits before the
                circuit sees them.
            top_k (`int`, *optional*): Draw from so many tokens; 0: from all.
            top_p (`float`, *optional*): Draw from the tokens that reach this mass; 1: from all.
            threshold (`float`, *optional*): For the strategies `threshold` and `joint`.
            activation_ratio (`float`, *optional*): Largest mask ratio under which the circuit is
                applied; 1: always.
            repetition_penalty (`float`, *optional*): Above 1, tokens of the prompt and of the text
                so far become less probable.
            forbidden_token_ids (`list[int]`, *optional*): Tokens that are never generated.
            remask_threshold (`float`, *optional*): Tokens of a block that the others make less
                probable than this are predicted again.
            min_new_tokens (`int` or `list[int]`, *optional*): Tokens before the first end-of-text
                token, for all prompts or for each; `gen_length`: no end-of-text token at all.
            forced_tokens (`dict[int, int]` or `list[dict[int, int]]`, *optional*): Tokens by their
                place among the generated ones, for all prompts or for each; all others are
                predicted given them.
            logits_processor (`LogitsProcessorList`, *optional*): transformers' processors; what
                they see is said at [`~CoDDScheduler.step`].
            cache (`str`, *optional*): `prefix` or `dual`: within a block, keys and values of what
                is before it, or of all the rest, are computed once and reused: faster, and an
                approximation. For Llama-like backbones.
            guidance_scale (`float` or `list[float]`, *optional*):
                Classifier-free guidance by the prompt, for all prompts or for each, as LLaDA counts
                it: 0 is off, and `s` is what diffusers' image models call `s + 1`.
            early_stop (`bool`, defaults to `True`): Whether a row ends at its end-of-text token.
            eos_token_id (`int` or `list[int]`, *optional*): The end-of-text token, or several; by
                default the model's (its generation configuration's), or else the tokenizer's.
            head (`str` or `False`, *optional*): The name of the head that couples this call, or
                `False` for none; by default the model's default one.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                One generator, or one per prompt: a prompt then gets the same text in any batch.
            output_type (`str`, defaults to `"text"`): `"text"`, or `"seq"` for token ids alone.
            return_dict (`bool`, defaults to `True`): Whether to return an output or a tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipe, step, timestep, callback_kwargs)` after each step; returns
                a dict, whose `canvas` (if it has one) replaces the canvas.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*):
                What `callback_kwargs` holds, by default `["canvas"]`. All are `(batch_size,
                length)`, over the whole canvas `[prompt][generated][padding]` of each row:
                `canvas` (tokens), `generated` (which are not prompt or padding), `transfer_index`
                (committed in this step), `sampled_tokens` and `sampled_probs` (candidates).

        Returns:
            [`CoDDPipelineOutput`], or without `return_dict` the tuple `(sequences, texts)`, in
            which `texts` is None with `output_type="seq"`.

        Raises:
            ValueError: an argument is out of range; the sentence says which and what to give.
        """
        # 1. Check inputs.
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        if callback_on_step_end_tensor_inputs is None:
            callback_on_step_end_tensor_inputs = ["canvas"]
        self.check_inputs(
            prompt,
            messages,
            input_ids,
            attention_mask,
            output_type,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        settings = {
            "strategy": strategy,
            "sampling": sampling,
            "temperature": temperature,
            "evidence_temperature": evidence_temperature,
            "top_k": top_k,
            "top_p": top_p,
            "threshold": threshold,
            "activation_ratio": activation_ratio,
            "repetition_penalty": repetition_penalty,
            "forbidden_token_ids": forbidden_token_ids,
            "remask_threshold": remask_threshold,
        }

        return_dict = flag("return_dict", return_dict)
        chat = {} if chat_template_kwargs is None else chat_template_kwargs
        if not isinstance(chat, dict) or not all(isinstance(key, str) for key in chat):
            raise TypeError(
                f"`chat_template_kwargs` must be a dict of arguments, got {shown(chat)}."
            )

        # 2. Encode the prompts.
        said = self.said_of_task(
            gen_length=gen_length,
            block_length=block_length,
            num_inference_steps=num_inference_steps,
            paradigm=paradigm,
            infill=infill,
            min_new_tokens=min_new_tokens,
            eos_token_id=eos_token_id,
        )
        ids, mask = encode_prompts(
            prompt,
            messages,
            input_ids,
            attention_mask,
            tokenizer=self.tokenizer,
            model=self.model,
            end_ids=said["eos_token_id"],
            use_chat_template=flag("use_chat_template", use_chat_template),
            add_generation_prompt=flag("add_generation_prompt", add_generation_prompt),
            chat_template_kwargs=chat,
            infill=said["infill"] is not None and flag("infill", said["infill"]),
        )
        task = task_of_call(said, self.model, ids.shape[1])

        # 3. Denoise, one block after the other.
        def on_step(step, timestep, state):
            kwargs = {key: state[key] for key in callback_on_step_end_tensor_inputs}
            outputs = callback_on_step_end(self, step, timestep, kwargs)
            if not isinstance(outputs, dict):
                raise ValueError(
                    "`callback_on_step_end` must return a dict (it may be empty), got "
                    f"{type(outputs).__name__}."
                )
            return outputs.get("canvas")

        with ExitStack() as bars:

            def progress(total):
                self._num_timesteps = total
                return bars.enter_context(self.progress_bar(total=total))

            device = self._execution_device
            call = DecodingCall.of(
                self.model,
                self.scheduler,
                len(ids),
                generator=generator,
                early_stop=early_stop,
                forced_tokens=forced_tokens,
                logits_processor=logits_processor,
                cache=cache,
                guidance_scale=guidance_scale,
                head=head,
                **task,
                **settings,
            )
            output = denoise(
                self.model,
                call,
                ids.to(device),
                mask.to(device),
                on_step=None if callback_on_step_end is None else on_step,
                progress=progress,
            )

        # 4. Decode the text.
        texts = None
        if output_type == "text":
            known = output.is_text & (output.sequences < len(self.tokenizer))
            texts = [
                self.tokenizer.decode(row[keep], skip_special_tokens=True)
                for row, keep in zip(output.sequences, known, strict=True)
            ]

        self.maybe_free_model_hooks()
        if not return_dict:
            return output.sequences, texts
        return CoDDPipelineOutput(output.sequences, texts, output.num_passes, output.passes_per_row)
