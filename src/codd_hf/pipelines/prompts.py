"""Prompts in all the forms that a pipeline takes, to padded token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from ..checks.arguments import check_unmasked, padding_mask, rows_of_ids, several, shown
from ..text.encoding import encode_as_written, encode_chats

if TYPE_CHECKING:
    from ..modeling_codd import CoDDModel

Conversation = list[dict[str, str]]


def check_prompts(
    prompt: str | list[str] | None,
    messages: Conversation | list[Conversation] | None,
    input_ids: torch.Tensor | list[int] | list[list[int]] | None,
    attention_mask: torch.Tensor | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """Checks the form of the prompts; their tokens are checked when they are encoded.

    Raises:
        ValueError: not exactly one form is given, or the tokenizer is missing.
        TypeError: an argument has none of the forms it may have.
    """
    given = [
        name
        for name, value in (("prompt", prompt), ("messages", messages), ("input_ids", input_ids))
        if value is not None
    ]
    if len(given) != 1:
        found = " and ".join(f"`{name}`" for name in given) or "none"
        raise ValueError(f"Provide one of `prompt`, `messages` and `input_ids`, got {found}.")
    if attention_mask is not None and input_ids is None:
        raise ValueError(
            "`attention_mask` goes with `input_ids` only: prompts and messages are padded by the "
            "pipeline."
        )
    if input_ids is None and tokenizer is None:
        raise ValueError(f"`{given[0]}` needs a tokenizer: give `input_ids` instead.")
    if prompt is not None:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, list) or not all(isinstance(text, str) for text in prompts):
            raise TypeError(f"`prompt` must be a string or a list of strings, got {shown(prompt)}.")
        if not prompts:
            raise ValueError("`prompt` must hold at least one string, got an empty list.")
    if messages is not None:
        talks = [messages] if isinstance(messages, list) and _is_talk(messages[:1]) else messages
        if not isinstance(talks, list) or not all(_is_talk(talk) for talk in talks):
            raise TypeError(
                "`messages` must be a list of messages such as {'role': 'user', 'content': '...'}, "
                f"or a list of such lists, got {shown(messages)}."
            )
        if not talks or not all(talks):
            raise ValueError("`messages` must hold at least one message per conversation.")
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("`messages` needs a tokenizer with a chat template: give `prompt`.")


def _is_talk(talk: Any) -> bool:
    return isinstance(talk, list) and all(isinstance(message, Mapping) for message in talk)


def encode_prompts(
    prompt: str | list[str] | None,
    messages: Conversation | list[Conversation] | None,
    input_ids: torch.Tensor | list[int] | list[list[int]] | None,
    attention_mask: torch.Tensor | None,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    model: CoDDModel,
    use_chat_template: bool,
    add_generation_prompt: bool,
    chat_template_kwargs: dict[str, Any],
    infill: bool = False,
    end_ids: Sequence[int] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts as token ids.

    In a chat template a user's text is text: what spells a special token there is none. A prompt
    without a template may write special tokens, since nothing else does.

    Args:
        prompt: one text or several.
        messages: one conversation or several.
        input_ids: ids, padded where `attention_mask` is 0, or rows of any lengths. Without a mask
            padding tokens are padding, unless they end texts too.
        attention_mask: of the shape of `input_ids`.
        tokenizer: for prompts and messages, and for its padding token.
        model: says which tokens there are.
        use_chat_template: whether a prompt becomes a user's message.
        add_generation_prompt: whether the template opens the answer.
        chat_template_kwargs: for the template.
        infill: whether mask tokens among the tokens are to be filled in; a `prompt` is then taken
            as it is, without a chat template.
        end_ids: tokens that end a text.

    Returns:
        `input_ids` and `attention_mask`, both `[batch, length]`, padded on the right.

    Raises:
        ValueError: there is no row, or a prompt has a token that the model has not, or the mask
            token where nothing is to be filled in.
    """
    if input_ids is not None:
        rows = _rows_of_ids(input_ids, attention_mask, tokenizer, model, end_ids)
    else:
        if prompt is not None:
            prompts = [prompt] if isinstance(prompt, str) else prompt
            conversations = [[{"role": "user", "content": text}] for text in prompts]
            has_template = bool(getattr(tokenizer, "chat_template", None))
            templated = use_chat_template and has_template and not infill
        else:
            conversations = [messages] if isinstance(messages[0], Mapping) else messages
            templated = True
        if templated:
            rows, faults = encode_chats(
                conversations,
                tokenizer,
                may_spell=[model.config.mask_token_id] if infill else [],
                add_generation_prompt=add_generation_prompt,
                **chat_template_kwargs,
            )
            for index, fault in faults.items():
                name = "prompt" if prompt is not None else "messages"
                raise ValueError(f"`{name}` cannot be encoded: row {index} {fault}.")
        else:
            rows = encode_as_written("prompt", prompts, tokenizer)

    name = "input_ids" if input_ids is not None else "prompt" if prompt is not None else "messages"
    if not rows:
        raise ValueError(f"`{name}` must hold at least one row, got none.")
    rows = rows_of_ids(name, rows, model.config.vocab_size)
    if not infill:
        check_unmasked(name, rows, model.config.mask_token_id)
    ids = pad_sequence(rows, batch_first=True)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return ids, mask


def _rows_of_ids(
    input_ids: Any,
    attention_mask: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    model: CoDDModel,
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
