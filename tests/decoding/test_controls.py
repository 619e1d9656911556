"""Controls of what is generated: penalties, processors, forbidden and forced tokens, lengths."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, RepetitionPenaltyLogitsProcessor
from windows import LENGTH, MASK, VOCAB, one_step, window

from codd_hf import CoDDPipeline, CoDDScheduler
from tiny import tiny_model

OPEN = [MASK] * LENGTH
MODES = ["factorized", "latent", "any_order", "marginal", "viterbi"]
SHORT = {"gen_length": 8, "block_length": 4, "num_inference_steps": 4}
PROMPT = torch.tensor([[3, 4, 5]])
EOS = 1


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def pipe(model):
    pipe = CoDDPipeline(model=model, scheduler=CoDDScheduler(evidence_temperature=2.0))
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Recorder(LogitsProcessor):
    """Remembers what it was shown and rules one token out."""

    def __init__(self, never: int):
        self.never = never
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append((input_ids, scores.clone()))
        return scores.index_fill(-1, torch.tensor([self.never]), -torch.inf)


@pytest.mark.parametrize("sampling", MODES)
def test_repetition_penalty_is_that_of_transformers(model, sampling):
    def run(seed, **controls):
        return model.generate(
            PROMPT,
            **SHORT,
            sampling=sampling,
            temperature=1.0,
            generator=torch.Generator().manual_seed(seed),
            **controls,
        )

    changed = 0
    for seed in range(2):
        ours = run(seed, repetition_penalty=4.0)
        theirs = run(seed, logits_processor=RepetitionPenaltyLogitsProcessor(4.0))
        assert torch.equal(ours, theirs)
        changed += not torch.equal(ours, run(seed))
    assert changed or sampling == "viterbi"


def test_mask_tokens_and_padding_do_not_count_as_repeated(model):
    """Penalising the mask token would change nothing that can be drawn; padding could."""
    padded = torch.tensor([[0, 0, 3, 4, 5]])
    mask = (padded != 0).long()
    settings = {**SHORT, "sampling": "marginal", "repetition_penalty": 3.0}
    ours = model.generate(padded, attention_mask=mask, **settings)
    assert torch.equal(ours[:, 2:], model.generate(PROMPT, **settings))


@pytest.mark.parametrize("sampling", MODES)
def test_processors_see_the_known_tokens_of_each_row_in_order(model, sampling):
    recorder = Recorder(never=7)
    canvases = []
    sequences = model.generate(
        torch.tensor([[0, 3, 4], [5, 6, 7]]),
        attention_mask=torch.tensor([[0, 1, 1], [1, 1, 1]]),
        scheduler=CoDDScheduler(sampling=sampling, temperature=1.0, strategy="left_to_right"),
        **SHORT,
        logits_processor=LogitsProcessorList([recorder]),
        eos_token_id=[],
        on_step=lambda step, t, state: canvases.append(state["canvas"]),
    )
    assert not (sequences[:, 3:] == 7).any()
    text = [sequences[0, 1:].tolist(), sequences[1].tolist()]
    for ids, scores in recorder.seen:
        assert ids.shape[0] == len(scores)
        row = 0 if int(ids[0, 0]) == 3 else 1
        assert ids[0].tolist() == text[row][: ids.shape[1]]
        assert (ids == ids[0]).all()
        assert scores.shape[1] == 12
    lengths = {ids.shape[1] for ids, _ in recorder.seen}
    assert lengths >= ({2, 3, 4, 5} if sampling == "any_order" else {2, 3, 4, 6})


def test_pred_logits_are_those_after_the_processors():
    recorder = Recorder(never=4)
    scheduler = CoDDScheduler(sampling="marginal", temperature=1.0)
    scheduler.set_timesteps(1)
    output = scheduler.step(window(OPEN), 1.0, torch.tensor([OPEN]), logits_processor=recorder)
    expected = window(OPEN).marginals.index_fill(-1, torch.tensor([4]), 0)
    expected = expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(output.pred_logits.exp(), expected)


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (lambda scores: None, "must be a tensor, an array, or rows of equal length, got None"),
        (lambda scores: scores[:, :3], "must have shape (4, 12), got (4, 3)"),
        (lambda scores: scores.long(), "must be floating-point numbers, got torch.int64"),
    ],
)
def test_processors_that_return_no_scores_are_named(model, returned, said):
    with pytest.raises((TypeError, ValueError)) as error:
        model.generate(PROMPT, logits_processor=lambda ids, scores: returned(scores), **SHORT)
    assert str(error.value) == f"`scores` of `logits_processor` {said}."


@pytest.mark.parametrize("sampling", MODES)
def test_forbidden_tokens_lose_their_potential_before_the_circuit_sees_them(sampling):
    """Not renormalised afterwards: the law of the others is the one given their absence."""
    output = one_step(
        OPEN, 300, sampling=sampling, temperature=1.0, forbidden_token_ids=[0, 3],
        strategy="left_to_right",
    )  # fmt: skip
    assert not torch.isin(output.prev_sample, torch.tensor([0, 3, MASK])).any()
    if sampling == "marginal":
        law = window(OPEN).without(torch.tensor([0, 3])).marginals
        torch.testing.assert_close(output.pred_logits[0, 0].exp(), law[0, 0])
    plain = torch.zeros(5, LENGTH, VOCAB)
    scheduler = CoDDScheduler(temperature=1.0, mask_token_id=MASK)
    scheduler.set_timesteps(1)
    output = scheduler.step(plain, 1.0, torch.full((5, LENGTH), MASK), forbidden_token_ids=[0, 3])
    assert not torch.isin(output.prev_sample, torch.tensor([0, 3, MASK])).any()


@pytest.mark.parametrize("sampling", MODES)
def test_end_of_text_never_comes_before_the_minimum_length(pipe, sampling):
    ends = []
    for seed in range(6):
        output = pipe(
            input_ids=[[3, 4, 5], [6, 7]],
            **SHORT,
            sampling=sampling,
            temperature=50.0,
            eos_token_id=EOS,
            min_new_tokens=[5, 8],
            generator=torch.Generator().manual_seed(seed),
            output_type="seq",
        )
        ends += (output.sequences[0] == EOS).nonzero()[:, 0].tolist()
        assert not (output.sequences[1] == EOS).any()
    assert all(end >= 5 for end in ends)
    assert ends or sampling == "viterbi"


def test_minimum_length_under_the_name_of_transformers(model):
    kwargs = {**SHORT, "temperature": 8.0, "eos_token_id": EOS}
    for seed in range(4):
        ids = model.generate(
            PROMPT, min_new_tokens=8, generator=torch.Generator().manual_seed(seed), **kwargs
        )
        assert not (ids[:, 3:] == EOS).any()


@pytest.mark.parametrize("sampling", MODES)
def test_forced_tokens_stand_where_they_were_put_and_condition_the_rest(pipe, sampling):
    kwargs = {**SHORT, "sampling": sampling, "output_type": "seq", "eos_token_id": []}
    forced = [{0: 9, 5: 10}, {}]
    output = pipe(
        input_ids=[[3, 4, 5], [3, 4, 5]],
        forced_tokens=forced,
        generator=[torch.Generator().manual_seed(0) for _ in range(2)],
        **kwargs,
    )
    assert output.sequences[0, [0, 5]].tolist() == [9, 10]
    assert not torch.equal(output.sequences[0], output.sequences[1])
    first = []
    pipe(
        input_ids=[3, 4, 5],
        forced_tokens={0: 9},
        callback_on_step_end=lambda p, s, t, kw: first.append(kw["canvas"]) or {},
        **kwargs,
    )
    assert all(int(canvas[0, 3]) == 9 for canvas in first)


def test_text_that_is_forced_throughout_costs_no_pass():
    forced = {place: 3 + place for place in range(4)}
    for paradigm in ("block", "full"):
        model = tiny_model()
        text = model.generate([[5, 6]], max_new_tokens=4, forced_tokens=forced, paradigm=paradigm)
        assert text.tolist() == [[5, 6, 3, 4, 5, 6]]


def test_block_of_forced_tokens_costs_no_pass_and_leaves_its_steps_to_the_others(pipe):
    output = pipe(
        input_ids=[[3, 4, 5], [3, 4, 5]],
        forced_tokens=[dict.fromkeys(range(4), 9), {}],
        **SHORT,
        output_type="seq",
        eos_token_id=[],
    )
    assert output.passes_per_row.tolist() == [4, 4]
    assert output.num_passes == 6  # four for a block of each, and two for the second of one


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"min_new_tokens": 9}, "`min_new_tokens` must be at most 8, got 9"),
        ({"min_new_tokens": -1}, "`min_new_tokens` must be at least 0, got -1"),
        ({"min_new_tokens": [1, 2]}, "`min_new_tokens` must have one entry per prompt (1), got 2"),
        ({"forced_tokens": {8: 3}}, "`forced_tokens` must be at most 7, got 8"),
        ({"forced_tokens": {0: 2}}, "other tokens than the mask token (2)"),
        ({"forced_tokens": {0: 12}}, "`forced_tokens` must be at most 11, got 12"),
        ({"forced_tokens": [{}, {}]}, "`forced_tokens` must have one entry per prompt (1), got 2"),
        ({"repetition_penalty": 0}, "`repetition_penalty` must be at least 1e-06"),
        ({"forbidden_token_ids": [-1]}, "`forbidden_token_ids` must be at least 0, got -1"),
        ({"threshold": 1.2}, "`threshold` must be at most 1, got 1.2"),
    ],
)
def test_bad_controls_get_one_clear_sentence(pipe, kwargs, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        pipe(input_ids=[3, 4, 5], **SHORT, output_type="seq", **kwargs)
