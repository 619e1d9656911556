"""`sample` and `sample_latents`: frequencies against enumerated probabilities (chi-square)."""

import pytest
import torch
from agreement import assert_drawn_from
from cases import ALL, AWKWARD, CASES, STRUCTURED, STRUCTURES, TOP_K, impossible_case, random_case

DRAWS = 6000


def counts_of(drawn: torch.Tensor, outcomes: torch.Tensor) -> torch.Tensor:
    """How often each row of `outcomes` `[X, n]` occurs in `drawn` `[N, n]`."""
    base = int(max(drawn.max(), outcomes.max())) + 1
    weights = base ** torch.arange(outcomes.shape[1])
    code = (outcomes * weights).sum(1)
    table = torch.full((int(base ** outcomes.shape[1]),), -1)
    table[code] = torch.arange(len(outcomes))
    return torch.bincount(table[(drawn * weights).sum(1)], minlength=len(outcomes))


@pytest.mark.parametrize("name", ALL)
def test_samples_follow_the_joint_law(name):
    case = ALL[name]
    generator = torch.Generator().manual_seed(1)
    drawn = case.distribution().sample((DRAWS,), generator=generator)
    assert drawn.shape == (DRAWS, *case.logits.shape[:2])
    for row in range(len(case)):
        exact = case.enumerate(row)
        if exact.positions:
            counts = counts_of(drawn[:, row, exact.positions], exact.tokens)
            assert_drawn_from(counts, exact.log_prob.exp())


@pytest.mark.parametrize(
    "name",
    [
        "untied",
        "absent anywhere",
        "strong context",
        "hard zeros",
        "untied steps, tied to the embedding, all of them",
        "untied steps, dense emission, copies",
        "strong everything",
        "hard zeros, everything",
        "top 2, everything",
        *AWKWARD,
    ],
)
def test_latent_samples_follow_their_joint_posterior(name):
    case = ALL[name]
    for row in range(min(len(case), 3)):
        exact = case.enumerate(row)
        if not exact.positions:
            continue
        repeated = case.rows([row] * DRAWS)
        drawn = repeated.distribution().sample_latents(torch.Generator().manual_seed(2))
        assert drawn.shape == (DRAWS, case.logits.shape[1])
        assert_drawn_from(counts_of(drawn[:, exact.positions], exact.latents), exact.path_prob)


def test_latents_and_tokens_drawn_in_two_steps_follow_the_joint_law():
    case = CASES["untied"].rows([0])
    exact = case.enumerate(0)
    ours = case.rows([0] * DRAWS).distribution()
    generator = torch.Generator().manual_seed(3)
    logits = ours.logits_given(ours.sample_latents(generator))
    drawn = torch.distributions.Categorical(logits=logits.clamp(min=-1e4)).probs
    tokens = torch.multinomial(drawn.reshape(-1, 4), 1, generator=generator).reshape(DRAWS, -1)
    assert_drawn_from(counts_of(tokens, exact.tokens), exact.log_prob.exp())


def test_observed_tokens_stay_and_absent_positions_are_zero():
    case = random_case(80, present="scattered", batch=6)
    present, observed = case.options["present"], case.options["observed"]
    drawn = case.distribution().sample((20,), generator=torch.Generator().manual_seed(0))
    given = (observed & present).expand_as(drawn)
    assert torch.equal(drawn[given], case.options["tokens"].expand_as(drawn)[given])
    assert (drawn[~present.expand_as(drawn)] == 0).all()


def test_forbidden_tokens_and_zero_potentials_are_never_drawn():
    for name in ("forbidden token", "hard zeros", "one-hot evidence by logits"):
        ours = CASES[name].distribution()
        drawn = ours.sample((500,), generator=torch.Generator().manual_seed(0))
        assert ours.log_prob(drawn).isfinite().all()


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_sample_shape_comes_first(shape):
    ours = random_case(81).distribution()
    assert ours.sample(shape).shape == (*shape, 3, 4)


@pytest.mark.parametrize(
    "name", ["untied", "absent anywhere", *AWKWARD, *STRUCTURES, *STRUCTURED, *TOP_K]
)
def test_a_row_with_its_own_generator_draws_the_same_alone_and_in_a_batch(name):
    case = ALL[name]

    def generators(rows):
        return [torch.Generator().manual_seed(100 + row) for row in rows]

    rows = list(range(len(case)))
    together = case.distribution().sample((5,), generator=generators(rows))
    latents = case.distribution().sample_latents(generators(rows))
    present = case.distribution().present
    for row in rows:
        alone = case.rows([row]).distribution()
        assert torch.equal(alone.sample((5,), generator=generators([row]))[:, 0], together[:, row])
        path = alone.sample_latents(generators([row]))[0]
        assert torch.equal(path[present[row]], latents[row][present[row]])


def test_the_same_seed_draws_the_same_and_another_does_not():
    ours = random_case(82, batch=8, observed="none").distribution()

    def draw(seed):
        return ours.sample((10,), generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


def test_as_many_generators_as_rows_are_needed():
    with pytest.raises(ValueError, match=r"one entry per row \(3\), got 2"):
        random_case(83).distribution().sample(generator=[torch.Generator()] * 2)


def test_an_impossible_row_gives_tokens_that_the_backbone_allows():
    case = impossible_case()
    drawn = case.distribution().sample((50,), generator=torch.Generator().manual_seed(0))
    assert (drawn[:, 0, 2] == 3).all()
