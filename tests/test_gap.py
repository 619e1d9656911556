"""Promises of the measured gap between one parallel step and one token at a time."""

from __future__ import annotations

import pytest
import torch

from codd_hf import CoDDHead, CoDDModel, CoDDPipeline
from codd_hf.data.canvases import TokenizedExample, load_examples, tokenize_examples
from codd_hf.evaluation.gap import SMALLEST_GAP, TEMPERED, gap_table, measure_gap
from tiny import correlated_examples, enumerate_window, head_config, random_head, tiny_backbone

EXAMPLES = correlated_examples(6)


@pytest.fixture(scope="module")
def rows(trained_pipeline):
    pipe = CoDDPipeline.from_pretrained(trained_pipeline)
    examples = load_examples(str(trained_pipeline / "test.jsonl"))
    raw = CoDDHead.from_pretrained(trained_pipeline / "stage1")
    raw.set_alpha(0.0)
    return measure_gap(
        pipe.model,
        {"raw product": raw, "fitted": pipe.model.coupling_head},
        pipe.tokenizer,
        tokenize_examples(examples, pipe.tokenizer),
        ratios=(0.25, 0.75, 1.0),
        progress=False,
    )


def random_model(tokenizer, **head) -> CoDDModel:
    size = len(tokenizer)
    backbone = tiny_backbone(vocab_size=size, pad_token_id=0, eos_token_id=2)
    return CoDDModel.from_backbone(backbone, random_head(size, mask_token_id=1, **head))


def test_one_token_at_a_time_is_no_worse_than_one_step_and_the_fitted_head_is_between(rows):
    for row in rows:
        assert row.nats["sequential"] <= row.nats["factorized"] + 1e-4
        assert row.nats["fitted"] <= row.nats["factorized"] + 1e-4
    last = rows[-1]
    assert last.nats["sequential"] < last.nats["factorized"] - 0.1
    assert last.nats["fitted"] < last.nats["factorized"] - 0.1


def test_gap_closed_is_the_gain_over_the_gap_and_absent_where_the_gap_is_small(rows):
    single, last = rows[0], rows[-1]
    assert single.nats["sequential"] == pytest.approx(single.nats["factorized"], abs=1e-4)
    assert single.gap_closed == {"raw product": None, "fitted": None}
    gap = last.nats["factorized"] - last.nats["sequential"]
    assert gap > SMALLEST_GAP
    gain = last.nats["factorized"] - last.nats["fitted"]
    assert last.gains["fitted"] == pytest.approx(gain, abs=1e-6)
    assert last.gap_closed["fitted"] == pytest.approx(gain / gap, abs=1e-6)
    assert last.gap_closed["fitted"] > 0.2


def test_gap_closed_is_absent_where_the_gap_is_there_but_small(tiny_tokenizer):
    backbone = tiny_backbone(vocab_size=len(tiny_tokenizer), initializer_range=0.1)
    model = CoDDModel.from_backbone(backbone, random_head(len(tiny_tokenizer), mask_token_id=1))
    measured = measure_gap(
        model,
        {"head": model.coupling_head},
        tiny_tokenizer,
        EXAMPLES,
        ratios=(0.5, 0.75, 1.0),
        progress=False,
    )
    gaps = [row.nats["factorized"] - row.nats["sequential"] for row in measured]
    assert 0 < max(gaps) < SMALLEST_GAP
    assert all(row.gap_closed == {"head": None} for row in measured)


def test_table_has_a_line_for_each_ratio_and_a_dash_where_there_is_no_gap(rows):
    lines = gap_table(rows).splitlines()
    assert lines[0] == (
        "| mask ratio | factorized | raw product | fitted | sequential "
        "| gain, raw product | gain, fitted | gap closed, raw product | gap closed, fitted |"
    )
    assert len(lines) == 5
    assert lines[2].endswith("| - |")
    assert lines[4].endswith(" % |")


def test_evidence_temperature_reaches_the_heads_and_is_shown_beside_them(tiny_tokenizer):
    backbone = tiny_backbone(vocab_size=len(tiny_tokenizer), initializer_range=0.3)
    new = head_config(len(tiny_tokenizer), mask_token_id=1)  # changes nothing
    model = CoDDModel.from_backbone(backbone, new)

    def measured(temperature: float):
        (row,) = measure_gap(
            model,
            {"head": model.coupling_head},
            tiny_tokenizer,
            EXAMPLES,
            ratios=[0.5],
            evidence_temperature=temperature,
            sequential=False,
            progress=False,
        )
        return row.nats

    plain, tempered = measured(1.0), measured(2.0)
    assert set(plain) == {"factorized", "head"}
    assert tempered["factorized"] == plain["factorized"]
    assert tempered["head"] == pytest.approx(tempered[TEMPERED], abs=1e-5)
    assert abs(tempered["head"] - plain["head"]) > 1e-2


def test_nats_are_those_of_enumeration_on_a_visible_window(tiny_tokenizer):
    """A small vocabulary in the last window, where nothing follows that would be hidden."""
    model = CoDDModel.from_backbone(
        tiny_backbone(vocab_size=8, eos_token_id=2), random_head(8, mask_token_id=1)
    )
    example = TokenizedExample([3], [4, 6, 5, 7, 2])
    (row,) = measure_gap(
        model,
        {"head": model.coupling_head},
        tiny_tokenizer,
        [example],
        ratios=[1.0],
        progress=False,
    )
    ids = torch.tensor([[3] + [1] * 8])
    logits = model(ids).logits[0, 1:5]
    window = torch.ones(4, dtype=torch.long)
    values, probabilities = enumerate_window(model.coupling_head, logits, window, 1)
    right = (values == torch.tensor([4, 6, 5, 7])).all(1)
    assert row.nats["head"] == pytest.approx(-probabilities[right].log().item() / 4, abs=1e-4)
    log_phi = logits.index_fill(-1, torch.tensor([1]), -torch.inf).log_softmax(-1)
    factorized = -log_phi[torch.arange(4), torch.tensor([4, 6, 5, 7])].mean().item()
    assert row.nats["factorized"] == pytest.approx(factorized, abs=1e-4)
    total, ids = 0.0, ids.clone()
    for i, token in enumerate((4, 6, 5, 7)):
        log_phi = model(ids).logits[0, 1 + i]
        log_phi = log_phi.index_fill(-1, torch.tensor([1]), -torch.inf).log_softmax(-1)
        total -= log_phi[token].item()
        ids[0, 1 + i] = token
    assert row.nats["sequential"] == pytest.approx(total / 4, abs=1e-4)


def test_untrained_head_is_measured_as_factorized(tiny_tokenizer):
    model = random_model(tiny_tokenizer)
    heads = {"untrained": CoDDHead(head_config(len(tiny_tokenizer), mask_token_id=1))}
    for row in measure_gap(
        model, heads, tiny_tokenizer, EXAMPLES, ratios=(0.5, 1.0), progress=False
    ):
        assert row.gains["untrained"] == pytest.approx(0, abs=1e-4)


def test_figures_do_not_depend_on_the_batch_size(tiny_tokenizer):
    model = random_model(tiny_tokenizer)
    results = [
        measure_gap(
            model,
            {"head": model.coupling_head},
            tiny_tokenizer,
            EXAMPLES,
            ratios=(0.5,),
            batch_size=size,
            progress=False,
        )[0]
        for size in (1, 4)
    ]
    for name, value in results[0].nats.items():
        assert results[1].nats[name] == pytest.approx(value, abs=1e-4)
        assert results[0].standard_errors[name] > 0


def test_without_the_sequential_ideal_there_is_no_gap_closed(tiny_tokenizer):
    model = random_model(tiny_tokenizer)
    (row,) = measure_gap(
        model,
        {"head": model.coupling_head},
        tiny_tokenizer,
        EXAMPLES,
        ratios=(1.0,),
        sequential=False,
        progress=False,
    )
    assert list(row.nats) == ["factorized", "head"]
    assert row.gap_closed == {}


@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.5])
def test_mask_ratio_outside_zero_to_one_is_an_error(tiny_tokenizer, ratio):
    with pytest.raises(ValueError, match=r"`ratios` must lie in \(0, 1\]"):
        measure_gap(random_model(tiny_tokenizer), {}, tiny_tokenizer, EXAMPLES, ratios=[0.5, ratio])


def test_examples_shorter_than_a_window_are_an_error_that_gives_its_length(tiny_tokenizer):
    with pytest.raises(ValueError, match="no answer of at least 16 tokens"):
        measure_gap(random_model(tiny_tokenizer, window_length=16), {}, tiny_tokenizer, EXAMPLES)
