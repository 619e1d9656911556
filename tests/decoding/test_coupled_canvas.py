"""What transformers' loop of DiffusionGemma draws and accepts with a head, against enumeration."""

from __future__ import annotations

import pytest
import torch
from transformers import EntropyBoundSampler, EntropyBoundSamplerConfig
from windows import assert_follows

from codd_hf import CoDDHead, CoDDModel
from codd_hf.coupling.canvas import CoupledCanvas
from codd_hf.coupling.heads import CallHead
from codd_hf.decoding.diffusion_gemma import CoupledBoundSamplerConfig, CoupledSampler
from tiny import enumerate_window, head_config, random_head
from tiny_gemma import city_gemma, tiny_gemma

VOCAB, LENGTH, WINDOW, NEVER = 5, 4, 3, 2
ROWS = 3000


def small_head(**changes) -> CoDDHead:
    """Of a window that fits the canvas once, and leaves a position over."""
    sizes = {"window_length": WINDOW, "mask_token_id": None, "forbidden_token_ids": [NEVER]}
    return random_head(VOCAB, **(sizes | changes))


def candidates_of(model, monkeypatch, prompts, **call) -> torch.Tensor:
    """The candidates of the first pass of `generate`, `[batch, canvas]`."""
    drawn, accept = [], EntropyBoundSampler.accept_canvas

    def recorded(sampler, current, candidates, logits, step):
        drawn.append(candidates)
        return accept(sampler, current, candidates, logits, step)

    monkeypatch.setattr(EntropyBoundSampler, "accept_canvas", recorded)
    torch.manual_seed(0)
    model.generate(prompts, max_new_tokens=prompts.shape[1], max_denoising_steps=1, **call)
    return drawn[0]


@pytest.mark.parametrize("evidence_temperature", [1.0, 0.5])
def test_candidates_of_generate_have_the_law_of_the_joint(monkeypatch, evidence_temperature):
    """At the schedule's temperature, which in the first pass is the highest, times the head's."""
    backbone = tiny_gemma(LENGTH, vocab_size=VOCAB)
    with torch.no_grad():
        backbone.model.decoder.norm.weight.fill_(12.0)
    head = small_head(evidence_temperature=evidence_temperature)
    model = CoDDModel.from_backbone(backbone, head)
    prompts, start = torch.tensor([[3, 4, 1]]), torch.tensor([[4, 1, 3, 0]])
    logits = backbone(input_ids=prompts, decoder_input_ids=start).logits[0] / 0.7
    call = {"decoder_input_ids": start.expand(ROWS, -1), "t_min": 0.1, "t_max": 0.7}
    drawn = candidates_of(model, monkeypatch, prompts.expand(ROWS, -1), **call)
    for columns in (slice(0, WINDOW), slice(WINDOW, LENGTH)):
        prediction = logits[columns] / evidence_temperature
        tokens = torch.full((len(prediction),), NEVER)
        assert_follows(drawn[:, columns], *enumerate_window(head, prediction, tokens, NEVER))


def test_candidates_are_cities(monkeypatch):
    """2,000 of 2,000 pairs fit together; each by itself is one of two words with even odds."""
    model, pairs = city_gemma(canvas_length=4)
    prompts = torch.full((1000, 4), 3)
    drawn = candidates_of(model, monkeypatch, prompts)
    assert pairs(drawn) == {("San", "Diego"), ("New", "York")}
    assert (drawn == 3).float().mean() == pytest.approx(0.25, abs=0.02)
    alone = model.backbone(input_ids=prompts, decoder_input_ids=drawn).logits.softmax(-1)
    factorized = alone.flatten(0, 1).multinomial(1).view(-1, 4)
    assert len(pairs(factorized)) == 16


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_emissions": False}, {"emission": "tied", "emission_rank": 2, "context_size": 3}],
)
def test_new_head_adds_nothing_to_the_last_bit(changes):
    head = CoDDHead(head_config(40, mask_token_id=None, **changes))
    head.bind(torch.randn(40, 3))
    logits = 9 * torch.randn(2, 10, 40)
    canvas = CoupledCanvas.of(CallHead("default", head, 4), logits)
    assert torch.equal(canvas.logits_given_path(), logits)
    marginals = canvas.marginal_logits
    assert torch.allclose(marginals, logits.log_softmax(-1), atol=1e-5)
    assert torch.equal(marginals.argmax(-1), logits.argmax(-1))


def test_forward_couples_as_asked():
    backbone = tiny_gemma(LENGTH, vocab_size=VOCAB)
    model = CoDDModel.from_backbone(backbone, small_head(), coupling="latent")
    start = torch.tensor([[4, 1, 3, 0]])
    inputs = {"input_ids": torch.tensor([[3, 4]]), "decoder_input_ids": start}
    stock, state = backbone(**inputs).logits, torch.get_rng_state()
    assert torch.equal(model(**inputs, coupling="none").logits, stock)
    assert torch.equal(model(**inputs, head=False).logits, stock)
    assert torch.equal(model(**inputs, return_dict=False, coupling="none")[0], stock)
    window = stock[0, :WINDOW], torch.tensor([NEVER] * WINDOW)
    completions, prob = enumerate_window(model.coupling_head, *window, NEVER)
    wanted = torch.zeros(WINDOW, VOCAB, dtype=torch.float64)
    for i in range(WINDOW):
        wanted[i].index_add_(0, completions[:, i], prob)
    found = model(**inputs, coupling="marginal").logits[0, :WINDOW].exp()
    assert torch.allclose(found.double(), wanted, atol=1e-5)
    paths = [model(**inputs).logits for _ in range(2)]
    assert torch.equal(*paths)  # told by what the global generator is, and the canvas
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    others = [model(**inputs, generator=torch.Generator().manual_seed(s)).logits for s in range(9)]
    assert any(not torch.equal(paths[0], other) for other in [model(**inputs).logits, *others])


def accepted(canvas: CoupledCanvas, bound: float, **settings) -> torch.Tensor:
    """`[batch, length]` bool: the positions that the sampler accepts."""
    config = CoupledBoundSamplerConfig(entropy_bound=bound, **settings)
    batch, length, vocab = canvas.logits.shape
    sizes = {"canvas_length": length, "vocab_size": vocab, "max_denoising_steps": 1}
    sampler = CoupledSampler(config, torch.Generator().manual_seed(0), **sizes)
    sampler.canvas = canvas
    current = torch.zeros(batch, length, dtype=torch.long)
    result = sampler.accept_canvas(current, current + 1, canvas.logits, 0)
    kept = sampler.renoise_canvas(result, 0)[result.bool()]
    assert torch.equal(result.bool(), sampler.accepted_token_mask)
    assert torch.equal(kept, torch.ones_like(kept))
    return result.bool()


@pytest.mark.parametrize("dependence", ["left_out", "own"])
def test_accepted_set_is_the_largest_within_the_bound_by_enumeration(dependence):
    head = small_head(num_latents=4)
    with torch.no_grad():  # tokens of a window are likely the same
        head.initial.zero_()
        head.transition.copy_(3 * torch.eye(4))
        head.emission.zero_()
        head.emission[range(4), [0, 1, 3, 4]] = 4.0
    logits = 0.6 * torch.randn(1, 2 * WINDOW, VOCAB, generator=torch.Generator().manual_seed(4))
    canvas = CoupledCanvas.of(CallHead("default", head, WINDOW), logits)
    joints = [
        enumerate_window(head, part, torch.tensor([NEVER] * WINDOW), NEVER)
        for part in logits[0].split(WINDOW)
    ]

    def entropy(columns: list[int]) -> float:
        """The joint entropy of some positions; windows are independent."""
        total = 0.0
        for number, (tokens, prob) in enumerate(joints):
            own = [c - number * WINDOW for c in columns if c // WINDOW == number]
            group = (tokens[:, own] * VOCAB ** torch.arange(len(own))).sum(1)
            law = torch.zeros(VOCAB**WINDOW, dtype=prob.dtype).index_add(0, group, prob)
            total += float(torch.special.entr(law).sum())
        return total

    alone = [entropy([i]) for i in range(2 * WINDOW)]
    order = sorted(range(2 * WINDOW), key=alone.__getitem__)
    prefixes = [order[:size] for size in range(1, 2 * WINDOW + 1)]
    if dependence == "own":
        bounded = [sum(alone[i] for i in prefix) - entropy(prefix) for prefix in prefixes]
    else:
        bounded = [entropy(prefix) - max(alone[i] for i in prefix) for prefix in prefixes]
    checked = 0
    for size in range(1, 2 * WINDOW):
        if bounded[size] > max(bounded[:size]) + 0.2:  # far enough apart for the estimate
            bound = (bounded[size] + max(bounded[:size])) / 2
            found = accepted(canvas, bound, dependence=dependence, num_samples=300)
            assert found[0].nonzero()[:, 0].tolist() == sorted(order[:size])
            checked += 1
    assert checked >= 4
    assert accepted(canvas, 100.0, dependence=dependence).all()


def test_what_is_drawn_together_is_accepted_together():
    """Words of a city share all their entropy: one choice, where the stock bound counts two."""
    model, _ = city_gemma(canvas_length=4)
    inputs = {"input_ids": torch.tensor([[3]]), "decoder_input_ids": torch.zeros(1, 4).long()}
    canvas = CoupledCanvas.of(model.head_of_call(), model.backbone(**inputs).logits)
    assert accepted(canvas, 0.1).tolist() == [[True, True, False, False]]
    assert accepted(canvas, 0.1, dependence="own").tolist() == [[True, False, False, False]]
    assert accepted(canvas, 0.8, dependence="own").tolist() == [[True, True, True, False]]
    stock = EntropyBoundSampler(EntropyBoundSamplerConfig(0.1), 4, 7, 1)
    start = inputs["decoder_input_ids"]
    stock.accept_canvas(start, start, canvas.marginal_logits, 0)
    assert stock.accepted_token_mask.tolist() == [[True, False, False, False]]


def test_without_dependence_the_bound_is_the_stock_one():
    head = CoDDHead(head_config(40, mask_token_id=None))
    logits = 9 * torch.randn(5, 10, 40, generator=torch.Generator().manual_seed(0))
    canvas = CoupledCanvas.of(CallHead("default", head, 4), logits)
    for bound in (0.05, 0.5, 2.0):
        stock = EntropyBoundSampler(EntropyBoundSamplerConfig(bound), 10, 40, 1)
        zeros = torch.zeros(5, 10, dtype=torch.long)
        stock.accept_canvas(zeros, zeros, logits, 0)
        assert torch.equal(accepted(canvas, bound), stock.accepted_token_mask)
