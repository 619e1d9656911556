"""Users' text to tokens: what spells a special token in it is text.

Only chat templates, and the model's own ends, write special tokens. A text that spells one, such as
an article about `[MASK]`, is encoded as any other characters are. Where the tokenizer cannot do
that, or has no spelling for a character, the text is refused.
"""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Collection, Sequence
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from ..checks.errors import is_of_a_library, reason
from .chat_templates import render_chat

OPEN, CLOSE = "\ue0f0", "\ue0f1"
"""Around the number of a spelling that is set aside while a template is rendered: characters of the
private use area, which are set aside themselves where a text has them."""
HALF = "holds half of a surrogate pair"
AS_TEXT = {"split_special_tokens": True}


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The special tokens, of which none can come from a text; the unknown token can."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    ids = {number for number, token in added.items() if getattr(token, "special", False)}
    return (ids | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id}


def is_text(text: str) -> bool:
    """Whether it is Unicode text: half of a surrogate pair, such as half an emoji, is none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _spelling_pattern(
    tokenizer: PreTrainedTokenizerBase, may_spell: Collection[int] = ()
) -> re.Pattern:
    """Finds the spellings of special tokens in a text, but of some, and the marks for them."""
    names = tokenizer.convert_ids_to_tokens(sorted(special_token_ids(tokenizer) - set(may_spell)))
    names = sorted([*names, OPEN, CLOSE], key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)))


def encode_texts(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool = False
) -> tuple[list[list[int]], dict[int, str]]:
    """Token ids of texts, in which no special token comes from the text.

    Args:
        texts: the texts.
        tokenizer: the tokenizer.
        add_special_tokens: whether the tokenizer adds its own (beginning, end).

    Returns:
        The ids, and by their indices what is wrong with the texts that cannot be encoded so, as the
        end of a sentence.
    """
    faults = {i: HALF for i, text in enumerate(texts) if not is_text(text)}
    texts = ["" if i in faults else text for i, text in enumerate(texts)]
    options = {**AS_TEXT, "add_special_tokens": add_special_tokens}
    try:
        rows = _encode(tokenizer, texts, **options)
        bare = _encode(tokenizer, texts, **AS_TEXT) if add_special_tokens else rows
    except ValueError as error:  # the tokenizer does not say of which one
        if len(texts) == 1:
            return [[]], {0: str(error).removeprefix("a text ")}
        each = [encode_texts([t], tokenizer, add_special_tokens=add_special_tokens) for t in texts]
        told = {i: fault[0] for i, (_, fault) in enumerate(each) if fault}
        return [row for (row,), _ in each], told | faults
    special = special_token_ids(tokenizer)
    for i, ids in enumerate(bare):
        if read := special.intersection(ids):
            name = tokenizer.convert_ids_to_tokens(min(read))
            faults[i] = f"spells {name!r}, which the tokenizer cannot encode as text"
    return rows, faults


def encode_as_written(
    name: str,
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    add_special_tokens: bool = True,
) -> list[list[int]]:
    """Token ids of texts that may write special tokens, since nothing else does.

    Args:
        name: of the argument, for errors.
        texts: the texts.
        tokenizer: the tokenizer.
        add_special_tokens: whether the tokenizer adds its own (beginning, end).

    Raises:
        ValueError: a text cannot be encoded.
    """
    for row, text in enumerate(texts):
        if not is_text(text):
            raise ValueError(f"`{name}` cannot be encoded: row {row} {HALF}.")
    try:
        return _encode(tokenizer, texts, add_special_tokens)
    except ValueError as error:
        raise ValueError(f"`{name}`: {error}.") from error


def encode_chats(
    conversations: Sequence[Sequence[dict[str, Any]]],
    tokenizer: PreTrainedTokenizerBase,
    may_spell: Collection[int] = (),
    /,
    **template_kwargs: Any,
) -> tuple[list[list[int]], dict[int, str]]:
    """Token ids of conversations in the tokenizer's chat template.

    The special tokens are the template's own: the spelling of one in a message is text.

    Args:
        conversations: messages for the template; texts may stand anywhere in them.
        tokenizer: with a chat template.
        may_spell: special tokens that a text may write all the same.
        **template_kwargs: for the template (`add_generation_prompt`, ...).

    Returns:
        As `encode_texts`.
    """
    special = _spelling_pattern(tokenizer, may_spell)
    rows, faults = [], {}
    for i, messages in enumerate(conversations):
        try:
            rows.append(_encode_chat(messages, tokenizer, special, template_kwargs))
        except ValueError as error:
            rows.append([])
            faults[i] = str(error)
    return rows, faults


def _encode_chat(
    messages: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    special: re.Pattern,
    template_kwargs: dict[str, Any],
) -> list[int]:
    """One conversation: spellings are set aside while the template writes around them."""
    set_aside: list[str] = []

    def mark(found: re.Match) -> str:
        set_aside.append(found.group())
        return f"{OPEN}{len(set_aside) - 1}{CLOSE}"

    def marked(value: Any) -> Any:
        if isinstance(value, str):
            if not is_text(value):
                raise ValueError(HALF)
            return special.sub(mark, value)
        if isinstance(value, list):
            return [marked(part) for part in value]
        if isinstance(value, dict):
            return {name: marked(part) for name, part in value.items()}
        return value

    messages = [marked(message) for message in messages]
    try:
        rendered = render_chat(tokenizer, messages, **template_kwargs)
    except Exception as error:
        if not (is_of_a_library(error) or isinstance(error, ValueError | TypeError)):
            raise
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise ValueError(
            f"cannot be written in the chat template (roles {roles}: {reason(error)})"
        ) from error
    pieces = re.split(f"{OPEN}([0-9]+){CLOSE}", rendered)
    ids: list[list[int]] = [[]] * len(pieces)
    ids[::2] = _encode(tokenizer, pieces[::2])
    ids[1::2], faults = encode_texts([set_aside[int(i)] for i in pieces[1::2]], tokenizer)
    for fault in faults.values():
        raise ValueError(fault)
    return [token for piece in ids for token in piece]


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    add_special_tokens: bool = False,
    **options: Any,
) -> list[list[int]]:
    """Calls the tokenizer; raises a ValueError where it fails at a text."""
    if not texts:
        return []
    try:
        own = _unshared(tokenizer, **options)
        encoded = own(list(texts), add_special_tokens=add_special_tokens, **options)
    except BaseException as error:  # tokenizers' panics are no `Exception`
        if not is_of_a_library(error):
            raise
        raise ValueError(f"a text cannot be encoded by the tokenizer ({reason(error)})") from error
    return [list(ids) for ids in encoded["input_ids"]]


_copies: WeakKeyDictionary = WeakKeyDictionary()
_copying = Lock()


def _unshared(tokenizer: PreTrainedTokenizerBase, **options: Any) -> PreTrainedTokenizerBase:
    """A copy of a fast tokenizer that is always called with the same options.

    Padding, truncation and whether special tokens are split are states of a fast tokenizer, which
    every call sets: texts would come out padded or cut where other threads call it meanwhile. A
    copy is made anew when the user's tokenizer was changed.
    """
    if not getattr(tokenizer, "is_fast", False):
        return tokenizer
    backend = tokenizer.backend_tokenizer
    steps = (backend.normalizer, backend.pre_tokenizer, backend.post_processor)
    state = (len(tokenizer), *(pickle.dumps(step) for step in steps))
    with _copying:
        copies = _copies.setdefault(tokenizer, {})
        found, own = copies.get(bool(options), (None, None))
        if found != state:
            own = copy.deepcopy(tokenizer)
            own("", **options)  # sets its states, before several threads call it
            copies[bool(options)] = state, own
        return own
