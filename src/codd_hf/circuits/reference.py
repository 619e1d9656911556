r"""The method in plain code: read this first.

CoDD (arXiv 2603.00045), section 5. A hidden Markov model and the backbone's prediction `phi` are
multiplied: with latents `z` and tokens `x` that agree with the observed ones,

    w(x, z) = pi(z_1) \prod_{i>1} A(z_{i-1}, z_i) \prod_i E(z_i, x_i) \prod_{masked i} phi_i(x_i)

Summed over the tokens, `w` is a chain over latents with the evidence of `evidence_of`; everything
else is the textbook recursion. One window at a time, nothing skipped, kept or repaired: exact in
float64. A window has logits `[L, V]` and tokens `[L]`; `observed` `[L]` is true at known tokens.
The rest of `circuits` computes the same for batches, fast, and for absent positions, lists of
tokens and contexts too. Tests compare with this file, and `codd-hf bench head-step` is timed
against `plain_step`.
"""

import torch

Circuit = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Log-potentials `initial [H]`, `transition [H, H]` (row = previous state), `emission [H, V]`."""


def prediction(logits, temperature=1.0) -> torch.Tensor:
    """`phi`: the backbone's distribution of each token, `[..., V]`."""
    return (logits.double() / temperature).softmax(-1)


def evidence_of(circuit: Circuit, logits, tokens, observed, temperature=1.0) -> torch.Tensor:
    """`[L, H]`: the mean of `E(z, .)` under the prediction, or `E(z, x)` of an observed token."""
    emission = circuit[2].exp()
    evidence = prediction(logits, temperature).to(emission.dtype) @ emission.T
    for i in range(len(tokens)):
        if observed[i]:
            evidence[i] = emission[:, tokens[i]]
    return evidence


def forward(circuit: Circuit, evidence) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """`log Z`, and the distribution `[H]` of each latent given the evidence up to it."""
    initial, transition = circuit[0].exp(), circuit[1].exp()
    log_partition: torch.Tensor = evidence.new_zeros(())
    messages: list[torch.Tensor] = []
    for i in range(len(evidence)):
        predicted = initial if i == 0 else messages[-1] @ transition
        message = predicted * evidence[i]
        messages.append(message / message.sum())
        log_partition = log_partition + message.sum().log()
    return log_partition, messages


def posterior_of(circuit: Circuit, evidence) -> torch.Tensor:
    """`[L, H]`: the distribution of each latent given all evidence."""
    transition, messages = circuit[1].exp(), forward(circuit, evidence)[1]
    future, posterior = torch.ones_like(messages[0]), []
    for i in reversed(range(len(messages))):
        joint = messages[i] * future
        posterior.append(joint / joint.sum())
        future = transition @ (evidence[i] * future)
        future = future / future.sum()
    return torch.stack(posterior[::-1])


def sample_latents(circuit: Circuit, messages, generator=None) -> torch.Tensor:
    """A path `[L]` from the joint posterior, drawn from the last position back."""
    transition = circuit[1].exp()
    latents = [torch.multinomial(messages[-1], 1, generator=generator)[0]]
    for message in messages[-2::-1]:
        weights = message * transition[:, latents[-1]]
        latents.append(torch.multinomial(weights, 1, generator=generator)[0])
    return torch.stack(latents[::-1])


def log_probs_given(circuit: Circuit, logits, latents, temperature=1.0) -> torch.Tensor:
    """`[L, V]`: log-probabilities of the tokens given a path; masked ones are then independent."""
    scores = logits.double() / temperature + circuit[2][latents]
    return scores.softmax(-1).log()


def conditional(circuit: Circuit, logits, tokens, observed, i, temperature=1.0) -> torch.Tensor:
    """`[V]`: the exact distribution of the token at the masked position `i` given the observed.

    A mixture over its latent, with `s_i` the evidence there: the sum over `z_i` of
    `p(z_i | x_O) phi_i(v) E(z_i, v) / s_i(z_i)`.
    """
    evidence = evidence_of(circuit, logits, tokens, observed, temperature)
    weights = posterior_of(circuit, evidence)[i] / evidence[i]
    return (weights @ circuit[2].exp()) * prediction(logits[i], temperature)


@torch.no_grad()
def plain_step(
    circuit: Circuit, logits, tokens, observed, temperature=1.0, generator=None
) -> tuple[torch.Tensor, ...]:
    """What the head adds to a denoising step of windows `[B, L]`, as the paper states it.

    That is `log Z` `[B]`, latents `[B, L]`, and log-probabilities `[B, L, V]` of masked tokens.
    """
    rows = []
    for b in range(len(logits)):
        evidence = evidence_of(circuit, logits[b], tokens[b], observed[b], temperature)
        log_partition, messages = forward(circuit, evidence)
        latents = sample_latents(circuit, messages, generator)
        log_probs = log_probs_given(circuit, logits[b], latents, temperature)
        rows.append((log_partition, latents, log_probs.float()))
    return tuple(torch.stack(values) for values in zip(*rows, strict=True))
