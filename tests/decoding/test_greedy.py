"""Promises at temperature 0: equal calls give equal tokens, and no generator is read."""

from __future__ import annotations

import pytest
import torch
from windows import HEAD, LENGTH, MASK, VOCAB, window

from codd_hf import CoDDModel, CoDDPipeline, CoDDScheduler
from tiny import SAMPLING, STRATEGIES, enumerate_window, random_head, tiny_backbone

PROMPTS = [[5, 6, 7], [9, 4], [3, 8, 10, 11]]


@pytest.fixture(scope="module")
def pipe():
    model = CoDDModel.from_backbone(tiny_backbone(), random_head())
    pipe = CoDDPipeline(model=model, scheduler=CoDDScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tokens(pipe, prompts=PROMPTS, seed: int = 0, **call) -> list[list[int]]:
    torch.manual_seed(seed)
    call = {"gen_length": 8, "block_length": 4, "num_inference_steps": 4, **call}
    return pipe(input_ids=prompts, output_type="seq", **call).sequences.tolist()


@pytest.mark.parametrize("number", range(len(STRATEGIES)))
@pytest.mark.parametrize("sampling", SAMPLING)
def test_greedy_tokens_depend_on_no_seed_no_generator_and_no_batchmate(pipe, sampling, number):
    """Every mode meets every strategy; paradigm and activation change along."""
    call = {"sampling": sampling, "strategy": list(STRATEGIES)[number], "temperature": 0}
    call |= {
        "paradigm": ("block", "full")[number % 2],
        "activation_ratio": (1, 0.5)[number % 3 == 1],
    }
    expected = tokens(pipe, **call)
    generator = torch.Generator().manual_seed(7)
    before = generator.get_state()
    assert tokens(pipe, seed=1, generator=generator, **call) == expected
    assert torch.equal(generator.get_state(), before)
    row, state = number % len(PROMPTS), torch.get_rng_state()
    assert tokens(pipe, [PROMPTS[row]], seed=1, **call) == [expected[row]]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kwargs", [{"do_sample": False}, {"temperature": 0}, {}])
def test_generate_without_sampling_repeats_itself(pipe, kwargs):
    call = {"max_new_tokens": 8, "strategy": "random", **kwargs}
    outputs = [pipe.model.generate(torch.tensor(PROMPTS[:1]), **call) for _ in range(2)]
    assert torch.equal(*outputs)


def test_greedy_latent_takes_the_best_token_of_each_latent_on_the_most_probable_path():
    """By enumeration of all paths and tokens."""
    open_window = torch.tensor([MASK] * LENGTH)
    initial, transition, emission = (t.detach().double().exp() for t in HEAD.potentials.tensors())
    distribution = window(open_window.tolist())
    phi = distribution.factorized_logits[0].double().exp()
    evidence = emission[0] @ phi.T  # [H, L]
    paths = torch.cartesian_prod(*[torch.arange(len(initial))] * LENGTH)
    weights = initial[paths[:, 0]] * evidence[paths[:, 0], 0]
    for i in range(1, LENGTH):
        weights = weights * transition[0, paths[:, i - 1], paths[:, i]] * evidence[paths[:, i], i]
    best = paths[weights.argmax()]
    expected = (emission[0][best] * phi).argmax(-1)
    completions, probs = enumerate_window(HEAD, phi.log(), open_window, MASK)
    assert torch.isclose(weights.sum() / weights.sum(), probs.sum())
    assert len(completions) == VOCAB**LENGTH
    scheduler = CoDDScheduler(sampling="latent")
    scheduler.set_timesteps(1)
    output = scheduler.step(distribution, 1.0, open_window[None])
    assert output.prev_sample[0].tolist() == expected.tolist()


def test_top_k_of_one_still_draws_the_path():
    scheduler = CoDDScheduler(sampling="latent", temperature=1.0, top_k=1)
    scheduler.set_timesteps(1)
    sample = torch.full((64, LENGTH), MASK)
    output = scheduler.step(window([MASK] * LENGTH, 64), 1.0, sample)
    assert len(output.prev_sample.unique(dim=0)) > 1
