"""`generate`, the pipeline and a plain loop over a distribution's queries are one decoder."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import one_hot

from codd_hf import CoDDPipeline, CoDDScheduler
from codd_hf.circuits.random import draw_categorical
from codd_hf.schedulers.drawing import shape_logits
from tiny import tiny_model

MASK, W, LENGTH, STEPS = 2, 4, 8, 4
PROMPT = [3, 4, 5, 6, 7]
TEMPLATE = [3, 4, 5, MASK, 6, 7, MASK, MASK, 8, MASK, 9, 10, 11]
SAMPLING = ["factorized", "latent", "any_order", "marginal", "viterbi"]
STRATEGIES = ["low_confidence", "margin", "entropy", "left_to_right", "threshold", "joint"]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def ranks(strategy, law, sure):
    """The higher, the sooner; `law` `[n, vocab]`, `sure` `[n]`."""
    first, second = law.topk(2).values.unbind(-1)
    return {
        "margin": first - second,
        "entropy": -torch.special.entr(law).sum(-1),
        "left_to_right": -torch.arange(len(law)).float(),
    }.get(strategy, sure)


def fewest(num_left, steps_left, strategy):
    """How many tokens a step commits even where it is not sure."""
    shares = sum(range(1, steps_left + 1)) if strategy == "joint" else steps_left
    return -(-num_left // shares)


def placed(row, logits, begin, steps_left, strategy, threshold):
    """The full paradigm: the chosen positions, the windows over them, and where to commit."""
    phi = logits.index_fill(-1, torch.tensor([MASK]), -torch.inf).softmax(-1)
    score, best = ranks(strategy, phi, phi.amax(-1)).tolist(), phi.amax(-1).tolist()
    left = [i for i in range(len(row)) if row[i] == MASK]
    chosen = sorted(left, key=lambda i: -score[i])[: fewest(len(left), steps_left, strategy)]
    sure = [i for i in left if strategy in ("threshold", "joint") and best[i] >= threshold]
    chosen, count = sorted({*chosen, *sure}), len(chosen)
    starts = sorted({i - (i - begin) % W for i in chosen})
    where = left if strategy in ("threshold", "joint") else chosen
    where = [i for i in where if any(s <= i < s + W for s in starts)]
    return starts, where, count


def plain_loop(model, row, blocks, begin, generator, full, never, **settings):
    """One row; no library code but the distribution's own queries."""
    sampling, strategy, threshold = (settings[k] for k in ("sampling", "strategy", "threshold"))
    row, passes = list(row), 0
    for block, steps in blocks:
        for steps_left in range(steps, 0, -1):
            where = [i for i in block if row[i] == MASK]
            if not where:
                break
            logits, passes = model(torch.tensor([row])).logits[0], passes + 1
            logits[:, never] = -torch.inf
            starts, count = sorted({i - (i - begin) % W for i in block}), len(where)
            count = fewest(count, steps_left, strategy)
            if full:
                starts, where, count = placed(row, logits, begin, steps_left, strategy, threshold)
            place = [s + i for s in starts for i in range(W)]
            present = torch.tensor(place).view(-1, W) < len(row)
            at = torch.tensor([row[i] if i < len(row) else 0 for i in place]).view(-1, W)
            padded = torch.cat((logits, logits[:W]))
            plain = model.coupling_head(
                padded[place].view(*at.shape, -1), tokens=at, observed=at != MASK, present=present
            )
            if sampling == "factorized":
                plain = plain.with_active(torch.zeros(len(at), dtype=torch.bool))
            hot, given = plain.with_temperature(settings["tau"]), plain
            left = torch.tensor([i in where for i in place])
            taken, joint, in_order = 0, 1.0, sampling == "any_order"
            z = hot.sample_latents(generator) if sampling == "latent" else None
            numbers = torch.rand(len(place), generator=generator) if sampling != "viterbi" else None
            while bool(left.any()):
                if in_order or taken == 0:
                    laws = hot.marginals.log() if z is None else hot.logits_given(z)
                    if sampling == "viterbi":
                        tokens = hot.viterbi().tokens.flatten()
                    else:
                        shaped = shape_logits(laws.flatten(0, 1), settings["temperature"])
                        tokens = draw_categorical(shaped.exp(), numbers)
                    law = plain.marginals.flatten(0, 1)
                    sure = law.amax(-1) if in_order else law.gather(-1, tokens[:, None])[:, 0]
                best = int(ranks(strategy, law, sure).masked_fill(~left, -9).argmax())
                one = one_hot(torch.tensor(best), len(place)).bool().view_as(at)
                joint *= float(given.marginals.flatten(0, 1)[best, tokens[best]])
                enough = {"threshold": float(sure[best]), "joint": joint}.get(strategy, -1.0)
                if taken >= count and enough < threshold:
                    break
                row[place[best]], taken, left[best] = int(tokens[best]), taken + 1, False
                given = given.condition(tokens.view_as(at), one)
                if in_order:
                    plain, hot = given, hot.condition(tokens.view_as(at), one)
    return row, passes


FROM, EVERYTHING = len(PROMPT), range(len(PROMPT), len(PROMPT) + LENGTH)
CASES = {
    "block": ({"block_length": W}, [(EVERYTHING[:W], 2), (EVERYTHING[W:], 2)], FROM),
    "full": ({"paradigm": "full"}, [(EVERYTHING, STEPS)], FROM),
    # The gaps span positions 3 to 9, two windows with one position to spare: none on the left.
    "infill": ({"infill": True, "block_length": 4}, [([3, 6], 2), ([7, 9], 2)], 3),
    "infill_full": ({"infill": True, "paradigm": "full"}, [([3, 6, 7, 9], STEPS)], 3),
}


@pytest.mark.parametrize("number", range(len(STRATEGIES)))
@pytest.mark.parametrize("sampling", SAMPLING)
def test_generate_the_pipeline_and_a_plain_loop_give_the_same_tokens(model, sampling, number):
    """Every mode meets every strategy, and both meet every case."""
    case = list(CASES)[(number + SAMPLING.index(sampling)) % len(CASES)]
    arguments, blocks, begin = CASES[case]
    settings = {"sampling": sampling, "strategy": STRATEGIES[number], "temperature": 0.8}
    settings["threshold"] = 0.6
    pipe = CoDDPipeline(model=model, scheduler=CoDDScheduler(evidence_temperature=0.7))
    pipe.set_progress_bar_config(disable=True)
    kwargs = {**arguments, "num_inference_steps": STEPS, **settings}
    infill = "infill" in arguments
    kwargs |= {} if infill else {"eos_token_id": []}
    given = TEMPLATE if infill else PROMPT
    with torch.no_grad():
        expected, passes = plain_loop(
            model,
            given if infill else given + [MASK] * LENGTH,
            blocks,
            begin,
            torch.Generator().manual_seed(number),
            full="paradigm" in arguments,
            never=[0, 1] if infill else [],  # padding and end of text
            tau=0.7,
            **settings,
        )
    kwargs |= {"gen_length": LENGTH, "generator": torch.Generator().manual_seed(number)}
    output = pipe(input_ids=given, output_type="seq", **kwargs)
    assert output.sequences[0].tolist() == expected[0 if infill else len(PROMPT) :]
    assert output.num_passes == passes == int(output.passes_per_row[0])
    kwargs |= {"generator": torch.Generator().manual_seed(number), "evidence_temperature": 0.7}
    assert model.generate(torch.tensor([given]), **kwargs)[0].tolist() == expected
