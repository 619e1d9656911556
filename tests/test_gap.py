"""Promises of the measured gap between one parallel step and one token at a time."""

from __future__ import annotations

import pytest
import torch

from codd_hf import CoDDHead, CoDDModel, CoDDPipeline
from codd_hf.data.canvases import TokenizedExample, tokenize_examples
from codd_hf.data.sources import load_examples
from codd_hf.evaluation import GapSettings
from codd_hf.evaluation.gap import SMALLEST_GAP, TEMPERED, measure_gap
from tiny import correlated_examples, enumerate_window, head_config, random_head, tiny_backbone

EXAMPLES = correlated_examples(6)


@pytest.fixture(scope="module")
def rows(trained_pipeline):
    pipe = CoDDPipeline.from_pretrained(trained_pipeline)
    examples = load_examples(str(trained_pipeline / "test.jsonl"))
    raw = CoDDHead.from_pretrained(trained_pipeline / "generative")
    raw.set_alpha(0.0)
    return measure_gap(
        pipe.model,
        {"raw product": raw, "fitted": pipe.model.coupling_head},
        pipe.tokenizer,
        tokenize_examples(examples, pipe.tokenizer),
        GapSettings(ratios=[0.25, 0.75, 1.0]),
    )


def random_model(tokenizer, **head) -> CoDDModel:
    size = len(tokenizer)
    backbone = tiny_backbone(vocab_size=size, pad_token_id=0, eos_token_id=2)
    return CoDDModel.from_backbone(backbone, random_head(size, mask_token_id=1, **head))


def measured(model, tokenizer, **options):
    """The only row of a measurement of a model's own head."""
    examples = options.pop("examples", EXAMPLES)
    settings = GapSettings(**{"ratios": [0.5]} | options)
    heads = {"head": model.coupling_head}
    (row,) = measure_gap(model, heads, tokenizer, examples, settings)
    return row


def values(row) -> dict[str, float]:
    return {name: getattr(figure, "value", figure) for name, figure in row.items()}


def test_one_token_at_a_time_is_no_worse_than_one_step_and_the_fitted_head_is_between(rows):
    for row in rows:
        nats = values(row)
        assert nats["sequential"] <= nats["factorized"] + 1e-4
        assert nats["fitted"] <= nats["factorized"] + 1e-4
        assert row["fitted"].error > 0
    assert nats["sequential"] < nats["factorized"] - 0.1
    assert nats["fitted"] < nats["factorized"] - 0.1


def test_gap_closed_is_the_gain_over_the_gap_and_absent_where_the_gap_is_small(rows):
    assert rows[0]["gap closed, fitted, %"] is None
    last = values(rows[-1])
    gap = last["factorized"] - last["sequential"]
    assert gap > SMALLEST_GAP
    gain = last["factorized"] - last["fitted"]
    assert last["gain, fitted"] == pytest.approx(gain, abs=1e-6)
    assert last["gap closed, fitted, %"] == pytest.approx(100 * gain / gap, abs=1e-4)
    assert last["gap closed, fitted, %"] > 20


def test_evidence_temperature_reaches_the_heads_and_is_by_default_their_own(tiny_tokenizer):
    backbone = tiny_backbone(vocab_size=len(tiny_tokenizer), initializer_range=0.3)
    new = head_config(len(tiny_tokenizer), mask_token_id=1)  # changes nothing
    model = CoDDModel.from_backbone(backbone, new)
    plain = measured(model, tiny_tokenizer, sequential=False)
    assert list(plain) == ["mask ratio", "factorized", "head", "gain, head"]
    assert plain["gain, head"].value == pytest.approx(0, abs=1e-4)
    tempered = measured(model, tiny_tokenizer, sequential=False, evidence_temperature=2.0)
    nats = values(tempered)
    assert nats["factorized"] == plain["factorized"].value
    assert nats["head"] == pytest.approx(nats[TEMPERED], abs=1e-5)
    assert abs(nats["head"] - plain["head"].value) > 1e-2
    model.coupling_head.config.evidence_temperature = 2.0
    again = measured(model, tiny_tokenizer, sequential=False)
    assert values(again) == nats


def test_nats_are_those_of_enumeration_on_a_visible_window(tiny_tokenizer):
    """A small vocabulary in the last window, where nothing follows that would be hidden."""
    model = CoDDModel.from_backbone(
        tiny_backbone(vocab_size=8, eos_token_id=2), random_head(8, mask_token_id=1)
    )
    example = TokenizedExample([3], [4, 6, 5, 7, 2])
    row = measured(model, tiny_tokenizer, examples=[example], ratios=[1.0])
    ids = torch.tensor([[3] + [1] * 8])
    logits = model(ids).logits[0, 1:5]
    window = torch.ones(4, dtype=torch.long)
    values, probabilities = enumerate_window(model.coupling_head, logits, window, 1)
    right = (values == torch.tensor([4, 6, 5, 7])).all(1)
    expected = -probabilities[right].log().item() / 4
    assert row["head"].value == pytest.approx(expected, abs=1e-4)
    log_phi = logits.index_fill(-1, torch.tensor([1]), -torch.inf).log_softmax(-1)
    factorized = -log_phi[torch.arange(4), torch.tensor([4, 6, 5, 7])].mean().item()
    assert row["factorized"].value == pytest.approx(factorized, abs=1e-4)
    total, ids = 0.0, ids.clone()
    for i, token in enumerate((4, 6, 5, 7)):
        log_phi = model(ids).logits[0, 1 + i]
        log_phi = log_phi.index_fill(-1, torch.tensor([1]), -torch.inf).log_softmax(-1)
        total -= log_phi[token].item()
        ids[0, 1 + i] = token
    assert row["sequential"].value == pytest.approx(total / 4, abs=1e-4)


def test_figures_do_not_depend_on_the_batch_size(tiny_tokenizer):
    model = random_model(tiny_tokenizer)
    one, four = (measured(model, tiny_tokenizer, batch_size=size) for size in (1, 4))
    assert values(four) == pytest.approx(values(one), rel=1e-5, abs=1e-4)


def test_what_cannot_be_measured_is_an_error_that_says_why(tiny_tokenizer):
    with pytest.raises(ValueError, match="`ratios` must be at most 1, got"):
        measured(random_model(tiny_tokenizer), tiny_tokenizer, ratios=[0.5, 1.5])
