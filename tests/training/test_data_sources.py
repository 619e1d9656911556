"""Promises of what data may look like: conversations, folders of datasets, rows that are wrong."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset

from codd_hf.data.canvases import tokenize_examples
from codd_hf.data.sources import Example, load_examples
from codd_hf.data.tokenizers import train_tokenizer
from tiny import SENTENCES

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "and 3?"},
    {"role": "assistant", "content": "7"},
]
CHAT_EXAMPLE = Example(
    "and 3?", "7", (("system", "Be brief."), ("user", "2 + 2?"), ("assistant", "4"))
)


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write_jsonl(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_last_turn_of_the_assistant_is_the_answer_and_all_before_it_the_prompt(suffix, tmp_path):
    path, rows = tmp_path / f"a.{suffix}", [{"prompt": "no", "messages": CHAT}] * 2
    if suffix == "jsonl":
        write_jsonl(path, rows)
    else:
        Dataset.from_list(rows).to_parquet(path)
    assert load_examples(str(path)) == [CHAT_EXAMPLE] * 2


def test_turns_after_the_last_answer_are_left_out_and_other_names_are_read(tmp_path):
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [{"from": names[m["role"]], "value": m["content"]} for m in CHAT[:4]]
    source = write_jsonl(tmp_path / "a.jsonl", [{"conversations": turns}])
    assert load_examples(source) == [Example("2 + 2?", "4", (("system", "Be brief."),))]


def test_conversations_are_found_in_a_column_that_is_named(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "no", "dialogue": CHAT}])
    assert load_examples(source, answer_column="dialogue") == [CHAT_EXAMPLE]


def test_pattern_is_removed_from_every_message(tmp_path):
    chat = [{**message, "content": f"{message['content']}<<x>>"} for message in CHAT]
    source = write_jsonl(tmp_path / "a.jsonl", [{"messages": chat}])
    assert load_examples(source, remove_pattern="<<.*?>>") == [CHAT_EXAMPLE]


def test_only_the_last_answer_is_learnt_and_the_template_renders_the_rest(tiny_tokenizer):
    (example,) = tokenize_examples([CHAT_EXAMPLE], tiny_tokenizer)
    prompt = "<|system|>Be brief.<|user|>2 + 2?<|assistant|>4<|end|><|user|>and 3?<|assistant|>"
    assert tiny_tokenizer.decode(example.prompt_ids) == prompt
    assert tiny_tokenizer.decode(example.answer_ids) == "7<|end|>"
    (bare,) = tokenize_examples([Example("", "4", CHAT_EXAMPLE.history[:1])], tiny_tokenizer)
    assert tiny_tokenizer.decode(bare.prompt_ids) == "<|system|>Be brief.<|assistant|>"


def test_conversation_needs_a_chat_template_that_takes_its_roles():
    tokenizer = train_tokenizer(SENTENCES, vocab_size=300)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="needs a chat template"):
        tokenize_examples([CHAT_EXAMPLE], tokenizer)
    tokenizer.chat_template = "{{ raise_exception('no system, please') }}"
    with pytest.raises(ValueError, match=r"roles system, .*: no system, please"):
        tokenize_examples([CHAT_EXAMPLE], tokenizer)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}, {"text": 3}], "Row 2 of '.*' must hold a text, .* column 'text', got 3:"),
        ([{"question": "a", "answer": "b"}, {"answer": "b"}], "Row 2 .* column 'question', got N"),
        ([{"messages": CHAT}, {"messages": None}], "Row 2 .* messages .* got None"),
        ([{"messages": CHAT}, {"messages": "hi"}], "Row 2 .* messages .* got 'hi'"),
        ([{"messages": CHAT}, {"messages": [{"content": "a"}]}], "Row 2 .* text `content`"),
        ([{"messages": CHAT}, {"messages": ["hi"]}], "Row 2 .* text `content`.* got .'hi'"),
    ],
)
def test_row_that_does_not_hold_what_it_should_is_named(rows, message, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        load_examples(source)


def test_text_file_is_cut_into_lines_or_paragraphs(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree")
    source = str(tmp_path / "a.txt")
    texts = {
        by: [e.answer for e in load_examples(source, sample_by=by)] for by in ("line", "paragraph")
    }
    assert texts["line"] == ["one", "two", "three"]
    assert texts["paragraph"] == ["one\ntwo", "three"]
    with pytest.raises(ValueError, match="`sample_by` must be one of line, paragraph, got"):
        load_examples(source, sample_by="word")


def test_configuration_and_split_of_a_dataset_are_chosen(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("main", "other"):
        for split in ("train", "test"):
            rows = [{"question": name, "answer": f"{split} {i}"} for i in range(3)]
            write_jsonl(folder / f"{name}_{split}.jsonl", rows)
    (folder / "README.md").write_text(
        "---\nconfigs:\n"
        + "".join(
            f"- config_name: {name}\n  data_files:\n"
            + "".join(
                f"  - split: {split}\n    path: {name}_{split}.jsonl\n"
                for split in ("train", "test")
            )
            for name in ("main", "other")
        )
        + "---\n"
    )
    examples = load_examples(str(folder), dataset_config="other", split="test[1:]")
    assert examples == [Example("other", "test 1"), Example("other", "test 2")]
    with pytest.raises(OSError, match="Config name is missing"):
        load_examples(str(folder))


def test_part_of_a_file_is_a_split(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": str(i)} for i in range(5)])
    assert [e.answer for e in load_examples(source, split="train[:2]")] == ["0", "1"]


def test_file_of_another_kind_is_an_error_that_lists_the_kinds(tmp_path):
    (tmp_path / "a.csv").write_text("text\na\n")
    with pytest.raises(OSError, match=r"a\.csv. cannot be read"):
        load_examples(str(tmp_path / "a.csv"))
