"""Promises of rows: read as they are written, passed over or refused by their numbers."""

from __future__ import annotations

import codecs
import json

import pytest

from codd_hf.data.sources import Example, load_examples

ANSWERS = [{"question": f"When {i}?", "answer": f"2024-01-{i:02d}"} for i in range(1, 6)]
DATES = [Example(row["question"], row["answer"]) for row in ANSWERS]
LINES = "".join(json.dumps(row) + "\n" for row in ANSWERS)
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
PLAIN = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
PLAIN_EXAMPLE = Example("Hi", "Hello.")


def load(tmp_path, *rows, **options) -> list[Example]:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_examples(str(path), **options)


@pytest.mark.parametrize("text", ["2024-01-01", "3.50", "null", "1e5"])
def test_text_that_looks_like_something_else_is_text(text, tmp_path):
    assert load(tmp_path, {"text": text}, {"text": text}) == [Example("", text)] * 2


def test_byte_order_mark_and_breaks_of_windows_are_no_text(tmp_path):
    content = codecs.BOM_UTF8 + LINES.replace("\n", "\r\n").encode()
    (tmp_path / "a.jsonl").write_bytes(content)
    assert load_examples(tmp_path / "a.jsonl") == DATES
    assert load_examples(str(tmp_path / "a.jsonl"), split="train[20%:40%]") == DATES[1:2]
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8-sig")
    first, _ = load_examples(str(tmp_path / "a.txt"), sample_by="paragraph")
    assert first.answer == "one"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([PLAIN[0], CALL], "a call of a tool"),
        ([PLAIN[0], CALL, {"role": "tool", "content": "21"}, PLAIN[1]], "a call of a tool"),
        ([PLAIN[0], {"role": "assistant", "content": None}], "a message without content"),
        ([PLAIN[0], {"role": "assistant", "content": " "}], "an empty answer"),
        ([], "no message of the assistant"),
        (PLAIN[:1], "no message of the assistant"),
    ],
)
def test_conversation_without_an_answer_to_learn_is_passed_over_and_counted(
    messages, reason, tmp_path, capsys
):
    rows = [{"messages": PLAIN}, {"messages": messages}]
    assert load(tmp_path, *rows) == [PLAIN_EXAMPLE]
    assert f"Rows left out: 2: {reason}" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"(?s)has no text in column 'messages'.* left out: 1: "):
        load(tmp_path, rows[1])


def test_answer_that_is_empty_after_cleaning_is_passed_over(tmp_path, capsys):
    rows = [{"text": "<<1>>"}, {"text": "a<<2>>"}, {"text": " <<3>>\n"}]
    assert load(tmp_path, *rows, remove_pattern="<<.*?>>") == [Example("", "a")]
    assert "Rows left out: 1, 3: an empty answer." in capsys.readouterr().out
    with pytest.raises(
        ValueError, match=r"`remove_pattern` must be a regular expression, got '\['"
    ):
        load(tmp_path, *rows, remove_pattern="[")


def test_messages_may_be_json_or_hold_parts_of_text(tmp_path):
    parts = [
        {"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in PLAIN
    ]
    rows = [{"messages": json.dumps(PLAIN)}, {"messages": parts}]
    assert load(tmp_path, *rows) == [PLAIN_EXAMPLE] * 2
    parts[0]["content"].append({"type": "image", "url": "x"})
    with pytest.raises(ValueError, match=r"Row 1 .* a text `content`, .* got"):
        load(tmp_path, {"messages": parts})


def test_prompt_and_completion_may_be_lists_of_messages(tmp_path):
    system = {"role": "system", "content": "Be brief."}
    rows = [
        {"prompt": PLAIN[:1], "completion": PLAIN[1:]},
        {"prompt": [system, PLAIN[0]], "completion": [PLAIN[1]]},
        {"prompt": PLAIN[:1], "completion": "Hello."},
    ]
    told = Example("Hi", "Hello.", (("system", "Be brief."),))
    assert load(tmp_path, *rows) == [PLAIN_EXAMPLE, told, PLAIN_EXAMPLE]
    with pytest.raises(ValueError, match=r"Row 1 .* in column 'answer', got \['Ann', 'An"):
        load(tmp_path, {"question": "Who?", "answer": ["Ann", "Anna"]})
    json_text = '[{"role": "user"}]'
    assert load(tmp_path, {"prompt": "Hi", "completion": json_text}) == [Example("Hi", json_text)]


BAD = [
    ('{"text": 3}', "must hold a text"),
    ('{"text": "a', "is not JSON"),
    ('{"text": "\ud83d"}', "must hold a text"),
    ("[1]", "is not a JSON object"),
    ("[" * 100_000, "is not JSON"),
    (b'{"text": "\xff"}', "is not JSON .*utf-8"),
    ("{}", "must hold a text"),
]


@pytest.mark.parametrize(("line", "said"), BAD)
def test_bad_row_is_refused_by_its_number_or_left_out_and_listed(line, said, tmp_path, capsys):
    line = line if isinstance(line, bytes) else line.encode("ascii", "backslashreplace")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n')
    with pytest.raises(ValueError, match=f"Row 2 of .*a.jsonl' .*{said}.*`skip_bad_rows`"):
        load_examples(str(tmp_path / "a.jsonl"))
    kept = load_examples(str(tmp_path / "a.jsonl"), skip_bad_rows=True)
    assert [(e.answer, e.row) for e in kept] == [("a", 1), ("b", 3)]
    assert "Rows left out: 2: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b"", "must be a column of"),
        ("a.jsonl", b"[1]", "must be a column of"),
        ("a.txt", b"a\n\xff\n", "must hold a text"),
        ("a.parquet", b"none", "cannot be read"),
        ("a.csv", b"", "cannot be read"),
    ],
)
def test_file_that_cannot_be_read_is_one_sentence(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, OSError), match=f"{name}.*{said}|{said}.*{name}"):
        load_examples(str(tmp_path / name))


def test_split_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="Unknown split"):
        load(tmp_path, {"text": "a"}, split="test")
