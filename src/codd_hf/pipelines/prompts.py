"""Prompts in all the forms that a pipeline takes, to padded token ids."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from ..checks.arguments import as_tensor, flag, padding_mask, rows_of_ids, several, shown
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
    chat_template_kwargs: dict[str, Any] | None = None,
    infill: bool = False,
    end_ids: Sequence[int] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts as token ids and mask, `[batch, length]` each; the arguments are the pipeline's.

    In a chat template a user's text is text: what spells a special token there is none, but for the
    mask token with `infill`. A prompt without a template may write special tokens, since nothing
    else does. `input_ids` without a mask are padded where the padding token stands, unless it is
    one of `end_ids`, which end texts.

    Raises:
        ValueError: not exactly one form is given, the tokenizer is missing, there is no row, or a
            prompt cannot be encoded.
        TypeError: an argument has none of the forms it may have.
    """
    forms = {"prompt": prompt, "messages": messages, "input_ids": input_ids}
    given = [name for name, value in forms.items() if value is not None]
    if len(given) != 1:
        found = " and ".join(f"`{name}`" for name in given) or "none"
        raise ValueError(f"Provide one of `prompt`, `messages` and `input_ids`, got {found}.")
    (name,) = given
    if attention_mask is not None and name != "input_ids":
        raise ValueError(f"`attention_mask` goes with `input_ids` only, got `{name}`.")
    has_template = bool(getattr(tokenizer, "chat_template", None))
    templated = flag("use_chat_template", use_chat_template) and has_template and not infill
    rows: Any
    if name == "input_ids":
        pad = None if tokenizer is None else tokenizer.pad_token_id
        rows = _rows_of_ids(model, input_ids, attention_mask, pad_token_id=pad, end_ids=end_ids)
    elif tokenizer is None or (name == "messages" and not has_template):
        raise ValueError(
            f"`{name}` needs a tokenizer{' with a chat template' * (name == 'messages')}: give "
            "`input_ids` instead."
        )
    elif name == "prompt" and not templated:
        rows = encode_as_written(name, _texts(prompt), tokenizer)
    else:
        if name == "prompt":
            messages = [[{"role": "user", "content": text}] for text in _texts(prompt)]
        kwargs = {} if chat_template_kwargs is None else chat_template_kwargs
        if not (isinstance(kwargs, Mapping) and all(isinstance(key, str) for key in kwargs)):
            raise TypeError(
                f"`chat_template_kwargs` must be a dict of arguments by name, got {shown(kwargs)}."
            )
        may_spell = [model.mask_token_id] if infill else []
        template = {"add_generation_prompt": True, **kwargs}
        rows, faults = encode_chats(_conversations(messages), tokenizer, may_spell, **template)
        for index, fault in faults.items():
            raise ValueError(f"`{name}` cannot be encoded: row {index} {fault}.")
    if not rows:
        raise ValueError(f"`{name}` must hold at least one row, got none.")
    rows = rows_of_ids(name, rows, model.config.vocab_size)
    ids = pad_sequence(rows, batch_first=True)
    return ids, pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)


def _texts(prompt: Any) -> list[str]:
    texts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"`prompt` must be a string or a list of strings, got {shown(prompt)}.")
    return texts


def _conversations(messages: Any) -> list[Conversation]:
    chats: Any = messages if isinstance(messages, list) else [None]
    if chats and isinstance(chats[0], Mapping):
        chats = [chats]
    for chat in chats:
        if not (isinstance(chat, list) and chat and all(isinstance(m, Mapping) for m in chat)):
            raise TypeError(
                "`messages` must be a list of messages such as {'role': 'user', 'content': "
                f"'...'}}, or a list of such lists, got {shown(messages)}."
            )
    return chats


def _rows_of_ids(
    model: CoupledBackbone, input_ids: Any, attention_mask: Any, **special: Any
) -> list[torch.Tensor]:
    """The tokens of each row, without padding."""
    rows = several(input_ids)
    if rows and all(several(row) is None for row in rows):
        rows = [rows]
    rows = rows_of_ids("input_ids", input_ids if rows is None else rows, model.config.vocab_size)
    if attention_mask is None:
        return model.unpadded(rows, **special)
    ids = as_tensor("input_ids", input_ids)
    mask = padding_mask("attention_mask", attention_mask, ids.shape, ids.device)
    return [row[real] for row, real in zip(rows, torch.atleast_2d(mask).bool(), strict=True)]
