"""`generate`, the pipeline and a plain loop over a distribution's queries are one decoder."""

from __future__ import annotations

import pytest
import torch

from codd_hf import CoDDPipeline, CoDDScheduler
from codd_hf.circuits.random import draw_categorical
from codd_hf.schedulers.candidates import shape_logits
from tiny import tiny_model

PROMPT = [3, 4, 5, 6, 7]
WINDOW, LENGTH, STEPS = 4, 8, 4
SAMPLING = ["factorized", "latent", "any_order", "marginal", "viterbi"]
STRATEGIES = ["low_confidence", "margin", "entropy", "left_to_right", "threshold", "joint"]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def plain_loop(model, generator, *, sampling, strategy, temperature, threshold, tau):
    """Blocks are windows; one row; no library code but the distribution's own queries."""
    mask, row, passes = model.config.mask_token_id, list(PROMPT) + [2] * LENGTH, 0
    assert mask == 2
    for start in range(len(PROMPT), len(row), WINDOW):
        for steps_left in range(STEPS * WINDOW // LENGTH, 0, -1):
            canvas = torch.tensor([row])
            at, passes = canvas[:, start : start + WINDOW], passes + 1
            logits = model(canvas).logits[:, start : start + WINDOW]
            plain = model.coupling_head(logits, tokens=at, observed=at != mask)
            if sampling == "factorized":
                plain = plain.with_active(torch.tensor([False]))
            hot, left = plain.with_temperature(tau), (at != mask)[0].logical_not()
            given = plain
            fewest, taken, joint = -(-int(left.sum()) // steps_left), 0, 1.0
            if sampling == "latent":
                z = hot.sample_latents(generator)
            in_order = sampling == "any_order"
            numbers = torch.rand(WINDOW, generator=generator) if sampling != "viterbi" else None
            while bool(left.any()):
                if in_order or taken == 0:
                    laws = hot.marginals.log() if sampling != "latent" else hot.logits_given(z)
                    if sampling == "viterbi":
                        tokens = hot.viterbi().tokens[0]
                    else:
                        shaped = shape_logits(laws[0], temperature)
                        tokens = draw_categorical(shaped.exp(), numbers)
                    law = plain.marginals[0]
                    sure = law.amax(-1) if in_order else law.gather(-1, tokens[:, None])[:, 0]
                    rank = {
                        "margin": (lambda best: best[:, 0] - best[:, 1])(law.topk(2).values),
                        "entropy": -torch.special.entr(law).sum(-1),
                        "left_to_right": -torch.arange(WINDOW).float(),
                    }.get(strategy, sure)
                best = int(rank.masked_fill(~left, -9).argmax())
                one = torch.nn.functional.one_hot(torch.tensor([best]), WINDOW).bool()
                joint *= float(given.marginals[0, best, tokens[best]])
                enough = {"threshold": float(sure[best]), "joint": joint}.get(strategy, -1.0)
                if taken >= fewest and enough < threshold:
                    break
                row[start + best], taken, left[best] = int(tokens[best]), taken + 1, False
                given = given.condition(tokens[None], one)
                if in_order:
                    plain, hot = given, hot.condition(tokens[None], one)
            if mask not in row[start : start + WINDOW]:
                break
    return row[len(PROMPT) :], passes


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("sampling", SAMPLING)
def test_generate_the_pipeline_and_a_plain_loop_give_the_same_tokens(model, sampling, strategy):
    settings = {"sampling": sampling, "strategy": strategy, "temperature": 0.8, "threshold": 0.6}
    pipe = CoDDPipeline(model=model, scheduler=CoDDScheduler(evidence_temperature=0.7))
    pipe.set_progress_bar_config(disable=True)
    kwargs = {"block_length": WINDOW, "num_inference_steps": STEPS, "early_stop": False}
    with torch.no_grad():
        for seed in range(1 + (strategy == "low_confidence")):
            expected, passes = plain_loop(
                model, torch.Generator().manual_seed(seed), tau=0.7, **settings
            )
            output = pipe(
                input_ids=PROMPT,
                gen_length=LENGTH,
                output_type="seq",
                generator=torch.Generator().manual_seed(seed),
                **kwargs,
                **settings,
            )
            assert output.sequences[0].tolist() == expected
            assert output.num_passes == passes == int(output.passes_per_row[0])
            generated = model.generate(
                torch.tensor([PROMPT]),
                max_new_tokens=LENGTH,
                generator=torch.Generator().manual_seed(seed),
                evidence_temperature=0.7,
                **kwargs,
                **settings,
            )
            assert generated[0, len(PROMPT) :].tolist() == expected
