"""The method in plain code: right by enumeration, and the oracle where that is too large."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from agreement import assert_drawn_from, assert_logs_agree, assert_probabilities_agree, counts_of
from cases import random_case

from codd_hf.circuits import CoupledCategorical, Potentials, reference

BY_NAME = ("checks/", "random.py")
"""Checks of arguments and random draws: their names say what they do."""


def random_circuit(states: int, vocab: int, length: int, seed: int = 0):
    """Log-potentials, and a window: logits, tokens, and which are observed, in float64."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return 1.5 * torch.randn(*shape, generator=g, dtype=torch.float64)

    circuit = normal(states), normal(states, states), normal(states, vocab)
    tokens = torch.randint(vocab, (length,), generator=g)
    return circuit, (normal(length, vocab), tokens, torch.rand(length, generator=g) < 0.3)


def coupled(circuit, logits, tokens, observed, **options) -> CoupledCategorical:
    potentials = Potentials(circuit[0], circuit[1][None], circuit[2][None])
    return CoupledCategorical(logits[None], potentials, tokens[None], observed[None], **options)


def test_reference_is_the_enumeration():
    case = random_case(500, temperature=0.7)
    circuit = case.initial.double(), case.transition[0].double(), case.emission[0].double()
    for row in range(len(case)):
        exact = case.enumerate(row)
        window = (case.logits, case.options["tokens"], case.options["observed"])
        window = *(part[row] for part in window), 0.7
        evidence = reference.evidence_of(circuit, *window[:3], 0.7)
        assert_logs_agree(reference.forward(circuit, evidence)[0], exact.log_partition, 1e-6)
        posterior = reference.posterior_of(circuit, evidence)
        assert_probabilities_agree(posterior, exact.latent_posterior, 1e-6)
        for i in (~window[2]).nonzero()[:, 0].tolist():
            found = reference.conditional(circuit, *window[:3], i, 0.7)
            assert_probabilities_agree(found, exact.marginals[i], 1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_library_gives_what_the_reference_gives_for_large_circuits(temperature):
    circuit, window = random_circuit(states=40, vocab=70, length=24)
    ours = coupled(circuit, *window, temperature=temperature)
    evidence = reference.evidence_of(circuit, *window, temperature)
    log_partition, _ = reference.forward(circuit, evidence)
    assert_logs_agree(ours.log_partition[0], log_partition, 1e-10)
    posterior = reference.posterior_of(circuit, evidence)
    assert_probabilities_agree(ours.latent_posterior[0], posterior, 1e-10)
    for i in (~window[2]).nonzero()[:, 0].tolist():
        conditional = reference.conditional(circuit, *window, i, temperature)
        assert_probabilities_agree(ours.marginals[0, i], conditional, 1e-10)


def test_a_plain_step_draws_a_path_from_the_posterior_and_gives_the_tokens_given_it():
    case, number = random_case(501, batch=1), 1000
    circuit = case.initial.double(), case.transition[0].double(), case.emission[0].double()
    names = ("tokens", "observed")
    rows = [case.logits, *(case.options[name] for name in names)]
    rows = [part.expand(number, *part.shape[1:]) for part in rows]
    generator = torch.Generator().manual_seed(3)
    _, latents, log_probs = reference.plain_step(circuit, *rows, generator=generator)
    exact, ours = case.enumerate(0), case.distribution(torch.float64)
    assert_drawn_from(counts_of(latents, exact.latents), exact.path_prob)
    expected = ours.logits_given(latents[:1])[ours.masked]
    torch.testing.assert_close(log_probs[:1][ours.masked], expected.float())


def test_a_reader_follows_log_z_a_sample_and_a_conditional_in_5_files_and_900_lines():
    """Of the functions that run, those of more than two lines."""
    circuit, (logits, tokens, observed) = random_circuit(states=3, vocab=5, length=4)
    potentials = Potentials(circuit[0], circuit[1][None], circuit[2][None])
    package, ran = Path(reference.__file__).parents[1], defaultdict(dict)

    def profile(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(package)):
            lines = {line for *_, line in code.co_lines() if line} - {code.co_firstlineno}
            if len(lines) > 2:
                file = Path(code.co_filename).relative_to(package).as_posix()
                ran[file][code] = max(lines) - code.co_firstlineno + 1

    sys.setprofile(profile)
    try:
        with torch.no_grad():
            ours = CoupledCategorical(logits[None], potentials)
            _ = ours.log_partition, ours.sample()
            _ = ours.condition(tokens[None], observed[None]).marginals
    finally:
        sys.setprofile(None)
    followed = {
        file: sum(functions.values())
        for file, functions in sorted(ran.items())
        if not file.removeprefix("circuits/").startswith(BY_NAME)
    }
    print(*(f"{lines:4} lines of {file}" for file, lines in followed.items()), sep="\n")
    assert len(followed) <= 5
    assert sum(followed.values()) <= 900
