"""Promises of users' text: what spells a special token is text, in every way that text comes in."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers.models import WordPiece
from transformers import BertTokenizerFast, ByT5Tokenizer

from codd_hf import CoDDPipeline
from codd_hf.cli import main
from codd_hf.data.canvases import tokenize_examples
from codd_hf.data.collator import DataCollatorForMaskedDiffusion
from codd_hf.data.sources import Example, RowReport
from codd_hf.text.encoding import encode_chats, encode_texts, special_token_ids
from tiny import tiny_model

SPELT = "Say <|mask|>, <|end|> and <|user|>."


@pytest.fixture(scope="session")
def word_tokenizer(tmp_path_factory):
    """Whole words; whatever else there is becomes the unknown token, 3."""
    folder = tmp_path_factory.mktemp("words")
    words = ["[PAD]", "[SEP]", "[MASK]", "[UNK]", "[CLS]", "tom", "has", "three", "eggs", "and"]
    (folder / "vocab.txt").write_text("\n".join([*words, "eats", "one"]))
    tokenizer = BertTokenizerFast.from_pretrained(folder)
    tokenizer.eos_token = "[SEP]"
    return tokenizer


def test_special_tokens_in_a_text_are_spelt_and_other_texts_stay_as_they_were(tiny_tokenizer):
    rows, faults = encode_texts([SPELT, "Tom has 3 eggs."], tiny_tokenizer)
    assert not faults
    assert special_token_ids(tiny_tokenizer).isdisjoint(rows[0])
    assert tiny_tokenizer.decode(rows[0]) == SPELT
    assert rows[1] == tiny_tokenizer("Tom has 3 eggs.")["input_ids"]
    assert tiny_tokenizer("<|mask|>")["input_ids"] == [tiny_tokenizer.mask_token_id]


def test_tokenizers_own_beginning_and_end_stay(word_tokenizer):
    (row,), _ = encode_texts(["tom has [MASK]"], word_tokenizer, add_special_tokens=True)
    assert row == [4, 5, 6, 3, 3, 3, 1]


def test_tokenizer_in_python_spells_them_too():
    tokenizer = ByT5Tokenizer()
    (row,), faults = encode_texts(["a </s> b"], tokenizer)
    assert not faults
    assert tokenizer.eos_token_id not in row
    assert tokenizer.decode(row) == "a </s> b"


def test_text_that_a_tokenizer_fails_at_is_told_from_the_others(word_tokenizer, tmp_path):
    words = [word for word in word_tokenizer.get_vocab() if word != "[UNK]"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast.from_pretrained(tmp_path)
    tokenizer.backend_tokenizer.model = WordPiece(
        {word: i for i, word in enumerate(words)}, unk_token="[UNK]"
    )
    rows, faults = encode_texts(["tom has", "tom \N{EGG}", "tom [MASK]", "eggs"], tokenizer)
    assert [bool(row) for row in rows] == [True, False, False, True]
    assert list(faults) == [1, 2]
    assert all("cannot be encoded by the tokenizer (" in fault for fault in faults.values())


def test_chat_template_alone_writes_special_tokens(tiny_tokenizer):
    chat = [
        {"role": "user", "content": SPELT},
        {"role": "assistant", "content": "<|end|>"},
        {"role": "user", "content": "Why?"},
    ]
    (row,), faults = encode_chats([chat], tiny_tokenizer, add_generation_prompt=True)
    assert not faults
    special = special_token_ids(tiny_tokenizer)
    written = tiny_tokenizer.convert_ids_to_tokens([token for token in row if token in special])
    assert written == ["<|user|>", "<|assistant|>", "<|end|>", "<|user|>", "<|assistant|>"]
    expected = f"<|user|>{SPELT}<|assistant|><|end|><|end|><|user|>Why?<|assistant|>"
    assert tiny_tokenizer.decode(row) == expected


def test_examples_that_spell_special_tokens_have_none_of_them(tiny_tokenizer):
    (example,) = tokenize_examples([Example(SPELT, SPELT)], tiny_tokenizer)
    mask, end = tiny_tokenizer.mask_token_id, tiny_tokenizer.eos_token_id
    assert mask not in (*example.prompt_ids, *example.answer_ids)
    assert example.answer_ids.index(end) == len(example.answer_ids) - 1
    assert tiny_tokenizer.decode(example.prompt_ids) == f"<|user|>{SPELT}<|assistant|>"


@pytest.mark.parametrize(
    ("example", "said"),
    [
        (Example("", "tom [MASK]", row=7), r"Row 7 .* answer with the token '\[UNK\]'"),
        (Example("", "tom \N{EGG}"), r"Row 2 .* answer with the token '\[UNK\]'"),
        (Example("", "tom \ud83d"), "Row 2 .* half of a surrogate pair"),
        (Example("\ud83d", "tom"), "Row 2 .* prompt that holds half of a surrogate pair"),
    ],
)
def test_text_that_the_tokenizer_cannot_spell_is_refused_by_its_row_or_left_out(
    example, said, word_tokenizer, capsys
):
    examples = [Example("", "tom has eggs", row=1), example]
    with pytest.raises(ValueError, match=said):
        tokenize_examples(examples, word_tokenizer, never=[3])
    report = RowReport("`data`", skip_bad_rows=True)
    kept = tokenize_examples(examples, word_tokenizer, never=[3], report=report)
    assert [e.answer_ids for e in kept] == [[5, 6, 8, 1]]
    number = 2 if example.row is None else example.row
    assert list(report.left_out.values()) == [[number]]
    assert f"Rows left out: {number}: " in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"(?s)Nothing is left of `data`\..* left out: "):
        tokenize_examples([example], word_tokenizer, never=[3], report=report)


def test_answer_without_a_token_is_passed_over(word_tokenizer, capsys):
    examples = [Example("", text) for text in ("tom has eggs", "\u200b", "tom")]
    kept = tokenize_examples([*examples, Example("has [SEP]", "tom")], word_tokenizer)
    assert [e.answer_ids for e in kept] == [[5, 6, 8, 1], [5, 1], [5, 1]]
    assert "Rows left out: 2: an answer without a token." in capsys.readouterr().out


def test_collator_spells_a_mask_token_in_a_text_and_keeps_all_of_the_text(tiny_tokenizer):
    collator = DataCollatorForMaskedDiffusion(tiny_tokenizer, 1, 4, max_extra_windows=0)
    model = tiny_model("llama", len(tiny_tokenizer), mask_token_id=1)
    spelt = tiny_tokenizer("a <|mask|> b")["input_ids"] + [2]
    plain = tiny_tokenizer("three eggs")["input_ids"] + [2]
    text, _ = encode_texts(["a <|mask|> b"], tiny_tokenizer)
    learnt = set()
    for features in [[{"input_ids": spelt}]] * 30 + [
        [{"input_ids": spelt}, {"input_ids": plain, "labels": plain}],
        [{"input_ids": spelt, "labels": [-100, -100, *spelt[2:]]}],
    ]:
        batch = collator(features)
        assert model(**batch).loss.isfinite()
        assert 1 not in batch["labels"]
        learnt |= set(batch["labels"].flatten().tolist())
    assert set(text[0]) <= learnt


def test_padding_in_a_feature_is_not_learnt(tiny_tokenizer):
    collator = DataCollatorForMaskedDiffusion(tiny_tokenizer, 1, 4, max_extra_windows=0)
    feature = {"input_ids": [0, 0, 69, 70, 71, 2], "attention_mask": [0, 0, 1, 1, 1, 1]}
    assert collator([feature])["labels"].tolist() == [[69, 70, 71, 2]]
    with pytest.raises(ValueError, match=r"`labels` must have shape \(3,\), got \(2,\)"):
        collator([{"input_ids": [69, 70, 2], "labels": [69, 70]}])


def test_pipeline_reads_special_tokens_in_a_users_text_as_text(trained_pipeline):
    pipe = CoDDPipeline.from_pretrained(trained_pipeline)
    (row,), _ = encode_chats(
        [[{"role": "user", "content": SPELT}]], pipe.tokenizer, add_generation_prompt=True
    )
    options = {"gen_length": 4, "num_inference_steps": 1}
    given = pipe(input_ids=[row], generator=torch.Generator().manual_seed(0), **options)
    for asked in ({"prompt": SPELT}, {"messages": [{"role": "user", "content": SPELT}]}):
        output = pipe(**asked, generator=torch.Generator().manual_seed(0), **options)
        assert output.sequences.tolist() == given.sequences.tolist()


def test_gap_of_a_text_that_spells_the_mask_token_is_finite(trained_pipeline, tmp_path, capsys):
    rows = [{"question": "Where to?", "answer": " San Diego <|mask|>" + " New York" * 4}] * 2
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--dataset", str(source), "--ratios", "0.5", "--no-sequential"]
    command = ["evaluate", "gap", "--model", str(trained_pipeline), *arguments]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "inf" not in out
    assert "nan" not in out
    assert main([*command, "--num-problems", "1"]) == 0
    assert "nan" not in capsys.readouterr().out
