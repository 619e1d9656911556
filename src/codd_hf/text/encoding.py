"""Users' text to tokens: a special token that is spelt in it is text.

Only chat templates, and the model's own ends, write special tokens. A text that spells one, such as
an article about `[MASK]`, is encoded as any other characters are. Where the tokenizer cannot do
that, or has no spelling for a character, the text is refused.

Functions return the ids of all texts and, by index, the faults of those that cannot be encoded:
each is the end of a sentence.
"""

import copy
import pickle
import re
from collections.abc import Collection, Sequence
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from ..checks.errors import is_of_a_library, reason

OPEN, CLOSE = "\ue0f0", "\ue0f1"
"""Private characters around the number of a spelling that a template must not see."""
AS_TEXT = {"split_special_tokens": True}
Encoded = tuple[list[list[int]], dict[int, str]]


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


def encode_texts(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool = False
) -> Encoded:
    """Token ids of texts; the tokenizer may add special tokens around one, none come from it."""
    rows, faults = _encode(texts, tokenizer, add_special_tokens, **AS_TEXT)
    bare = _encode(texts, tokenizer, **AS_TEXT)[0] if add_special_tokens else rows
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
    """Token ids of an argument whose texts may write special tokens, since nothing else does."""
    rows, faults = _encode(texts, tokenizer, add_special_tokens)
    for row, fault in faults.items():
        raise ValueError(f"`{name}` cannot be encoded: row {row} {fault}.")
    return rows


def encode_chats(
    conversations: Sequence[Sequence[dict[str, Any]]],
    tokenizer: PreTrainedTokenizerBase,
    may_spell: Collection[int] = (),
    /,
    **template_kwargs: Any,
) -> Encoded:
    """Token ids of conversations in the tokenizer's chat template, which writes special tokens.

    Args:
        conversations: messages for the template; texts may stand anywhere in them.
        tokenizer: with a chat template.
        may_spell: special tokens that a text may write all the same.
        **template_kwargs: for the template (`add_generation_prompt`, ...).
    """
    special = special_token_ids(tokenizer) - set(may_spell)
    names = [*tokenizer.convert_ids_to_tokens(sorted(special)), OPEN, CLOSE]
    spelling = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))
    rows, faults = [], {}
    for i, messages in enumerate(conversations):
        try:
            rows.append(_encode_chat(messages, tokenizer, spelling, template_kwargs))
        except ValueError as error:
            rows.append([])
            faults[i] = str(error)
    return rows, faults


def _encode_chat(
    messages: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    spelling: re.Pattern[str],
    template_kwargs: dict[str, Any],
) -> list[int]:
    """One conversation: spellings are set aside while the template writes around them."""
    set_aside: list[str] = []

    def mark(found: re.Match[str]) -> str:
        set_aside.append(found.group())
        return f"{OPEN}{len(set_aside) - 1}{CLOSE}"

    def marked(value: Any) -> Any:
        if isinstance(value, str):
            return spelling.sub(mark, value)
        if isinstance(value, list):
            return [marked(part) for part in value]
        if isinstance(value, dict):
            return {name: marked(part) for name, part in value.items()}
        return value

    messages = [marked(message) for message in messages]
    try:
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, **template_kwargs)
    except Exception as error:  # of many types: a template is a program
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise ValueError(
            f"cannot be written in the chat template (roles {roles}: {reason(error)})"
        ) from error
    pieces = re.split(f"{OPEN}([0-9]+){CLOSE}", str(rendered))
    written, faults = _encode(pieces[::2], tokenizer)
    spelt, more = encode_texts([set_aside[int(i)] for i in pieces[1::2]], tokenizer)
    for fault in (*faults.values(), *more.values()):
        raise ValueError(fault)
    ids: list[list[int]] = [[]] * len(pieces)
    ids[::2], ids[1::2] = written, spelt
    return [token for piece in ids for token in piece]


def _encode(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    add_special_tokens: bool = False,
    **options: Any,
) -> Encoded:
    """Calls the tokenizer: for all texts, or for each where it fails at one of them."""
    if not texts:
        return [], {}
    fault = "holds half of a surrogate pair"
    if all(map(is_text, texts)):
        try:
            own = _unshared(tokenizer, **options)
            encoded = own(list(texts), add_special_tokens=add_special_tokens, **options)
            return [list(ids) for ids in encoded["input_ids"]], {}
        except BaseException as error:  # tokenizers' panics are no `Exception`
            if not is_of_a_library(error):
                raise
            fault = f"cannot be encoded by the tokenizer ({reason(error)})"
    if len(texts) == 1:
        return [[]], {0: fault}
    alone = [_encode([text], tokenizer, add_special_tokens, **options) for text in texts]
    return [row for (row,), _ in alone], {i: bad[0] for i, (_, bad) in enumerate(alone) if bad}


_copies: WeakKeyDictionary[PreTrainedTokenizerBase, dict[bool, Any]] = WeakKeyDictionary()
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
    state = (len(tokenizer), *map(pickle.dumps, steps))
    with _copying:
        copies = _copies.setdefault(tokenizer, {})
        found, own = copies.get(bool(options), (None, None))
        if found != state:
            own = copy.deepcopy(tokenizer)
            own("", **options)  # sets its states, before several threads call it
            copies[bool(options)] = state, own
        return own
