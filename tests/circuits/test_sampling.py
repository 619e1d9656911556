"""`sample` and `sample_latents`: frequencies against enumerated probabilities (chi-square)."""

import pytest
import torch
from agreement import assert_drawn_from, counts_of
from cases import (
    ALL,
    AWKWARD,
    CASES,
    STRUCTURED,
    STRUCTURES,
    TOP_K,
    enumerations,
    impossible_case,
    random_case,
)

DRAWS = 6000


def generators(rows):
    return [torch.Generator().manual_seed(100 + row) for row in rows]


@pytest.mark.parametrize("name", ALL)
def test_samples_follow_the_joint(name):
    ours = ALL[name].distribution()
    drawn = ours.sample((DRAWS,), generator=torch.Generator().manual_seed(1))
    seen = ours.observed.expand_as(drawn)
    assert torch.equal(drawn[seen], ours.tokens.expand_as(drawn)[seen])
    assert (drawn[~ours.present.expand_as(drawn)] == 0).all()
    for row, exact in enumerate(enumerations(name)):
        if exact.positions:
            counts = counts_of(drawn[:, row, exact.positions], exact.tokens)
            assert_drawn_from(counts, exact.log_prob.exp())


@pytest.mark.parametrize(
    "name", ["untied", "absent anywhere", "hard zeros, everything", "top 2, everything", *AWKWARD]
)
def test_latent_samples_follow_their_joint_posterior(name):
    for row, exact in enumerate(enumerations(name)[:3]):
        if exact.positions:
            repeated = ALL[name].rows([row] * DRAWS).distribution()
            drawn = repeated.sample_latents(torch.Generator().manual_seed(2))[:, exact.positions]
            assert_drawn_from(counts_of(drawn, exact.latents), exact.path_prob)


def test_latents_and_tokens_drawn_in_two_steps_follow_the_joint():
    (exact, *_), generator = enumerations("untied"), torch.Generator().manual_seed(3)
    ours = CASES["untied"].rows([0] * DRAWS).distribution()
    probs = ours.logits_given(ours.sample_latents(generator)).exp()
    tokens = torch.multinomial(probs.flatten(0, 1), 1, generator=generator).view(DRAWS, -1)
    assert_drawn_from(counts_of(tokens, exact.tokens), exact.log_prob.exp())


def test_forbidden_tokens_and_zero_potentials_are_never_drawn():
    for name in ("forbidden token", "hard zeros", "one-hot evidence by logits"):
        ours = CASES[name].distribution()
        drawn = ours.sample((500,), generator=torch.Generator().manual_seed(0))
        assert ours.log_prob(drawn).isfinite().all()


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_sample_shape_comes_first(shape):
    assert random_case(81).distribution().sample(shape).shape == (*shape, 3, 4)


@pytest.mark.parametrize(
    "name", ["untied", "absent anywhere", *AWKWARD, *STRUCTURES, *STRUCTURED, *TOP_K]
)
def test_a_row_with_its_own_generator_draws_the_same_alone_and_in_a_batch(name):
    case, rows = ALL[name], range(len(ALL[name]))
    ours = case.distribution()
    together, latents = ours.sample((5,), generators(rows)), ours.sample_latents(generators(rows))
    for row in rows:
        alone, present = case.rows([row]).distribution(), ours.present[row]
        assert torch.equal(alone.sample((5,), generators([row]))[:, 0], together[:, row])
        path = alone.sample_latents(generators([row]))[0]
        assert torch.equal(path[present], latents[row][present])


def test_the_same_seed_draws_the_same_and_another_does_not():
    ours = random_case(82, batch=8, observed="none").distribution()
    first, again, other = (
        ours.sample((10,), generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_as_many_generators_as_rows_are_needed():
    with pytest.raises(ValueError, match=r"one entry per row \(3\), got 2"):
        random_case(83).distribution().sample(generator=[torch.Generator()] * 2)


def test_an_impossible_row_gives_tokens_that_the_backbone_allows():
    drawn = impossible_case().distribution().sample((50,), torch.Generator().manual_seed(0))
    assert (drawn[:, 0, 2] == 3).all()
