"""Half of a surrogate pair, such as half an emoji, is no text, and every door says so."""

from __future__ import annotations

import pytest

from tiny_pipeline import tiny_pipeline

HALF = "Tom \ud83d has"
SHORT = {"gen_length": 4, "block_length": 4, "num_inference_steps": 1}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


DOORS = {
    "a prompt": lambda pipe: pipe(HALF, **SHORT),
    "a prompt without a template": lambda pipe: pipe(HALF, use_chat_template=False, **SHORT),
    "a template to fill in": lambda pipe: pipe(HALF, infill=True, **SHORT),
    "a message": lambda pipe: pipe(messages=[{"role": "user", "content": HALF}], **SHORT),
    "a scored prompt": lambda pipe: pipe.model.score([HALF], ["b"], tokenizer=pipe.tokenizer),
    "a scored answer": lambda pipe: pipe.model.score(["a"], [HALF], tokenizer=pipe.tokenizer),
}


def test_half_a_character_is_refused_in_a_sentence_that_names_argument_and_row(pipe):
    for door in DOORS.values():
        with pytest.raises(ValueError, match=r"`\w+` cannot be encoded: row 0 holds half of a"):
            door(pipe)
    with pytest.raises(ValueError, match=r"`prompt` cannot be encoded: row 1 holds"):
        pipe(["Tom has", HALF], use_chat_template=False, **SHORT)


def test_what_a_tokenizer_cannot_encode_is_one_sentence():
    pipe = tiny_pipeline()
    pipe.tokenizer.model_max_length = "many"
    with pytest.raises(ValueError, match=r"`prompt`.* row 0 cannot be encoded by the tokenizer"):
        pipe("Tom has", **SHORT)
