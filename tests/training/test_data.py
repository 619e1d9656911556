"""Promises of the data path: files to examples, examples to canvases, canvases to batches."""

from __future__ import annotations

import json
from itertools import islice

import pytest
import torch
from datasets import Dataset

from codd_hf.data.canvases import (
    Example,
    TokenizedExample,
    batch_indices,
    collate,
    load_examples,
    tokenize_examples,
)
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


def test_prompts_and_completions_are_found_by_their_usual_names(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"id": 1, "prompt": "a", "completion": "b"}])
    assert load_examples(source) == [Example("a", "b")]


def test_plain_text_is_one_example_a_line_without_prompts_and_without_empty_lines(tmp_path):
    (tmp_path / "a.txt").write_text("one line\n\nanother line\n")
    examples = load_examples(str(tmp_path / "a.txt"))
    assert examples == [Example("", "one line"), Example("", "another line")]


def test_named_columns_are_used(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"q": "x", "a": "y", "answer": "no"}])
    assert load_examples(source, prompt_column="q", answer_column="a") == [Example("x", "y")]


def test_column_that_is_not_there_is_an_error_that_lists_the_columns(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"`answer_column` is 'reply', but .*'question'"):
        load_examples(source, answer_column="reply")
    with pytest.raises(ValueError, match=r"`prompt_column` is 'query', but .*'question'"):
        load_examples(source, prompt_column="query")


def test_columns_of_unusual_names_are_an_error_that_says_what_to_give(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"body": "x"}])
    with pytest.raises(ValueError, match=r"`answer_column` must be given.*\['body'\]"):
        load_examples(source)


def test_missing_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*missing\.jsonl"):
        load_examples(str(tmp_path / "missing.jsonl"))


def test_file_without_text_is_an_error_that_names_the_column(tmp_path):
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


@pytest.mark.parametrize("sizes", [(0, 1), (5, 5), (1, -1)])
def test_held_out_part_that_is_empty_or_everything_is_an_error(sizes):
    with pytest.raises(ValueError, match="`num_validation`"):
        split_examples(list(range(10)), *sizes)


def test_prompts_stand_in_the_chat_template_and_answers_end_with_end_of_text(tiny_tokenizer):
    (example,) = tokenize_examples([Example("Tom?", "3 eggs")], tiny_tokenizer)
    text = tiny_tokenizer.decode(example.prompt_ids)
    assert text == "<|user|>Tom?<|assistant|>"
    assert tiny_tokenizer.decode(example.answer_ids) == "3 eggs<|end|>"
    (bare,) = tokenize_examples([Example("", "3 eggs")], tiny_tokenizer)
    assert bare.prompt_ids == []


def test_long_answer_is_cut_and_an_example_whose_prompt_is_too_long_is_left_out(tiny_tokenizer):
    examples = [Example("Tom?", "3 eggs and more of them " * 10), Example("Tom? " * 30, "3")]
    whole = tokenize_examples(examples[:1], tiny_tokenizer, max_length=1000)[0]
    (cut,) = tokenize_examples(examples, tiny_tokenizer, max_length=20)
    assert len(cut.prompt_ids) + len(cut.answer_ids) == 20
    assert cut.answer_ids == whole.answer_ids[: len(cut.answer_ids)]
    assert cut.answer_ids[-1] != tiny_tokenizer.eos_token_id


def test_what_truncation_costs_is_said(tiny_tokenizer, capsys):
    long, too_long = Example("Tom?", "3 eggs and more " * 10), Example("Tom? " * 30, "3")
    examples = [Example("Tom?", "3 eggs"), long, too_long]
    tokenize_examples(examples[:1], tiny_tokenizer, max_length=20)
    assert capsys.readouterr().out == ""
    tokenize_examples(examples, tiny_tokenizer, max_length=20)
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("Of 3 examples, 1 lose the end of their answer to `max_length` (20")
    assert "and 1 with a prompt of that length are left out" in said


@pytest.mark.parametrize("spare", [-1, 0])
def test_answer_is_cut_where_its_end_of_text_no_longer_fits(spare, tiny_tokenizer, capsys):
    example = Example("Tom?", "3 eggs")
    (whole,) = tokenize_examples([example], tiny_tokenizer)
    length = len(whole.prompt_ids) + len(whole.answer_ids) + spare
    (cut,) = tokenize_examples([example], tiny_tokenizer, max_length=length)
    assert (cut == whole) == (spare == 0)
    assert ("1 lose the end" in capsys.readouterr().out) == (spare < 0)


def test_prompts_that_leave_no_room_at_all_are_an_error(tiny_tokenizer):
    with pytest.raises(
        ValueError, match=r"`max_length` \(3\) leaves nothing: the prompts of all 2"
    ):
        tokenize_examples([Example("Tom? " * 5, "3")] * 2, tiny_tokenizer, max_length=3)


@pytest.mark.parametrize("max_length", [1, 7, 32, 10_000])
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


def test_tokenizer_without_end_of_text_is_an_error(tiny_tokenizer):
    tokenizer = train_tokenizer(["a b c"], 300)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="`eos_token`"):
        tokenize_examples([Example("a", "b")], tokenizer)


def test_tokenizer_too_small_for_all_bytes_is_an_error_that_gives_the_least_size():
    with pytest.raises(ValueError, match="`vocab_size` must be at least 261"):
        train_tokenizer(["a"], vocab_size=100)


def test_tokenizer_spells_any_text_and_every_digit_alone(tiny_tokenizer):
    text = "Zoë paid 1234 €.\n"
    assert tiny_tokenizer.decode(tiny_tokenizer(text)["input_ids"]) == text
    assert len(tiny_tokenizer("1234")["input_ids"]) == 4


def test_answers_are_filled_with_end_of_text_to_whole_windows_and_rows_with_padding():
    examples = [TokenizedExample([7, 8], [9, 10, 11, 1]), TokenizedExample([], [12, 1])]
    canvas = collate(examples, window_length=3, eos_token_id=1, pad_token_id=0)
    assert canvas.input_ids.tolist() == [[7, 8, 9, 10, 11, 1, 1, 1], [12, 1, 1, 0, 0, 0, 0, 0]]
    assert canvas.attention_mask.tolist() == [[1] * 8, [1, 1, 1, 0, 0, 0, 0, 0]]
    assert canvas.answer_start.tolist() == [2, 0]
    assert canvas.answer_end.tolist() == [8, 3]


def test_extra_windows_hold_end_of_text():
    examples = [TokenizedExample([7], [9, 1]), TokenizedExample([7], [9, 1])]
    canvas = collate(
        examples, window_length=2, eos_token_id=1, pad_token_id=0, extra_windows=[2, 0]
    )
    assert canvas.input_ids.tolist() == [[7, 9, 1, 1, 1, 1, 1], [7, 9, 1, 0, 0, 0, 0]]
    assert canvas.answer_end.tolist() == [7, 3]


LENGTHS = torch.randint(3, 30, (50,), generator=torch.Generator().manual_seed(0)).tolist()


def batches(number: int, **changes) -> list[list[int]]:
    arguments = {"lengths": LENGTHS, "tokens_per_batch": 64, "seed": 0} | changes
    return list(islice(batch_indices(**arguments), number))


def test_batches_are_a_function_of_the_seed():
    assert batches(40) == batches(40)
    assert batches(40) != batches(40, seed=1)


@pytest.mark.parametrize("first", [1, 7, 33])
def test_batches_go_on_where_a_run_stopped(first):
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


def test_padded_batches_stay_within_the_budget_of_tokens():
    for batch in batches(40):
        assert len(batch) * max(LENGTHS[i] for i in batch) <= 64


def test_example_longer_than_the_budget_is_a_batch_of_its_own():
    assert sorted(batches(2, lengths=[100, 5])) == [[0], [1]]
