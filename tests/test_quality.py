"""Promises of the measured quality of text against backbone passes."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from codd_hf.cli import main
from codd_hf.data.canvases import Example
from codd_hf.evaluation.answers import Answers, AnswerSet, AnswerStore, Setting
from codd_hf.evaluation.judge import Judge, load_judge
from codd_hf.evaluation.quality import Row, best, find_matches, measure_quality
from codd_hf.evaluation.settings import QualitySettings
from codd_hf.evaluation.statistics import Estimate
from tiny import SENTENCES
from tiny_pipeline import save_tiny_pipeline, tiny_pipeline

TEST = [Example(f"{i} + {i}?", f"Tom has {2 * i} eggs.") for i in range(3)]
VALIDATION = [Example(f"{i} - 1?", f"Ann eats {i} apples.") for i in range(3)]
LATENT = Setting("latent", "low_confidence", 2, {"temperature": 1.0})


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
    return LlamaForCausalLM(config).eval(), pipe.tokenizer


@pytest.fixture
def answer_set(pipe, judge):
    def make(examples=TEST, store=None, **changes):
        of_examples = Judge(*judge, [example.prompt for example in examples])
        settings = QualitySettings(judge="x", **{"gen_length": 8} | changes)
        return AnswerSet(pipe, of_examples, examples, settings, store)

    return make


@pytest.fixture
def generated(monkeypatch):
    """The settings that were really generated, in order."""
    calls, generate = [], AnswerSet._generate

    def counted(self, setting):
        calls.append((self.examples[0].prompt, setting))
        return generate(self, setting)

    monkeypatch.setattr(AnswerSet, "_generate", counted)
    return calls


def plan(**changes) -> QualitySettings:
    smallest = {
        "judge": "x",
        "samplings": ["latent"],
        "passes": [1, 4],
        "factorized_grid": ["temperature=0", "temperature=1"],
        "coupled_grid": ["evidence_temperature=0.5", "evidence_temperature=1"],
        "chosen_at": [1, 4],
    }
    return QualitySettings(**(smallest | changes))


class Measured(Row):
    """A row with made-up figures."""

    def __init__(self, setting: Setting, nats: float, entropy: float) -> None:
        super().__init__(setting, Answers([], [], [], [], [], 0.0))
        errors = torch.tensor([-0.1, 0.1], dtype=torch.float64)
        self.__dict__["figures"] = {
            "nats": Estimate(nats, nats + errors),
            "entropy": Estimate(entropy, entropy + 0 * errors),
        }


def rows(sampling: str, *values: tuple[int, float, float]) -> list[Row]:
    """Of passes, nats and entropy."""
    return [Measured(Setting(sampling, "margin", p), n, e) for p, n, e in values]


@pytest.mark.parametrize("template", [True, False])
def test_judge_gives_the_nats_of_a_direct_computation(judge, template, monkeypatch):
    model, tokenizer = judge
    if not template:
        monkeypatch.setattr(tokenizer, "chat_template", None)
    questions = ["Tom?", "How many eggs are left after Ann eats 5?", "3 + 4?"]
    answers = ["He has 7 eggs.", "", SENTENCES[0]]
    judged = Judge(model, tokenizer, questions, batch_size=2)(answers)
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


def test_judge_loads_from_a_folder_and_a_missing_gguf_file_is_an_error(judge, tmp_path):
    for part in judge:
        part.save_pretrained(tmp_path / "judge")
    model, tokenizer = load_judge(str(tmp_path / "judge"))
    assert Judge(model, tokenizer, ["Tom?"])(["7"]) == Judge(*judge, ["Tom?"])(["7"])
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "small.gguf").touch()
    with pytest.raises(ValueError, match=r"`judge_file` must name .* one of \['small.gguf'\]"):
        load_judge(str(tmp_path / "gguf"))


def test_figures_are_of_the_texts_that_the_pipeline_gives(pipe, judge, answer_set):
    answers = answer_set().answers(LATENT)
    output = pipe(
        [example.prompt for example in TEST],
        gen_length=8,
        block_length=4,
        num_inference_steps=4,
        sampling="latent",
        temperature=1.0,
        generator=[torch.Generator().manual_seed(i) for i in range(3)],
    )
    assert answers.texts == output.texts
    assert answers.tokens == output.sequences.tolist()
    assert answers.passes == [4, 4, 4]
    judged = Judge(*judge, [example.prompt for example in TEST])(output.texts)
    total = sum(nats for nats, _ in judged) / sum(count for _, count in judged)
    row = Row(LATENT, answers).as_dict()
    assert row["nats"] == pytest.approx(total)
    assert row["perplexity"] == pytest.approx(math.exp(total))
    assert row["passes"] == 4


def test_answers_do_not_depend_on_the_batch_size_but_on_the_seed(answer_set):
    texts = answer_set().answers(LATENT).texts
    assert answer_set(batch_size=2).answers(LATENT).texts == texts
    assert answer_set(seed=7).answers(LATENT).texts != texts


def test_real_answers_are_cut_where_generated_ones_are(answer_set):
    assert answer_set(gen_length=4).real().figures()["length"].value == 4
    assert answer_set(gen_length=64).real().figures()["length"].value > 4


def test_questions_and_answers_that_spell_special_tokens_are_text(answer_set):
    spelt = [Example(f"What is {i} <|mask|>?", "It is <|end|> and on.") for i in range(2)]
    answers = answer_set(spelt, gen_length=64)
    assert answers.answers(Setting("latent", "low_confidence", 2, {"temperature": 0.0})).passes
    ends = [Example(example.prompt, "It is") for example in spelt]
    lengths = [
        len(answers.real().tokens[0]) for answers in (answers, answer_set(ends, gen_length=64))
    ]
    assert lengths[0] > lengths[1] + 4


def test_what_cannot_be_answered_is_an_error_that_says_why(answer_set):
    with pytest.raises(ValueError, match="must be at least 2, for errors, got 1"):
        answer_set(TEST[:1])
    with pytest.raises(ValueError, match="`passes` must be from 1 to the window's 4"):
        answer_set().answers(Setting("latent", "low_confidence", 5))


def test_killed_run_takes_whole_lines_as_done_and_repeats_a_torn_one(
    answer_set, generated, tmp_path
):
    path = tmp_path / "samples.jsonl"
    other = Setting("factorized", "low_confidence", 1)
    first = [answer_set(store=AnswerStore(path)).answers(s) for s in (LATENT, other)]
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    generated.clear()
    again = [answer_set(store=AnswerStore(path)).answers(s) for s in (LATENT, other)]
    assert [setting for _, setting in generated] == [other]
    assert again[0] == first[0]
    assert again[1].texts == first[1].texts
    assert path.read_bytes().count(b"\n") == whole.count(b"\n") == 2
    assert [json.loads(line)["answers"]["texts"] for line in path.open()] == [
        answers.texts for answers in first
    ]


def test_kept_answers_of_other_weights_questions_or_seeds_are_not_taken(
    pipe, answer_set, generated, tmp_path
):
    store = AnswerStore(tmp_path / "samples.jsonl")
    answer_set(store=store).answers(LATENT)
    answer_set(store=store).answers(LATENT)
    assert len(generated) == 1
    answer_set(store=store, seed=1).answers(LATENT)
    answer_set(VALIDATION, store=store).answers(LATENT)
    assert len(generated) == 3
    weight = pipe.model.coupling_head.initial
    with torch.no_grad():
        weight += 1
        answer_set(store=store).answers(LATENT)
        weight -= 1
    assert len(generated) == 4


def test_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "notes.jsonl"
    path.write_text('{"question": "3 + 4?"}\n')
    with pytest.raises(ValueError, match="is no file of judged answers"):
        AnswerStore(path)
    assert path.read_text() == '{"question": "3 + 4?"}\n'


def test_best_is_the_likeliest_that_keeps_entropy_or_else_the_most_diverse():
    grid = rows("latent", (1, 1.0, 2.0), (2, 2.0, 5.0), (3, 3.0, 6.0))
    assert best(grid, 4.0).setting.passes == 2
    assert best(grid, 1.0).setting.passes == 1
    assert best(grid, 7.0).setting.passes == 3


def test_settings_are_chosen_by_validation_data_alone(answer_set, generated):
    result = measure_quality(plan(), answer_set(), answer_set(VALIDATION), progress=False)
    chosen_on = [setting for prompt, setting in generated if prompt == VALIDATION[0].prompt]
    assert [(s.sampling, s.passes) for s in chosen_on] == [
        (mode, passes) for mode in ("factorized", "latent") for passes in (1, 1, 4, 4)
    ]
    assert chosen_on == [row.setting for row in result.choices]
    least = 0.9 * answer_set(VALIDATION).real().figures()["entropy"].value
    for at, row in enumerate(result.rows):
        same = result.choices[2 * at : 2 * at + 2]
        assert row.setting.draw == best(same, least).setting.draw
    on_test = [setting for prompt, setting in generated if prompt == TEST[0].prompt]
    assert on_test == [row.setting for row in result.rows]


def test_factorized_decoding_has_no_temperature_but_its_own(answer_set):
    one = plan(factorized_grid=["temperature=0.5"], coupled_grid=["temperature=0.5"])
    result = measure_quality(one, answer_set(), None, progress=False)
    assert result.rows[0].setting.draw == {"evidence_temperature": 1.0, "temperature": 0.5}
    assert result.rows[-1].setting.draw == {"temperature": 0.5}
    assert result.choices == []


def test_choosing_on_what_is_reported_is_an_error(answer_set):
    with pytest.raises(ValueError, match="`validation` is needed to choose among 2 settings"):
        measure_quality(plan(), answer_set(), None, progress=False)
    overlapping = [*VALIDATION, TEST[1]]
    with pytest.raises(ValueError, match="shares 1 questions with `test`, such as '1 "):
        measure_quality(plan(), answer_set(), answer_set(overlapping), progress=False)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"strategies": ["margin", "luck"]}, "`strategy` must be"),
        ({"passes": [1, 5]}, "`passes` must be from"),
        ({"coupled_grid": ["temperature=warm", "temperature=1"]}, "A grid must hold settings like"),
        ({"coupled_grid": ["temperature=-1", "temperature=1"]}, "`temperature`"),
    ],
)
def test_bad_setting_is_found_before_anything_is_generated(answer_set, generated, bad, said):
    with pytest.raises(ValueError, match=said):
        measure_quality(plan(**bad), answer_set(), answer_set(VALIDATION), progress=False)
    assert generated == []


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"coupled_grid": ["temperature=0.5"]}, "equally many settings, at least one, got 2 and 1"),
        ({"samplings": ["factorized"]}, "must be coupled modes"),
        ({"passes": []}, "`passes` must not be empty"),
        ({"entropy_tolerance": 1.5}, "`entropy_tolerance` must be at most 1"),
    ],
)
def test_plan_that_cannot_be_is_an_error(bad, said):
    with pytest.raises(ValueError, match=said):
        plan(**bad)


def test_strategies_are_measured_on_both_sides_and_adaptive_ones_use_what_they_need(answer_set):
    small = plan(
        passes=[2],
        strategies=["margin", "threshold"],
        thresholds=[0.0],
        factorized_grid=["temperature=1"],
        coupled_grid=["temperature=1"],
    )
    result = measure_quality(small, answer_set(), None, progress=False)
    settings = [row.setting for row in result.rows]
    assert [(s.sampling, s.strategy, s.passes) for s in settings] == [
        (mode, strategy, passes)
        for mode in ("factorized", "latent")
        for strategy, passes in (("margin", 2), ("threshold", 4))
    ]
    # Everything is sure enough at once: a pass for each of the two windows.
    assert [row.figures["passes"].value for row in result.rows] == [4, 2, 4, 2]
    assert [match.coupled.setting.strategy for match in result.matches] == ["margin"]


def test_factorized_passes_are_those_that_reach_the_nats_and_keep_the_entropy():
    factorized = rows("factorized", (1, 4.0, 6.0), (2, 3.0, 6.0), (4, 1.9, 4.0), (8, 1.5, 5.5))
    coupled = rows("latent", (1, 3.5, 6.0), (2, 2.0, 5.0), (4, 1.0, 5.0), (8, 0.5, 4.0))
    one, two, four, eight = find_matches([*coupled, *factorized], 5.0)
    assert (one.measured, two.measured, four.measured, eight.measured) == (2, 8, None, None)
    # Halfway in nats between 1 and 2 passes, on the scale of their logarithm.
    assert one.passes == pytest.approx(2**0.5)
    assert one.ratio == pytest.approx(2**0.5)
    # From 4 to 8 passes only the entropy was lacking, by 1.0, and 0.5 is to spare.
    assert two.passes == pytest.approx(4 * 2 ** (1 / 1.5))
    assert two.ratio == pytest.approx(two.passes / 2)
    assert four.keeps_entropy
    assert four.most == 8
    assert not eight.keeps_entropy
    assert two.differences[4].value == pytest.approx(-0.1)
    assert two.differences[4].error == pytest.approx(0, abs=1e-9)
    cells = [match.cells() for match in (one, two, four, eight)]
    said = ["1.4 (2)", "6.3 (8)", "> 8", "entropy too low"]
    assert [cell["factorized passes"] for cell in cells] == said
    assert cells[2]["ratio"] == "> 2"


def test_command_writes_the_figures_and_continues_from_its_samples(
    judge, generated, tmp_path, capsys
):
    folder = save_tiny_pipeline(tmp_path / "pipeline")
    for part in judge:
        part.save_pretrained(tmp_path / "judge")
    for name, examples in (("test", TEST), ("validation", VALIDATION)):
        lines = [json.dumps({"question": e.prompt, "answer": e.answer}) for e in examples]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    output = tmp_path / "quality.json"
    argv = ["evaluate", "quality", "--model", str(folder), "--judge", str(tmp_path / "judge")]
    argv += ["--dataset", str(tmp_path / "test.jsonl"), "--output", str(output)]
    argv += ["--choose-on", str(tmp_path / "validation.jsonl"), "--gen-length", "8"]
    argv += ["--samplings", "latent", "--passes", "1", "4", "--chosen-at", "4"]
    argv += ["--factorized-grid", "temperature=0", "temperature=1,top_p=0.9"]
    argv += ["--coupled-grid", "evidence_temperature=0.5", "temperature=0.5,top_p=0.9"]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    result = json.loads(output.read_text())
    assert "| latent | low_confidence | 4 | " in printed
    assert result["environment"]["problems"] == 3
    assert [len(result[name]) for name in ("choices", "rows", "matches")] == [4, 4, 2]
    assert len(generated) == 8
    generated.clear()
    assert main(argv) == 0
    assert generated == []
    assert json.loads(output.read_text()) == result
