"""Promises of the data path: files to examples, examples to canvases, canvases to batches."""

from __future__ import annotations

import json
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from codd_hf.data.canvases import TokenizedExample, batch_indices, collate, tokenize_examples
from codd_hf.data.sources import Example, load_examples
from codd_hf.data.tokenizers import train_tokenizer
from codd_hf.training.inputs import split_examples
from tiny import SENTENCES

ROWS = [{"question": "2 + 2?", "answer": "4 <<2+2=4>>!"}, {"question": "3 + 4?", "answer": "7"}]


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write_jsonl(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_questions_and_answers_are_found_by_their_usual_names(suffix, tmp_path):
    path = tmp_path / f"data.{suffix}"
    if suffix == "jsonl":
        write_jsonl(path, ROWS)
    else:
        Dataset.from_list(ROWS).to_parquet(path)
    assert load_examples(str(path)) == [Example(r["question"], r["answer"]) for r in ROWS]
    source = write_jsonl(tmp_path / "a.jsonl", [{"id": 1, "prompt": "a", "completion": "b"}])
    assert load_examples(source) == [Example("a", "b")]


def test_plain_text_is_one_example_a_line_without_prompts_and_without_empty_lines(tmp_path):
    (tmp_path / "a.txt").write_text("one line\n\nanother line\n")
    examples = load_examples(str(tmp_path / "a.txt"))
    assert examples == [Example("", "one line"), Example("", "another line")]


def test_named_columns_are_used(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"q": "x", "a": "y", "answer": "no"}])
    assert load_examples(source, prompt_column="q", answer_column="a") == [Example("x", "y")]


def test_source_without_the_columns_or_a_text_is_an_error_that_names_them(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.jsonl"):
        load_examples(str(tmp_path / "missing.jsonl"))
    source = write_jsonl(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"`answer_column` must be .*'question'.*got 'reply'"):
        load_examples(source, answer_column="reply")
    with pytest.raises(ValueError, match=r"`prompt_column` must be .*'question'.* got 'query'"):
        load_examples(source, prompt_column="query")
    source = write_jsonl(tmp_path / "a.jsonl", [{"body": "x"}])
    with pytest.raises(ValueError, match=r"`answer_column` must be .*\['body'\]"):
        load_examples(source)
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "  "}])
    with pytest.raises(ValueError, match="has no text in column 'text'"):
        load_examples(source)


def test_removed_pattern_is_gone_from_prompts_and_answers(tmp_path):
    rows = [{"question": "a <<1>>?", "answer": "b <<2>>c"}]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    assert load_examples(source, remove_pattern="<<.*?>>") == [Example("a ?", "b c")]


def test_last_examples_are_held_out_and_test_comes_after_validation():
    train, validation, test = split_examples(list(range(10)), 2, 3)
    assert (train, validation, test) == ([0, 1, 2, 3, 4], [5, 6], [7, 8, 9])
    for sizes in ((0, 1), (5, 5), (1, -1)):
        with pytest.raises(ValueError, match="`num_validation`"):
            split_examples(list(range(10)), *sizes)


def test_prompts_stand_in_the_chat_template_and_answers_end_with_end_of_text(tiny_tokenizer):
    (example,) = tokenize_examples([Example("Tom?", "3 eggs")], tiny_tokenizer)
    text = tiny_tokenizer.decode(example.prompt_ids)
    assert text == "<|user|>Tom?<|assistant|>"
    assert tiny_tokenizer.decode(example.answer_ids) == "3 eggs<|end|>"
    (bare,) = tokenize_examples([Example("", "3 eggs")], tiny_tokenizer)
    assert bare.prompt_ids == []


def test_long_answers_are_cut_and_too_long_prompts_left_out_as_is_said(tiny_tokenizer, capsys):
    short, long = Example("Tom?", "3 eggs"), Example("Tom?", "3 eggs and more of them " * 10)
    whole, uncut = tokenize_examples([short, long], tiny_tokenizer, max_length=1000)
    length = len(whole.prompt_ids) + len(whole.answer_ids)
    assert tokenize_examples([short], tiny_tokenizer, max_length=length) == [whole]
    assert capsys.readouterr().out == ""
    found = tokenize_examples([short, long, Example("Tom? " * 30, "3")], tiny_tokenizer, length)
    assert found[0] == whole
    assert found[1].answer_ids == uncut.answer_ids[: length - len(whole.prompt_ids)]
    said = " ".join(capsys.readouterr().out.split())
    assert f"Rows left out: 3: a prompt that fills `max_length` ({length} tokens)." in said
    assert "Of 3 examples, 1 lose the end of their answer to `max_length` (" in said
    (cut,) = tokenize_examples([short], tiny_tokenizer, max_length=length - 1)
    assert cut.answer_ids == whole.answer_ids[:-1]
    with pytest.raises(
        ValueError, match=r"(?s)Nothing is left .*: 1, 2: a prompt .*`max_length` \(3 "
    ):
        tokenize_examples([Example("Tom? " * 5, "3")] * 2, tiny_tokenizer, max_length=3)


def test_text_without_a_prompt_begins_as_the_tokenizer_begins_texts():
    words = Tokenizer(WordLevel({"[CLS]": 0, "[SEP]": 1, "a": 2, "b": 3}))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="[SEP]")
    examples = [Example("", "a b"), Example("a", "b")]
    found = [(e.prompt_ids, e.answer_ids) for e in tokenize_examples(examples, tokenizer)]
    assert found == [([0], [2, 3, 1]), ([0, 2, 1], [3, 1])]


@pytest.mark.parametrize("max_length", [1, 32, 10_000])
def test_packed_pieces_are_the_texts_with_end_of_text_after_each(max_length, tiny_tokenizer):
    texts = [" ".join(SENTENCES[: i % 3 + 1]) for i in range(12)]
    pieces = tokenize_examples(
        [Example("", text) for text in texts], tiny_tokenizer, max_length, packing=True
    )
    joined = [token for piece in pieces for token in piece.answer_ids]
    assert tiny_tokenizer.decode(joined) == "".join(f"{text}<|end|>" for text in texts)
    assert all(len(piece.answer_ids) == max_length for piece in pieces[:-1])
    assert 0 < len(pieces[-1].answer_ids) <= max_length
    assert not any(piece.prompt_ids for piece in pieces)


def test_packing_of_anything_with_a_prompt_is_an_error(tiny_tokenizer):
    for example in (Example("Tom?", "3"), Example("", "3", (("system", "Count."),))):
        with pytest.raises(ValueError, match="`packing` is for plain text"):
            tokenize_examples([Example("", "a"), example], tiny_tokenizer, packing=True)


def test_tokenizer_spells_any_text_and_cuts_numbers_into_pairs_of_digits(tiny_tokenizer):
    text = "Zoë paid 1234 €.\n"
    assert tiny_tokenizer.decode(tiny_tokenizer(text)["input_ids"]) == text
    numbers = train_tokenizer(["12 34 12 34"], 300)
    spelt = [numbers.decode(i) for i in numbers(" 12345 12")["input_ids"]]
    assert spelt == [" ", "12", "34", "5", " ", "12"]
    with pytest.raises(ValueError, match="`vocab_size` must be at least 261"):
        train_tokenizer(["a"], vocab_size=100)
    tokenizer = train_tokenizer(["a b c"], 300)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="`eos_token`"):
        tokenize_examples([Example("a", "b")], tokenizer)


def test_answers_are_filled_with_end_of_text_to_whole_windows_and_rows_with_padding():
    examples = [TokenizedExample([7, 8], [9, 10, 11, 1]), TokenizedExample([], [12, 1])]
    tokenizer = SimpleNamespace(eos_token_id=1, pad_token_id=0)
    canvas = collate(examples, tokenizer, 3)
    assert canvas.input_ids.tolist() == [[7, 8, 9, 10, 11, 1, 1, 1], [12, 1, 1, 0, 0, 0, 0, 0]]
    assert canvas.attention_mask.tolist() == [[1] * 8, [1, 1, 1, 0, 0, 0, 0, 0]]
    assert canvas.answer_start.tolist() == [2, 0]
    assert canvas.answer_end.tolist() == [8, 3]
    canvas = collate(examples, tokenizer, 3, extra_windows=[0, 2])
    assert canvas.input_ids[1].tolist() == [12, *[1] * 8]
    assert canvas.answer_end.tolist() == [8, 9]


LENGTHS = torch.randint(3, 30, (50,), generator=torch.Generator().manual_seed(0)).tolist()


def batches(number: int, **changes) -> list[list[int]]:
    arguments = {"lengths": LENGTHS, "tokens_per_batch": 64, "seed": 0} | changes
    return list(islice(batch_indices(**arguments), number))


def test_batches_are_a_function_of_the_seed_and_go_on_where_a_run_stopped():
    assert batches(40) != batches(40, seed=1)
    for first in (1, 33):
        assert batches(20, first_batch=first) == batches(20 + first)[first:]


def test_every_epoch_covers_every_example_once_in_a_new_order():
    drawn = batches(200)
    epochs, seen = [], []
    for batch in drawn:
        seen += batch
        if len(seen) == len(LENGTHS):
            epochs.append(seen)
            seen = []
    assert len(epochs) > 3
    assert all(sorted(epoch) == list(range(len(LENGTHS))) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_padded_batches_stay_within_the_budget_of_tokens_or_are_one_example():
    for batch in batches(40):
        assert len(batch) * max(LENGTHS[i] for i in batch) <= 64
    assert sorted(batches(2, lengths=[100, 5])) == [[0], [1]]
