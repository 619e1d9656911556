"""One head step written as the paper states it, the baseline that the library is timed against.

CoDD (arXiv 2603.00045), section 5: the backbone's predictions are multiplied with a hidden Markov
model, a latent path is drawn by forward filtering and backward sampling, and the emissions of the
drawn latents are added to the logits. Nothing is skipped or kept between steps: evidence is dense
over the whole window, rows and positions are Python loops, the softmax over the block is float64.
Its laws are those of `CoupledCategorical`, for potentials shared by all positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class PlainStep:
    """What one head step gives.

    Attributes:
        log_partition: `[B]`, log Z in nats.
        latents: `[B, L]`, a sample of the latent path.
        log_probs: `[B, L, V]` float32, of each token given the latents; what is at observed
            positions has no meaning.
    """

    log_partition: torch.Tensor
    latents: torch.Tensor
    log_probs: torch.Tensor


@torch.no_grad()
def plain_step(
    circuit: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    logits: torch.Tensor,
    tokens: torch.Tensor,
    observed: torch.Tensor,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> PlainStep:
    """Evidence, forward filter, latent sample and coupled log-probabilities, row by row.

    Args:
        circuit: log-potentials `initial [H]`, `transition [H, H]` (row = previous state) and
            `emission [H, V]`, shared by all positions.
        logits: `[B, L, V]`, the backbone's; -inf for tokens that cannot be drawn.
        tokens: `[B, L]`, used where `observed`.
        observed: `[B, L]` bool.
        temperature: the evidence temperature.
        generator: draws the latents.
    """
    rows = [
        _row(circuit, logits[b], tokens[b], observed[b], temperature, generator)
        for b in range(len(logits))
    ]
    return PlainStep(*(torch.stack(values) for values in zip(*rows, strict=True)))


def _row(circuit, logits, tokens, observed, temperature, generator):
    """`log Z`, latents `[L]` and log-probabilities `[L, V]` of one window."""
    initial, transition, log_emission = circuit[0].exp(), circuit[1].exp(), circuit[2]
    evidence = _evidence(log_emission, logits, tokens, observed, temperature)
    log_partition, messages = _forward(initial, transition, evidence)
    latents = _backward_sample(transition, messages, generator)
    scores = (logits / temperature).double()
    for i in range(len(latents)):
        scores[i] += log_emission[latents[i]]
    return log_partition, latents, scores.softmax(-1).log().float()


def _evidence(log_emission, logits, tokens, observed, temperature) -> torch.Tensor:
    """`[L, H]`: the expected emission under the prediction, or that of the given token."""
    emission = log_emission.exp()
    phi = (logits.double() / temperature).softmax(-1).float()
    evidence = phi @ emission.T
    for i in range(len(tokens)):
        if observed[i]:
            evidence[i] = emission[:, tokens[i]]
    return evidence


def _forward(initial, transition, evidence) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """`log Z` and the filtered laws `[H]` of the positions, rescaled at every step."""
    log_partition = evidence.new_zeros(())
    messages: list[torch.Tensor] = []
    for i in range(len(evidence)):
        predicted = initial if i == 0 else messages[-1] @ transition
        message = predicted * evidence[i]
        scale = message.sum()
        messages.append(message / scale)
        log_partition = log_partition + scale.log()
    return log_partition, messages


def _backward_sample(transition, messages, generator) -> torch.Tensor:
    """A latent path `[L]`, drawn from the last position back."""
    latents = [torch.multinomial(messages[-1], 1, generator=generator)[0]]
    for message in messages[-2::-1]:
        weights = message * transition[:, latents[-1]]
        latents.append(torch.multinomial(weights, 1, generator=generator)[0])
    return torch.stack(latents[::-1])
