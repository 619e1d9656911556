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
from codd_hf.data.tasks import sample_tasks

FOLDER = Path(default_model())


@pytest.fixture(scope="module")
def pipe() -> CoDDPipeline:
    pipe = CoDDPipeline.from_pretrained(default_model())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_it_is_small_and_stored_in_bf16():
    sizes = {path: path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()}
    assert sum(sizes.values()) <= 15_000_000
    for path in sizes:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                dtypes = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
                assert dtypes - {"I16"} == {"BF16"}  # which states a token suggests are indices


def test_the_demo_shows_that_coupled_answers_are_right_more_often(capsys):
    assert main(["demo", "--num-tasks", "50"]) == 0
    *_, last = capsys.readouterr().out.strip().splitlines()
    pattern = (
        r"50 unseen tasks, 4 passes a window: factorized (\d+) right in .* CoDD (\d+) right in"
    )
    factorized, coupled = map(int, re.match(pattern, last).groups())
    assert coupled > factorized


def test_it_answers_in_the_canvas_that_its_tasks_take(pipe):
    """In a longer one, of which it has seen none, hardly an answer is right."""
    answers = [task.answer for task in sample_tasks("train[:2000]")]
    tokens = pipe.tokenizer(answers, add_special_tokens=False)["input_ids"]
    longest, window = max(map(len, tokens)) + 1, pipe.model.window_length
    assert pipe.task()["gen_length"] == -(-longest // window) * window


def test_a_question_alone_and_in_a_batch_gets_the_same_text(pipe):
    questions = [task.question for task in sample_tasks("test[:4]")]

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
    question = "Ben has 3 boxes with 4 eggs in each. How many eggs are there?"
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
    arguments = ["--num-problems", "32", "--ratios", "0.9", "1.0", "--no-sequential"]
    assert main(["evaluate", "gap", *arguments, "--output", str(output)]) == 0
    assert "gain, fitted" in capsys.readouterr().out
    for row in json.loads(output.read_text())["rows"]:
        assert row["fitted"]["value"] < row["factorized"]["value"]


@pytest.mark.slow
def test_reported_shares_of_right_answers_are_found_again(tmp_path):
    """To the last answer or two, which other processors may round to another token."""
    results = Path(__file__).parents[1] / "model_cards" / "results" / "answers.json"
    reported, output = json.loads(results.read_text()), tmp_path / "answers.json"
    settings = reported["settings"]
    argv = ["--num-problems", str(settings["num_problems"]), "--passes", "4"]
    argv += ["--batch-size", str(settings["batch_size"]), "--output", str(output)]
    assert main(["evaluate", "answers", *argv]) == 0
    first, again = (
        {row["sampling"]: row["right, %"]["value"] for row in rows if row["passes"] == 4}
        for rows in (reported["rows"], json.loads(output.read_text())["rows"])
    )
    assert len(first) == 2
    assert again == pytest.approx(first, abs=0.5)
