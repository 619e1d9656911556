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
from .chat_templates import bounded_templates

OPEN, CLOSE = "\ue0f0", "\ue0f1"
"""Around the number of a spelling that is set aside while a template is rendered: characters of the
private use area, which are set aside themselves where a text has them."""


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


_copies: WeakKeyDictionary = WeakKeyDictionary()
_copying = Lock()


def unshared(tokenizer: PreTrainedTokenizerBase, **options: Any) -> PreTrainedTokenizerBase:
    """A copy of a fast tokenizer that is always called alike, kept as long as the tokenizer.

    Padding, truncation and whether special tokens are split are states of a fast tokenizer, which
    every call sets: texts would come out padded or cut where other threads call it meanwhile.

    Args:
        tokenizer: of the user; what is changed about it afterwards counts as well.
        **options: of all calls of the copy.
    """
    if not getattr(tokenizer, "is_fast", False):
        return tokenizer
    backend = tokenizer.backend_tokenizer
    steps = (backend.normalizer, backend.pre_tokenizer, backend.post_processor)
    state = (len(tokenizer), *(pickle.dumps(step) for step in steps))
    key = tuple(sorted(options.items()))
    with _copying:
        kept = _copies.setdefault(tokenizer, {})
        if key not in kept or kept[key][0] != state:
            own = copy.deepcopy(tokenizer)
            own("", **options)  # sets its states, before several threads call it
            kept[key] = (state, own)
        return kept[key][1]


def spelling_pattern(
    tokenizer: PreTrainedTokenizerBase, may_spell: Collection[int] = ()
) -> re.Pattern:
    """Finds what spells a special token in a text, and the marks that stand for it meanwhile.

    Args:
        tokenizer: the tokenizer.
        may_spell: special tokens that are not looked for.
    """
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
        The ids, and what is wrong with the texts that cannot be encoded so, by their indices, as
        the end of a sentence.
    """
    faults = {i: "holds half of a surrogate pair" for i, t in enumerate(texts) if not is_text(t)}
    given = dict(enumerate("" if i in faults else text for i, text in enumerate(texts)))
    special = special_token_ids(tokenizer)
    rows = bare = _encoded_by_index(tokenizer, given, faults)
    if add_special_tokens:
        rows = _encoded_by_index(tokenizer, given, faults, add_special_tokens=True)
    spelling = {i: given[i] for i, ids in bare.items() if not special.isdisjoint(ids)}
    if spelling:
        split = {"split_special_tokens": True}
        bare = _encoded_by_index(tokenizer, spelling, faults, **split)
        split["add_special_tokens"] = add_special_tokens
        rows |= _encoded_by_index(tokenizer, spelling, faults, **split)
        for i, ids in bare.items():
            if read := special.intersection(ids):
                name = tokenizer.convert_ids_to_tokens(min(read))
                faults[i] = f"spells {name!r}, which the tokenizer cannot encode as text"
    return list(rows.values()), faults


def _encoded_by_index(
    tokenizer: PreTrainedTokenizerBase,
    texts: dict[int, str],
    faults: dict[int, str],
    **options: Any,
) -> dict[int, list[int]]:
    """Token ids by index; what is wrong with a text that has none goes to `faults`."""
    try:
        return dict(zip(texts, _encoded(tokenizer, list(texts.values()), **options), strict=True))
    except ValueError:  # the tokenizer does not say of which one
        rows = {}
        for i, text in texts.items():
            try:
                (rows[i],) = _encoded(tokenizer, [text], **options)
            except ValueError as error:
                rows[i], faults[i] = [], str(error).removeprefix("a text ")
        return rows


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
            raise ValueError(
                f"`{name}` cannot be encoded: row {row} holds half of a surrogate pair."
            )
    try:
        return _encoded(tokenizer, texts, add_special_tokens=add_special_tokens)
    except ValueError as error:
        raise ValueError(f"`{name}`: {error}.") from error


def encode_chats(
    conversations: Sequence[Sequence[dict[str, Any]]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    may_spell: Collection[int] = (),
    **template_kwargs: Any,
) -> tuple[list[list[int]], dict[int, str]]:
    """Token ids of conversations in the tokenizer's chat template.

    The special tokens are the template's own: what spells one in a message is text.

    Args:
        conversations: messages for the template; texts may stand anywhere in them.
        tokenizer: with a chat template.
        may_spell: special tokens that a text may write all the same.
        **template_kwargs: for the template (`add_generation_prompt`, ...).

    Returns:
        As `encode_texts`.
    """
    special = spelling_pattern(tokenizer, may_spell)
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
                raise ValueError("holds half of a surrogate pair")
            return special.sub(mark, value)
        if isinstance(value, list):
            return [marked(part) for part in value]
        if isinstance(value, dict):
            return {name: marked(part) for name, part in value.items()}
        return value

    messages = [marked(message) for message in messages]
    try:
        with bounded_templates():
            rendered = tokenizer.apply_chat_template(messages, tokenize=False, **template_kwargs)
    except BaseException as error:  # a template may do anything, call itself without end as well
        if not (is_of_a_library(error) or isinstance(error, RecursionError)):
            raise
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise ValueError(
            f"cannot be written in the chat template (roles {roles}: {reason(error)})"
        ) from error
    pieces = re.split(f"{OPEN}([0-9]+){CLOSE}", rendered)
    ids: list[list[int]] = [[]] * len(pieces)
    ids[::2] = _encoded(tokenizer, pieces[::2])
    ids[1::2], faults = encode_texts([set_aside[int(i)] for i in pieces[1::2]], tokenizer)
    for fault in faults.values():
        raise ValueError(fault)
    return [token for piece in ids for token in piece]


def _encoded(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    add_special_tokens: bool = False,
    **options: Any,
) -> list[list[int]]:
    if not texts:
        return []
    try:
        own = unshared(tokenizer, **options)
        encoded = own(list(texts), add_special_tokens=add_special_tokens, **options)
    except BaseException as error:  # tokenizers' panics are no `Exception`
        if not is_of_a_library(error):
            raise
        raise ValueError(f"a text cannot be encoded by the tokenizer ({reason(error)})") from error
    return [list(ids) for ids in encoded["input_ids"]]
