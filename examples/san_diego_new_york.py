"""He is from San/New York/Diego: why tokens that are drawn in parallel need coupling.

A diffusion language model fills two masked tokens in one step. It knows each alone: the first
is "San" or "New", the second "York" or "Diego". Drawn independently, half of the pairs are no city.
A circuit with two latent states (one a city) says which tokens go together, and the product of both
is sampled exactly, still in one step.

    python examples/san_diego_new_york.py
"""

from __future__ import annotations

from collections import Counter

import torch

from codd_hf import CoupledCategorical, Potentials

WORDS = ["San", "New", "York", "Diego"]
PAIRS = [("San", "Diego"), ("New", "York"), ("San", "York"), ("New", "Diego")]


def factorized_prediction() -> torch.Tensor:
    """`[1, 2, 4]`: the backbone's logits for the two masked positions."""
    first = torch.tensor([0.5, 0.5, 0.0, 0.0])
    second = torch.tensor([0.0, 0.0, 0.5, 0.5])
    return torch.stack([first, second]).log()[None]


def two_cities() -> Potentials:
    """A circuit of two latent states that are never left: one says San and Diego, one New, York."""
    return Potentials(
        initial=torch.tensor([0.5, 0.5]).log(),
        transition=torch.eye(2).log()[None],
        emission=torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 0.0]]).log()[None],
    )


def main(num_samples: int = 10_000, seed: int = 0) -> dict[str, dict[str, float]]:
    """Prints how often each pair is drawn.

    Returns:
        `factorized` and `coupled`, the number of draws of each pair; `log_prob`, in nats, of each
        pair under the coupled distribution.
    """
    logits = factorized_prediction()
    distribution = CoupledCategorical(logits, two_cities())
    generator = torch.Generator().manual_seed(seed)

    independent = torch.multinomial(
        logits[0].exp(), num_samples, replacement=True, generator=generator
    ).T
    joint = distribution.sample((num_samples,), generator=generator)[:, 0]

    result: dict[str, dict[str, float]] = {
        "factorized": Counter(" ".join(WORDS[i] for i in pair) for pair in independent.tolist()),
        "coupled": Counter(" ".join(WORDS[i] for i in pair) for pair in joint.tolist()),
        "log_prob": {},
    }
    print(f"He is from ...  {'factorized':>10}  {'coupled':>8}  {'log p(pair)':>11}")
    for pair in PAIRS:
        name = " ".join(pair)
        value = torch.tensor([[WORDS.index(word) for word in pair]])
        log_prob = result["log_prob"][name] = distribution.log_prob(value).item()
        factorized, coupled = result["factorized"][name], result["coupled"][name]
        print(f"{name:<14}  {factorized:>10}  {coupled:>8}  {log_prob:>11.3f}")
    return result


if __name__ == "__main__":
    main()
