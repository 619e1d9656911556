"""Promises of the measured share of right answers against backbone passes."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest

from codd_hf import CoDDPipeline
from codd_hf.cli import main
from codd_hf.data.sources import Example, load_examples
from codd_hf.data.tasks import Task
from codd_hf.evaluation import AnswersSettings, answer_sets, answers
from codd_hf.evaluation.answer_sets import AnswerSet
from codd_hf.evaluation.answers import aup, measure
from codd_hf.evaluation.checkers import checker
from tiny_pipeline import save_tiny_pipeline, tiny_pipeline, tiny_task_pipeline

TEST = [Example(f"{i} + {i}?", f"Tom has {2 * i} eggs.") for i in range(5)]
QUESTIONS = [example.prompt for example in TEST]


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(sampling="latent", temperature=1.0)


def settings(**changes) -> AnswersSettings:
    return AnswersSettings(**{"gen_length": 8, "passes": [1, 4], "batch_size": 2} | changes)


@pytest.mark.parametrize(
    ("name", "truth", "right", "wrong"),
    [
        ("exact", "New York", " New\n York ", "new york"),
        ("exact", "1,000", "1000.", "1001"),
        ("last_number", "5 - 2 is 3 eggs.", "So 7 or 3.0.", "3 or 7"),
        ("last_number", "It costs $1,250", "1250 dollars", "1,251"),
        ("last_number", "-4", "x = -4", "7-4"),
        ("last_number", "1/2", "0.50", "0.5/0 2"),
        ("hashes", "9\n#### 3", "4\n#### 3\n5", "3"),
        ("hashes", "#### San Diego", "####  San  Diego ", "#### San York"),
        ("boxed", r"So \boxed{\frac{1}{2}}", r"\boxed{3}, no, \boxed{\frac{1}{2}}.", r"\boxed{1}"),
        ("boxed", r"\boxed{12}", r"$\boxed{ 12. }$", r"\boxed{12"),
        ("regex:answer is ([A-D])", "The answer is B.", "answer is A, answer is B", "B"),
        ("regex:[A-D]", "B", "A or B", "B or A"),
        ("equations", "#### 7", "3 + 4 = 7\n#### 7", "3 + 3 = 7\n#### 7"),
        ("equations", "#### 7", "2 * 3 = 6, so 7", "2 * 3 = 6"),
    ],
)
def test_checker_knows_right_from_wrong(name, truth, right, wrong):
    is_right = checker(name, truth)
    assert [is_right(truth), is_right(right), is_right(wrong), is_right("")] == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sums", "`checker` must be one of exact"),
        ("regex:(", "'regex:\\(' is no regular expression"),
        ("boxed", "'boxed' finds nothing in the answer 'none'"),
    ],
)
def test_checker_that_cannot_check_is_an_error(name, said):
    with pytest.raises(ValueError, match=said):
        checker(name, "none")


def test_aup_is_that_of_its_definition():
    def weighted(y):
        return y * math.exp(-3 * (1 - y / 90))

    # The last point has lost more than five points, so that it does not count.
    points = [(4.0, 70.0), (1.0, 80.0), (2.0, 78.0)]
    expected = 1 * 80 + (2 - 1) * (weighted(80) + weighted(78)) / 2
    assert aup(points, 90.0) == pytest.approx(expected)
    assert aup([(2.0, 50.0)], 50.0) == pytest.approx(100)
    assert aup([(1.0, 0.0), (2.0, 0.0)], 0.0) == 0


def test_rows_are_the_checks_of_what_the_pipeline_writes(pipe, monkeypatch):
    """The pipeline's answers to two questions count as right."""
    kinds = ["sums", "sums", "dates", "dates", "dates"]
    examples = [
        Example(q, "", task=Task(k, q, "", "")) for q, k in zip(QUESTIONS, kinds, strict=True)
    ]
    monkeypatch.setattr(answers, "is_right", lambda task, text: task.question in QUESTIONS[1:3])
    report = measure(pipe, examples, settings(samplings=["latent", "marginal"]))
    rows = report.tables["rows"]
    assert [(row["sampling"], row["passes"]) for row in rows] == [
        (mode, passes) for mode in ("factorized", "latent", "marginal") for passes in (1, 4)
    ]
    for row, kind in zip(rows, report.tables["right by kind, %"], strict=True):
        assert row["right, %"].value == pytest.approx(40)
        assert row["right, %"].error == pytest.approx(100 * math.sqrt(0.4 * 0.6 / 4))
        assert row["beyond factorized, points"].value == 0
        assert row["passes used"].value == 2 * row["passes"]  # in two windows
        assert row["tokens per pass"].value == pytest.approx(8 / (2 * row["passes"]))
        assert [kind["sums"].value, kind["dates"].value] == pytest.approx([50, 100 / 3])
    assert [row["AUP"] for row in report.tables["AUP"]] == pytest.approx([160] * 3)


@pytest.mark.parametrize("changes", [{}, {"logit_shift": True}])
def test_block_causal_backbone_answers_in_its_own_blocks_wherever_a_prompt_ends(changes):
    pipe = tiny_pipeline(sampling="latent", temperature=1.0)
    for name, value in {"block_length": 2, **changes}.items():
        setattr(pipe.model.backbone.config, name, value)
    examples = [Example("Tom has eggs."[:size], "5") for size in (3, 4, 5, 13)]
    rows = measure(pipe, examples, settings(passes=[])).tables["rows"]
    assert [row["passes"] for row in rows] == [2, 4] * 2
    partial, first = 1, 5 * len(changes)  # a block that the prompt begins, and first tokens
    assert all(
        2 * row["passes"] <= row["passes used"].value <= 2 * row["passes"] + partial + first
        for row in rows[::2]
    )
    with pytest.raises(ValueError, match="must be from 2, one a block, to the window's 4"):
        measure(pipe, examples, settings(passes=[1]))


def test_demo_gives_each_block_of_a_block_causal_backbone_a_pass(tmp_path, capsys):
    pipe = tiny_task_pipeline({"block_length": 4, "max_position_embeddings": 512})
    pipe.save_pretrained(tmp_path)
    argv = ["demo", "--model", str(tmp_path), "--num-tasks", "2"]
    assert main(argv) == 0
    assert "2 unseen tasks, 8 passes a window" in capsys.readouterr().out
    assert main([*argv, "--passes", "16"]) == 0
    assert "16 passes a window" in capsys.readouterr().out


def test_difference_to_factorized_is_paired(pipe, monkeypatch):
    def made(self, passes, sampling, **draw):
        texts = {"factorized": "00010", "latent": "01110"}[sampling]
        return [answer_sets.Answer(text, [1], 1) for text in texts]

    monkeypatch.setattr(AnswerSet, "answers", made)
    examples = [Example("?", "1")] * 5
    *_, row = measure(pipe, examples, settings(passes=[1], samplings=["latent"])).tables["rows"]
    gain = row["beyond factorized, points"]
    assert gain.value == pytest.approx(40)
    assert gain.error == pytest.approx(100 * math.sqrt(0.4 * 0.6 / 4))  # of 0, 1, 1, 0, 0


def test_run_that_stopped_goes_on_where_it_was(pipe, tmp_path, monkeypatch):
    output, asked = str(tmp_path / "answers.json"), []
    call = CoDDPipeline.__call__

    def counted(self, prompts, **kwargs):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.extend(prompts)
        return call(self, prompts, **kwargs)

    whole = AnswerSet("test", pipe, QUESTIONS, settings()).answers(4, "latent")
    monkeypatch.setattr(CoDDPipeline, "__call__", counted)
    small = settings(output=output, batch_size=3)
    with pytest.raises(KeyboardInterrupt):
        AnswerSet("test", pipe, QUESTIONS, small).answers(4, "latent")
    asked.clear()
    again = AnswerSet("test", pipe, QUESTIONS, settings(output=output)).answers(4, "latent")
    assert asked == QUESTIONS[3:]
    assert [answer[:3] for answer in again] == [answer[:3] for answer in whole]
    for questions, seed in ((QUESTIONS, 1), (QUESTIONS[1:], 0)):
        with pytest.raises(ValueError, match=r"answers.json.answers' has answers of another model"):
            AnswerSet("test", pipe, questions, settings(output=output, seed=seed))


@pytest.mark.parametrize("kept", [True, False])
def test_two_processes_give_what_one_gives(pipe, tmp_path, monkeypatch, kept):
    output, made = str(tmp_path / "answers.json") if kept else None, []
    one = AnswerSet("test", pipe, QUESTIONS, settings()).answers(4, "latent")

    class StoppedError(Exception):
        pass

    def wait(new):
        made.extend(new)
        raise StoppedError

    for index, gather in ((1, wait), (0, lambda new: new + made)):
        state = SimpleNamespace(process_index=index, num_processes=2)
        monkeypatch.setattr(answer_sets, "PartialState", lambda state=state: state)
        monkeypatch.setattr(answer_sets, "gather_object", gather)
        both = AnswerSet("test", pipe, QUESTIONS, settings(output=output))
        if index:
            with pytest.raises(StoppedError):
                both.answers(4, "latent")
    assert [a[:3] for a in both.answers(4, "latent")] == [a[:3] for a in one]
    assert len(made[0]) == 2
    names = [f"test-{i:05d}.jsonl" for i in (0, 1)] if kept else []
    assert sorted(path.name for path in tmp_path.rglob("*.jsonl")) == names


def test_command_measures_a_backbone_without_a_head_in_the_backbones_own_length(
    pipe, tmp_path, capsys, monkeypatch
):
    own = {"max_new_tokens": 8}
    monkeypatch.setattr(pipe.model.backbone.config, "decoding", own, raising=False)
    pipe.model.backbone.save_pretrained(tmp_path / "backbone")
    pipe.tokenizer.save_pretrained(tmp_path / "backbone")
    rows = [{"question": e.prompt, "answer": e.answer} for e in TEST]
    path, output = tmp_path / "rows.jsonl", tmp_path / "answers.json"
    path.write_text("\n".join(map(json.dumps, rows)))
    argv = ["evaluate", "answers", "--model", str(tmp_path / "backbone"), "--dataset", str(path)]
    argv += ["--passes", "1", "2", "--output", str(output)]
    assert main(argv) == 0
    found = json.loads(output.read_text())
    assert found["facts"]["gen_length"] == 8
    assert [row["sampling"] for row in found["rows"]] == ["factorized", "factorized"]
    assert found["settings"]["checker"] == "last_number"
    assert "tokens per pass" in capsys.readouterr().out
    assert main([*argv, "--checker", "boxed"]) == 1
    assert "`checker` 'boxed' finds nothing in the answer 'Tom" in capsys.readouterr().err


def test_tasks_know_their_checkers_and_are_test_tasks_by_default(tmp_path, capsys):
    folder = save_tiny_pipeline(tmp_path / "pipeline")
    tasks = load_examples("tasks", split="test[:2]")
    assert all(example.task.answer == example.answer for example in tasks)
    argv = ["evaluate", "answers", "--model", str(folder), "--dataset", "tasks"]
    argv += ["--num-problems", "2", "--passes", "1", "--gen-length", "4"]
    assert main([*argv, "--output", str(tmp_path / "test.json")]) == 0
    printed = capsys.readouterr().out
    assert all(f" {example.task.kind} " in printed for example in tasks)
    assert main([*argv, "--split", "validation", "--output", str(tmp_path / "test.json")]) == 1
    assert "has answers of another model, dataset" in capsys.readouterr().err
