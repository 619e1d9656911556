"""The embedded default: what a newcomer sees with the first command."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from codd_hf import CoDDPipeline, default_model
from codd_hf.cli import main

FOLDER = Path(default_model())
WORDS = set((Path(__file__).parent / "fixtures" / "gsm8k_words.txt").read_text().split())


@pytest.fixture(scope="module")
def pipe() -> CoDDPipeline:
    pipe = CoDDPipeline.from_pretrained(default_model())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z]+", text.lower())


def immediate_repetitions(texts: list[str]) -> float:
    """Share of words that repeat the word before them, letters only between."""
    pairs = [
        pair
        for text in texts
        for pair in zip(text.lower().split(), text.lower().split()[1:], strict=False)
    ]
    return sum(a == b and a.isalpha() for a, b in pairs) / max(len(pairs), 1)


def columns(printed: str) -> tuple[list[str], list[str]]:
    """Words of the left and of the right column of the demo."""
    rows = [line.split(" |") for line in printed.splitlines() if " |" in line]
    rows = [row for row in rows if row[0].strip() != "factorized" and "---" not in row[0]]
    left, right = " ".join(r[0] for r in rows), " ".join(r[1] for r in rows)
    return [left], [right]


def test_it_is_small_and_stored_in_bf16():
    sizes = {path: path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()}
    data = sum(size for path, size in sizes.items() if path.suffix == ".jsonl")  # held-out problems
    assert sum(sizes.values()) - data <= 15_000_000
    for path in sizes:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                dtypes = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
                assert dtypes - {"I16"} == {"BF16"}  # which states a token suggests are indices


def test_the_demo_prints_words_of_the_training_data_side_by_side(capsys):
    assert main(["demo"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"factorized \d+ passes, [\d.]+ s; CoDD \d+ passes, [\d.]+ s", printed)
    factorized, coupled = columns(printed)
    for texts in (factorized, coupled):
        found = [word for text in texts for word in words(text)]
        assert len(found) > 30
        assert sum(word in WORDS for word in found) / len(found) >= 0.95
    assert re.search(r"\d+ ?[-+*/x] ?\d+", coupled[0])
    assert immediate_repetitions(coupled) < immediate_repetitions(factorized)


def test_a_question_alone_and_in_a_batch_gets_the_same_text(pipe):
    lines = (FOLDER / "test.jsonl").read_text().splitlines()[:4]
    questions = [json.loads(line)["question"] for line in lines]

    def generators(rows):
        return [torch.Generator().manual_seed(row) for row in rows]

    together = pipe(questions, gen_length=32, num_inference_steps=4, generator=generators(range(4)))
    alone = pipe(questions[2], gen_length=32, num_inference_steps=4, generator=generators([2]))
    assert together.texts[2] == alone.texts[0]


def test_saved_and_loaded_again_it_writes_the_same_text(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = CoDDPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    for a, b in zip(pipe.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    question = "Tom has 3 boxes of 12 eggs. How many eggs has he?"
    texts = [
        p(
            question,
            gen_length=32,
            num_inference_steps=4,
            generator=torch.Generator().manual_seed(0),
        )
        for p in (pipe, again)
    ]
    assert texts[0].texts == texts[1].texts


def test_the_fitted_head_beats_factorized_prediction_in_a_mostly_masked_window(capsys, tmp_path):
    output = tmp_path / "gap.json"
    arguments = ["--num-problems", "16", "--ratios", "0.6", "1.0", "--no-sequential"]
    assert main(["evaluate", "gap", *arguments, "--output", str(output)]) == 0
    assert "gain, fitted" in capsys.readouterr().out
    for row in json.loads(output.read_text())["rows"]:
        assert row["fitted"]["value"] < row["factorized"]["value"]
        assert row["fitted"]["value"] < row["raw product"]["value"]
