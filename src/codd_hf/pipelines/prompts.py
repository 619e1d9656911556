"""Prompts in all the forms that a pipeline takes, to padded token ids."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..training.encoding import encode_chats

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
        ValueError: not exactly one form is given, a prompt is empty, or the tokenizer is missing.
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
    if attention_mask is not None and not isinstance(input_ids, torch.Tensor):
        raise ValueError(
            "`attention_mask` goes with a tensor of `input_ids` only: prompts, messages and lists "
            "are padded by the pipeline."
        )
    if input_ids is None and tokenizer is None:
        raise ValueError(f"`{given[0]}` needs a tokenizer: give `input_ids` instead.")
    if prompt is not None:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, list) or not all(isinstance(text, str) for text in prompts):
            raise TypeError(f"`prompt` must be a string or a list of strings, got {prompt!r}.")
        if not prompts:
            raise ValueError("`prompt` must hold at least one string, got an empty list.")
        for index, text in enumerate(prompts):
            if not text:
                where = f" at index {index}" if isinstance(prompt, list) else ""
                raise ValueError(f"`prompt` must not be empty, got an empty string{where}.")
    if messages is not None:
        if not isinstance(messages, list) or not messages or not all(messages):
            raise ValueError("`messages` must hold at least one message per conversation.")
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("`messages` needs a tokenizer with a chat template: give `prompt`.")
    if isinstance(input_ids, torch.Tensor):
        if input_ids.ndim not in (1, 2):
            raise ValueError(
                f"`input_ids` must be one- or two-dimensional, got shape {tuple(input_ids.shape)}."
            )
        if input_ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"`input_ids` must be integers, got {input_ids.dtype}.")
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"`attention_mask` must have the shape of `input_ids`, {tuple(input_ids.shape)}, "
                f"got {tuple(attention_mask.shape)}."
            )


def encode_prompts(
    prompt: str | list[str] | None,
    messages: Conversation | list[Conversation] | None,
    input_ids: torch.Tensor | list[int] | list[list[int]] | None,
    attention_mask: torch.Tensor | None,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int,
    mask_token_id: int,
    use_chat_template: bool,
    add_generation_prompt: bool,
    chat_template_kwargs: dict[str, Any],
    infill: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts as token ids.

    In a chat template a user's text is text: what spells a special token there is none. A prompt
    without a template may write special tokens, since nothing else does.

    Args:
        prompt: one text or several.
        messages: one conversation or several.
        input_ids: ids, padded where `attention_mask` is 0, or lists of any lengths.
        attention_mask: of the shape of a tensor of `input_ids`.
        tokenizer: for prompts and messages.
        vocab_size: of the model.
        mask_token_id: of the model; only what is to be filled in can hold it.
        use_chat_template: whether a prompt becomes a user's message.
        add_generation_prompt: whether the template opens the answer.
        chat_template_kwargs: for the template.
        infill: whether mask tokens among the tokens are to be filled in; a `prompt` is then taken
            as it is, without a chat template.

    Returns:
        `input_ids` and `attention_mask`, both `[batch, length]`, padded on the right.

    Raises:
        ValueError: a prompt has no tokens, or one that the model has not.
    """
    if input_ids is not None:
        rows = _rows_of_ids(input_ids, attention_mask)
    else:
        if prompt is not None:
            prompts = [prompt] if isinstance(prompt, str) else prompt
            conversations = [[{"role": "user", "content": text}] for text in prompts]
            has_template = bool(getattr(tokenizer, "chat_template", None))
            templated = use_chat_template and has_template and not infill
        else:
            conversations = [messages] if isinstance(messages[0], dict) else messages
            templated = True
        if templated:
            rows, faults = encode_chats(
                conversations,
                tokenizer,
                may_spell=[mask_token_id] if infill else [],
                add_generation_prompt=add_generation_prompt,
                **chat_template_kwargs,
            )
            for index, fault in faults.items():
                name = "prompt" if prompt is not None else "messages"
                raise ValueError(f"`{name}` cannot be encoded: row {index} {fault}.")
        else:
            rows = [tokenizer(text)["input_ids"] for text in prompts]

    name = "input_ids" if input_ids is not None else "prompt" if prompt is not None else "messages"
    if not rows:
        raise ValueError(f"`{name}` must hold at least one row, got none.")
    for index, row in enumerate(rows):
        if not row:
            raise ValueError(f"`{name}` must not be empty, got no tokens in row {index}.")
        outside = [token for token in row if not 0 <= token < vocab_size]
        if outside:
            raise ValueError(
                f"`{name}` must hold ids of the model's vocabulary, 0 to {vocab_size - 1}, got "
                f"{outside[0]} in row {index}."
            )
        if mask_token_id in row and not infill:
            raise ValueError(
                f"`{name}` must not hold the mask token ({mask_token_id}), got it in row {index}: "
                "leave it out, `gen_length` mask tokens follow each prompt, or say `infill=True`."
            )
    longest = max(len(row) for row in rows)
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids, mask


def _rows_of_ids(
    input_ids: torch.Tensor | list[int] | list[list[int]], attention_mask: torch.Tensor | None
) -> list[list[int]]:
    """The tokens of each row, without padding."""
    if isinstance(input_ids, torch.Tensor):
        ids = torch.atleast_2d(input_ids).tolist()
        if attention_mask is None:
            return ids
        kept = torch.atleast_2d(attention_mask).bool().tolist()
        return [
            [token for token, keep in zip(row, keeps, strict=True) if keep]
            for row, keeps in zip(ids, kept, strict=True)
        ]
    if all(isinstance(token, int) for token in input_ids):
        return [list(input_ids)]
    return [list(row) for row in input_ids]
