"""Promises of the measured quality of text against backbone passes."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from codd_hf.cli import main
from codd_hf.data.sources import Example
from codd_hf.evaluation import QualitySettings
from codd_hf.evaluation.answer_sets import AnswerSet
from codd_hf.evaluation.judge import Judge, load_judge
from codd_hf.evaluation.quality import (
    CHOSEN_AT,
    COUPLED_GRID,
    ENTROPY,
    FACTORIZED_GRID,
    NATS,
    Problems,
    best,
    find_matches,
    measure_quality,
    real_answers,
)
from codd_hf.evaluation.statistics import Estimate
from tiny import SENTENCES
from tiny_pipeline import save_tiny_pipeline, tiny_pipeline

TEST = [Example(f"{i} + {i}?", f"Tom has {2 * i} eggs.") for i in range(3)]
VALIDATION = [Example(f"{i} - 1?", f"Ann eats {i} apples.") for i in range(3)]
LATENT = {"sampling": "latent", "temperature": 1.0}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(sampling="latent", temperature=1.0)


@pytest.fixture(scope="module")
def judge(pipe):
    """A random causal model that is far from uniform, with the pipeline's tokenizer."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(pipe.tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.4,
        eos_token_id=None,
        bos_token_id=None,
    )
    return Judge(LlamaForCausalLM(config).eval(), pipe.tokenizer)


def settings(**changes) -> QualitySettings:
    small = {"gen_length": 8, "samplings": ["latent"], "passes": [1, 4]}
    return QualitySettings(judge="x", **small | changes)


@pytest.fixture
def problems(pipe, judge):
    def make(examples=TEST, **changes):
        return Problems(examples, pipe, judge, settings(**changes))

    return make


@pytest.fixture
def generated(monkeypatch):
    """The first prompt, the passes and the draw of what was generated, in order."""
    calls = []

    def counted(self, passes, **draw):
        calls.append((self.questions[0], passes, draw))
        return answers(self, passes, **draw)

    answers = AnswerSet.answers
    monkeypatch.setattr(AnswerSet, "answers", counted)
    return calls


def rows(sampling: str, *values: tuple[int, float, float]) -> list[dict]:
    """Made-up figures: passes, nats and entropy."""
    errors = torch.tensor([-0.1, 0.1], dtype=torch.float64)
    return [
        {
            **{"sampling": sampling, "strategy": "margin", "passes": passes},
            NATS: Estimate(nats, nats + errors),
            ENTROPY: Estimate(entropy, entropy + 0 * errors),
        }
        for passes, nats, entropy in values
    ]


@pytest.mark.parametrize("template", [True, False])
def test_judge_gives_the_nats_of_a_direct_computation(judge, template, monkeypatch):
    model, tokenizer = judge.model, judge.tokenizer
    if not template:
        monkeypatch.setattr(tokenizer, "chat_template", None)
    questions = ["Tom?", "How many eggs are left after Ann eats 5?", "3 + 4?"]
    answers = ["He has 7 eggs.", "", SENTENCES[0]]
    judged = Judge(model, tokenizer, batch_size=2)(questions, answers)
    for question, answer, (nats, count) in zip(questions, answers, judged, strict=True):
        before = tokenizer(question + "\n")["input_ids"]
        if template:
            before = tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True
            )["input_ids"]
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        expected = 0.0
        for i, token in enumerate(ids):
            with torch.no_grad():
                logits = model(torch.tensor([before + ids[:i]])).logits[0, -1]
            expected -= logits.log_softmax(-1)[token].item()
        assert count == len(ids)
        assert nats == pytest.approx(expected, abs=1e-3)


def test_judge_loads_from_a_folder(judge, tmp_path):
    save_judge(judge, tmp_path)
    assert load_judge(str(tmp_path))(["Tom?"], ["7"]) == judge(["Tom?"], ["7"])


def save_judge(judge, folder):
    judge.model.save_pretrained(folder)
    judge.tokenizer.save_pretrained(folder)


def test_figures_are_of_the_texts_that_the_pipeline_gives(pipe, judge, problems):
    questions = [example.prompt for example in TEST]
    output = pipe(
        questions,
        gen_length=8,
        block_length=4,
        num_inference_steps=4,
        **LATENT,
        generator=[torch.Generator().manual_seed(i) for i in range(3)],
    )
    answers = AnswerSet("", pipe, questions, settings()).answers(2, **LATENT)
    assert [answer.text for answer in answers] == output.texts
    assert [answer.tokens for answer in answers] == output.sequences.tolist()
    assert [answer.passes for answer in answers] == [4, 4, 4]
    judged = judge(questions, output.texts)
    total = sum(nats for nats, _ in judged) / sum(count for _, count in judged)
    row = problems().row(2, "latent", "low_confidence", {"temperature": 1.0})
    assert row[NATS].value == pytest.approx(total)
    assert row["perplexity"] == pytest.approx(math.exp(total))
    assert row["passes used"].value == 4
    assert row["tokens per pass"].value == 2


def test_answers_do_not_depend_on_the_batch_size_but_on_the_seed(pipe):
    def texts(**changes):
        questions = [example.prompt for example in TEST]
        answers = AnswerSet("", pipe, questions, settings(**changes)).answers(2, **LATENT)
        return [answer.text for answer in answers]

    assert texts(batch_size=2) == texts()
    assert texts(seed=7) != texts()


def test_real_answers_are_cut_and_spell_no_special_tokens(pipe):
    answers = [example.answer for example in TEST]
    assert {len(answer.tokens) for answer in real_answers(pipe, answers, 4)} == {4}
    (answer,) = real_answers(pipe, ["It is <|end|> and on."], 64)
    assert len(answer.tokens) > 8


def test_best_is_the_likeliest_that_keeps_entropy_or_else_the_most_diverse():
    grid = rows("latent", (1, 1.0, 2.0), (2, 2.0, 5.0), (3, 3.0, 6.0))
    assert [best(grid, least) for least in (4.0, 1.0, 7.0)] == [1, 0, 2]


def test_settings_are_chosen_by_validation_data_alone(problems, generated):
    validation = problems(VALIDATION)
    result = measure_quality(problems(), validation)
    draws = {TEST[0].prompt: [], VALIDATION[0].prompt: []}
    for prompt, passes, draw in generated:
        draws[prompt].append((passes, draw))
    least = 0.9 * validation.real()[ENTROPY].value
    assert len(FACTORIZED_GRID) == len(COUPLED_GRID) == 6
    assert len(result["choices"]) == len(draws[VALIDATION[0].prompt]) == 2 * 6 * len(CHOSEN_AT)
    for i, (mode, grid) in enumerate([("factorized", FACTORIZED_GRID), ("latent", COUPLED_GRID)]):
        group = result["choices"][12 * i : 12 * i + 6]
        chosen = grid[best(group, least)]
        for passes, draw in draws[TEST[0].prompt][2 * i : 2 * i + 2]:
            assert passes in (1, 4)
            assert draw == {**chosen, "sampling": mode, "strategy": "low_confidence"}


def test_choosing_on_what_is_reported_is_an_error(problems):
    with pytest.raises(ValueError, match=r"`choose_on` and `dataset` share the question '1 \+ 1"):
        measure_quality(problems(), problems([*VALIDATION, TEST[1]]))


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"strategies": ["margin", "luck"]}, "`strategies` must be"),
        ({"passes": [1, 5]}, "`passes` must be from 1, one a block, to the window's 4"),
        ({"samplings": ["factorized"]}, "`samplings` must be one of"),
    ],
)
def test_bad_setting_is_found_before_anything_is_generated(problems, generated, bad, said):
    with pytest.raises(ValueError, match=said):
        measure_quality(problems(**bad), None)
    assert generated == []


def test_strategies_are_measured_on_both_sides_at_all_passes(problems):
    small = problems(passes=[2], strategies=["margin", "threshold"])
    result = measure_quality(small, None)
    real, *measured = result["rows"]
    assert real["sampling"] == "real answers"
    assert [(r["sampling"], r["strategy"], r["passes"]) for r in measured] == [
        (mode, strategy, passes)
        for mode in ("factorized", "latent")
        for strategy, passes in (("margin", 2), ("threshold", 2))
    ]
    assert [row["passes used"].value for row in measured[::2]] == [4, 4]
    assert [match["strategy"] for match in result["matches"]] == ["margin", "threshold"]


def test_factorized_passes_are_those_that_reach_the_nats_and_keep_the_entropy():
    factorized = rows("factorized", (1, 4.0, 6.0), (2, 3.0, 6.0), (4, 1.9, 4.0), (8, 1.5, 5.5))
    coupled = rows("latent", (1, 3.5, 6.0), (2, 2.0, 5.0), (4, 1.0, 5.0), (8, 0.5, 4.0))
    one, two, four, eight = find_matches([*coupled, *factorized], 5.0)
    # With 4 passes the nats are reached, but not the entropy.
    assert [one["factorized passes"], two["factorized passes"]] == [2, 8]
    assert four["factorized passes"] is eight["factorized passes"] is None
    assert four["keeps entropy"]
    assert not eight["keeps entropy"]
    difference = two["factorized - CoDD, nats, 4 passes"]
    assert difference.value == pytest.approx(-0.1)
    assert difference.error == pytest.approx(0, abs=1e-9)


def test_command_writes_the_figures(judge, tmp_path, capsys):
    folder = save_tiny_pipeline(tmp_path / "pipeline")
    save_judge(judge, tmp_path / "judge")
    for name, examples in (("test", TEST), ("validation", VALIDATION)):
        lines = [json.dumps({"question": e.prompt, "answer": e.answer}) for e in examples]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    output = tmp_path / "quality.json"
    argv = ["evaluate", "quality", "--model", str(folder), "--judge", str(tmp_path / "judge")]
    argv += ["--dataset", str(tmp_path / "test.jsonl"), "--output", str(output)]
    argv += ["--choose-on", str(tmp_path / "validation.jsonl"), "--gen-length", "8"]
    argv += ["--samplings", "latent", "--passes", "1", "4"]
    assert main(argv) == 0
    result = json.loads(output.read_text())
    assert "| latent | low_confidence | 4 | " in capsys.readouterr().out
    assert result["facts"]["problems"] == 3
    assert [len(result[name]) for name in ("choices", "rows", "matches")] == [24, 5, 2]
