"""Prompts in all the forms that a pipeline takes, to padded token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from ..checks.arguments import check_unmasked, flag, padding_mask, rows_of_ids, several, shown
from ..coupling.windows import CoupledBackbone
from ..text.encoding import encode_as_written, encode_chats

Conversation = list[dict[str, Any]]


def encode_prompts(
    model: CoupledBackbone,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    prompt: str | list[str] | None = None,
    messages: Conversation | list[Conversation] | None = None,
    input_ids: Any = None,
    attention_mask: Any = None,
    use_chat_template: bool = True,
    add_generation_prompt: bool = True,
    chat_template_kwargs: dict[str, Any] | None = None,
    infill: bool = False,
    end_ids: Sequence[int] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts as token ids; the arguments are those of the pipeline's call.

    In a chat template a user's text is text: what spells a special token there is none. A prompt
    without a template may write special tokens, since nothing else does.

    Args:
        model: says which tokens there are.
        tokenizer: for prompts and messages, and for its padding token.
        prompt: one text or several.
        messages: one conversation or several.
        input_ids: ids, padded where `attention_mask` is 0, or rows of any lengths. Without a mask
            padding tokens are padding, unless they end texts too.
        attention_mask: of the shape of `input_ids`.
        use_chat_template: whether a prompt becomes a user's message.
        add_generation_prompt: whether the template opens the answer.
        chat_template_kwargs: for the template.
        infill: whether mask tokens among the tokens are to be filled in; a `prompt` is then taken
            as it is, without a chat template.
        end_ids: tokens that end a text.

    Returns:
        `input_ids` and `attention_mask`, both `[batch, length]`, padded on the right.

    Raises:
        ValueError: not exactly one form is given, the tokenizer is missing, there is no row, or a
            prompt has a token that the model has not, or the mask token where nothing is to be
            filled in.
        TypeError: an argument has none of the forms it may have.
    """
    forms = {"prompt": prompt, "messages": messages, "input_ids": input_ids}
    forms = {name: value for name, value in forms.items() if value is not None}
    if len(forms) != 1:
        found = " and ".join(f"`{name}`" for name in forms) or "none"
        raise ValueError(f"Provide one of `prompt`, `messages` and `input_ids`, got {found}.")
    ((name, value),) = forms.items()
    if attention_mask is not None and name != "input_ids":
        raise ValueError(
            "`attention_mask` goes with `input_ids` only: prompts and messages are padded by the "
            "pipeline."
        )
    if tokenizer is None and name != "input_ids":
        raise ValueError(f"`{name}` needs a tokenizer: give `input_ids` instead.")
    opens_answer = flag("add_generation_prompt", add_generation_prompt)
    has_template = bool(getattr(tokenizer, "chat_template", None))
    templated = flag("use_chat_template", use_chat_template) and has_template and not infill
    if name == "input_ids":
        rows = _rows_of_ids(value, attention_mask, tokenizer, model, end_ids)
    elif name == "prompt" and not templated:
        rows = encode_as_written(name, _texts(value), tokenizer)
    else:
        kwargs = {} if chat_template_kwargs is None else chat_template_kwargs
        if not (isinstance(kwargs, Mapping) and all(isinstance(key, str) for key in kwargs)):
            raise TypeError(
                f"`chat_template_kwargs` must be a dict of arguments by name, got {shown(kwargs)}."
            )
        if name == "prompt":
            chats = [[{"role": "user", "content": text}] for text in _texts(value)]
        else:
            chats = _conversations(value)
            if not has_template:
                raise ValueError(
                    "`messages` needs a tokenizer with a chat template: give `prompt`."
                )
        may_spell = [model.config.mask_token_id] if infill else []
        template = {"add_generation_prompt": opens_answer, **kwargs}
        rows, faults = encode_chats(chats, tokenizer, may_spell, **template)
        for index, fault in faults.items():
            raise ValueError(f"`{name}` cannot be encoded: row {index} {fault}.")

    if not rows:
        raise ValueError(f"`{name}` must hold at least one row, got none.")
    rows = rows_of_ids(name, rows, model.config.vocab_size)
    if not infill:
        check_unmasked(name, rows, model.config.mask_token_id)
    ids = pad_sequence(rows, batch_first=True)
    return ids, pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)


def _texts(prompt: Any) -> list[str]:
    texts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"`prompt` must be a string or a list of strings, got {shown(prompt)}.")
    return texts


def _conversations(messages: Any) -> list[Conversation]:
    def is_chat(chat: Any) -> bool:
        return isinstance(chat, list) and all(isinstance(message, Mapping) for message in chat)

    chats = [messages] if is_chat(messages) and messages else messages
    if not isinstance(chats, list) or not all(is_chat(chat) for chat in chats):
        raise TypeError(
            "`messages` must be a list of messages such as {'role': 'user', 'content': '...'}, or "
            f"a list of such lists, got {shown(messages)}."
        )
    if not all(chats):
        raise ValueError("`messages` must hold at least one message per conversation.")
    return chats


def _rows_of_ids(
    input_ids: Any,
    attention_mask: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    model: CoupledBackbone,
    end_ids: Sequence[int],
) -> list[torch.Tensor]:
    """The tokens of each row, without padding."""
    rows = several(input_ids)
    if rows is None:
        raise TypeError(f"`input_ids` must be token ids, got {shown(input_ids)}.")
    if rows and all(several(row) is None for row in rows):
        rows = [rows]
        attention_mask = None if attention_mask is None else [attention_mask]
    rows = rows_of_ids("input_ids", rows, model.config.vocab_size)
    if attention_mask is None:
        pad = None if tokenizer is None else tokenizer.pad_token_id
        return model.unpadded(rows, pad_token_id=pad, end_ids=end_ids)
    masks = several(attention_mask)
    if masks is None or len(masks) != len(rows):
        raise ValueError(
            f"`attention_mask` must have one entry per row ({len(rows)}), got "
            f"{shown(attention_mask)}."
        )
    return [
        row[padding_mask("attention_mask", mask, row.shape).bool()]
        for row, mask in zip(rows, masks, strict=True)
    ]
