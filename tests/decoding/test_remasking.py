"""Remasking takes back what the exact conditional given all other tokens makes improbable."""

from __future__ import annotations

import pytest
import torch
from windows import HEAD, LENGTH, LOGITS, MASK, VOCAB, law, one_step

from codd_hf import CoDDModel, CoDDPipeline
from codd_hf.circuits import CoupledCategorical, Potentials
from codd_hf.schedulers.scheduling_codd import CoDDScheduler, CommitMemory
from tiny import random_head, tiny_backbone

OPEN = [MASK] * LENGTH
ENUMERATED = law(OPEN)


def enumerated(tokens: list[int], i: int) -> float:
    """`p(x_i | all other known tokens)` by enumeration, the open window's law."""
    completions, joint = ENUMERATED
    others = torch.ones(len(completions), dtype=torch.bool)
    for place, token in enumerate(tokens):
        if place != i and token != MASK:
            others &= completions[:, place] == token
    agrees = others & (completions[:, i] == tokens[i])
    return float(joint[agrees].sum() / joint[others].sum())


def taken_back(tokens: list[int], judged: list[int], threshold: float) -> set[int]:
    """The least probable first, the others judged again without it."""
    tokens, back = list(tokens), set()
    while True:
        probs = {i: enumerated(tokens, i) for i in judged if i not in back}
        if not probs or min(probs.values()) >= threshold:
            return back
        worst = min(probs, key=probs.get)
        back.add(worst)
        tokens[worst] = MASK


@pytest.mark.parametrize("sampling", ["latent", "marginal", "any_order", "viterbi"])
@pytest.mark.parametrize("threshold", [0.1, 0.3])
def test_tokens_of_a_step_are_judged_by_their_exact_conditional(sampling, threshold):
    settings = {"sampling": sampling, "temperature": 1.0, "evidence_temperature": 2.0}
    settings |= {"strategy": "left_to_right", "mask_token_id": MASK}
    drawn = one_step(OPEN, 60, steps=2, **settings)
    kept = one_step(OPEN, 60, steps=2, remask_threshold=threshold, **settings)
    some = 0
    for row in range(60):
        tokens = drawn.prev_sample[row].tolist()
        back = taken_back(tokens, [0, 1], threshold)
        some += len(back)
        expected = [MASK if i in back else token for i, token in enumerate(tokens)]
        assert kept.prev_sample[row].tolist() == expected
        assert torch.equal(kept.transfer_index[row], kept.prev_sample[row] != MASK)
    assert (some > 0) == (sampling != "viterbi")


def test_tokens_of_earlier_steps_are_judged_by_the_prediction_that_committed_them():
    """The second pass predicts other tokens; the first token's own factor is still the first's."""
    scheduler = CoDDScheduler(
        sampling="marginal",
        strategy="random",
        temperature=1.0,
        evidence_temperature=3.0,
        mask_token_id=MASK,
    )
    scheduler.set_timesteps(LENGTH)
    rows = 200
    memory, sample = CommitMemory(rows, LENGTH), torch.tensor([OPEN] * rows)
    generator = torch.Generator().manual_seed(0)
    went_back = [set() for _ in range(rows)]  # once is all
    counts = {"earlier": 0, "own": 0}
    for steps_left, timestep in zip((4, 3, 2), scheduler.timesteps[:3], strict=True):
        output = scheduler.step(
            window_of(sample),
            timestep,
            sample,
            generator=generator,
            remask_threshold=0.15,
            memory=memory,
        )
        for row in range(rows):
            before, tokens = sample[row].tolist(), sample[row].tolist()
            chosen = output.transfer_index[row] | memory.returned[row]
            own = [
                i
                for i in range(LENGTH)
                if before[i] == MASK and chosen[i] and i not in went_back[row]
            ]
            own += [i for i in went_back[row] if output.transfer_index[row, i]]
            assert len(own) == -(-before.count(MASK) // steps_left)
            for i in own:
                tokens[i] = int(output.sampled_tokens[row, i])
            judged = [i for i in range(LENGTH) if tokens[i] != MASK and i not in went_back[row]]
            back = taken_back(tokens, judged, 0.15)
            expected = [MASK if i in back else token for i, token in enumerate(tokens)]
            assert output.prev_sample[row].tolist() == expected
            earlier = [i in back and i not in own for i in range(LENGTH)]
            counts["earlier"] += any(earlier)
            counts["own"] += any(i in back for i in own)
            went_back[row] |= back
        sample = output.prev_sample
    assert min(counts.values()) > 0


def window_of(sample: torch.Tensor) -> CoupledCategorical:
    """The same prediction in every pass, noise at the observed places as a backbone has it."""
    observed = sample != MASK
    noise = 5 * torch.randn(*sample.shape, VOCAB, generator=torch.Generator().manual_seed(1))
    logits = torch.where(observed[..., None], noise, LOGITS)
    return HEAD(logits, tokens=sample, observed=observed)


def test_the_last_step_takes_nothing_back():
    settings = {"temperature": 1.0, "mask_token_id": MASK, "remask_threshold": 1.0}
    output = one_step(OPEN, 20, steps=1, **settings)
    assert output.transfer_index.all()
    assert (output.prev_sample != MASK).all()


@pytest.mark.parametrize("sampling", ["latent", "any_order", "marginal", "viterbi"])
def test_decoding_ends_although_every_token_goes_back_once(sampling):
    scheduler = CoDDScheduler(
        sampling=sampling, temperature=1.0, remask_threshold=1.0, mask_token_id=MASK
    )
    steps = 3 * LENGTH
    scheduler.set_timesteps(steps)
    memory, sample = CommitMemory(5, LENGTH), torch.tensor([OPEN] * 5)
    generator = torch.Generator().manual_seed(0)
    returned = torch.zeros(5, LENGTH, dtype=torch.bool)
    for timestep in scheduler.timesteps:
        output = scheduler.step(
            window_of(sample), timestep, sample, generator=generator, memory=memory
        )
        went = (sample != MASK) & (output.prev_sample == MASK)
        assert not (went & returned).any()  # a second time
        returned |= went
        sample = output.prev_sample
    assert memory.returned.any()
    assert (sample != MASK).all()


def test_what_the_circuit_did_not_judge_or_the_caller_changed_stays():
    observed = [3, MASK, MASK, MASK]  # the prompt's token is improbable, and stays
    settings = {"sampling": "marginal", "temperature": 1.0, "mask_token_id": MASK}
    output = one_step(observed, 30, steps=3, remask_threshold=1.0, **settings)
    assert (output.prev_sample[:, 0] == 3).all()
    inactive = one_step(OPEN, 30, steps=4, remask_threshold=1.0, activation_ratio=0.5, **settings)
    assert (inactive.transfer_index.sum(-1) == 1).all()

    scheduler = CoDDScheduler(**settings, remask_threshold=0.9, strategy="left_to_right")
    scheduler.set_timesteps(4)
    memory, sample = CommitMemory(30, LENGTH), torch.tensor([OPEN] * 30)
    first = scheduler.step(
        window_of(sample), 1.0, sample, memory=memory, remask_threshold=0.0
    ).prev_sample
    assert (memory.tokens == -1).all()
    first = scheduler.step(
        window_of(sample), 1.0, sample, memory=memory, remask_threshold=1e-9
    ).prev_sample
    assert (memory.tokens[:, 0] >= 0).all()
    changed = first.clone()
    changed[:, 0] = (first[:, 0] + 1) % 2
    output = scheduler.step(window_of(changed), 0.75, changed, memory=memory)
    same = changed[:, 0] == first[:, 0]
    assert torch.equal(output.prev_sample[~same, 0], changed[~same, 0])


def test_repeated_tokens_that_the_circuit_excludes_go_back():
    """A circuit in which no token follows itself, a backbone that is sure of one everywhere."""
    states = 3
    transition = torch.zeros(1, states, states)
    transition[0].fill_diagonal_(-6.0)
    emission = torch.full((1, states, states), -6.0)
    emission[0].fill_diagonal_(0.0)
    logits = torch.tensor([2.0, 0.0, 0.0]).expand(1, 4, -1)
    ours = CoupledCategorical(logits, Potentials(torch.zeros(states), transition, emission))
    tokens = torch.tensor([[0, 0, 1, 0]])
    known = torch.ones(1, 4, dtype=torch.bool)
    log_probs = ours.prediction.log_prob_of(tokens)
    probs = ours.latents.leave_one_out(tokens, known, ours.latents.evidence, log_probs)[0]
    assert probs[0] < 0.1
    assert probs[1] < 0.1
    assert probs[3] > 0.5


@pytest.mark.parametrize("paradigm", ["block", "full"])
def test_rows_with_texts_to_copy_from_of_different_lengths_remask_alone_as_together(paradigm):
    head = random_head(conditioning=["copy"], context_size=16)
    pipe = CoDDPipeline(CoDDModel.from_backbone(tiny_backbone(), head), CoDDScheduler())
    pipe.set_progress_bar_config(disable=True)
    call = {"gen_length": 12, "block_length": 6, "num_inference_steps": 8, "paradigm": paradigm}
    call |= {"remask_threshold": 0.5, "temperature": 1.0, "output_type": "seq"}
    prompts = [[3, 4], [5, 6, 7, 8, 9, 10, 3], [4, 5, 6]]
    generators = [torch.Generator().manual_seed(row) for row in range(3)]
    together = pipe(input_ids=prompts, generator=generators, **call).sequences
    for row, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(row)
        alone = pipe(input_ids=prompt, generator=[generator], **call).sequences
        assert torch.equal(alone[0], together[row])


def test_remasking_needs_the_mask_token_and_the_circuit():
    settings = {"temperature": 1.0, "remask_threshold": 1.0, "mask_token_id": MASK}
    output = one_step(OPEN, steps=2, sampling="factorized", **settings)
    assert output.transfer_index.sum() == 2
    with pytest.raises(ValueError, match="`mask_token_id` is not known"):
        one_step(OPEN, steps=2, remask_threshold=0.1)
    with pytest.raises(ValueError, match="`remask_threshold` must be at most 1"):
        CoDDScheduler(remask_threshold=1.5)
