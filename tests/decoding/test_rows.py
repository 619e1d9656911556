"""A row is decoded alike whatever shares its batch, and adaptive runs say what they cost."""

from __future__ import annotations

import pytest
import torch

from codd_hf import CoDDPipeline, CoDDScheduler
from tiny import tiny_model

PROMPTS = [[3, 4], [5, 6, 7, 8, 9, 10, 3], [4, 5, 6]]
SHORT = {"gen_length": 10, "block_length": 5, "num_inference_steps": 6, "output_type": "seq"}
SAMPLING = ["latent", "any_order", "marginal", "viterbi", "factorized"]
STRATEGIES = ["low_confidence", "random", "left_to_right", "threshold", "joint"]


@pytest.fixture(scope="module")
def pipe():
    pipe = CoDDPipeline(model=tiny_model(), scheduler=CoDDScheduler(evidence_temperature=0.7))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeds() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(10 + row) for row in range(len(PROMPTS))]


@pytest.mark.parametrize(
    ("sampling", "strategy", "remask_threshold"),
    [
        *((sampling, strategy, 0.0) for sampling in SAMPLING for strategy in STRATEGIES),
        *((sampling, "low_confidence", 0.3) for sampling in SAMPLING[:-1]),
        ("marginal", "joint", 0.3),
    ],
)
def test_row_alone_and_in_a_batch_with_every_mode_strategy_and_remasking(
    pipe, sampling, strategy, remask_threshold
):
    kwargs = {
        **SHORT,
        "sampling": sampling,
        "strategy": strategy,
        "remask_threshold": remask_threshold,
        "temperature": 0.9,
        "threshold": 0.4,
        "activation_ratio": 0.8,
        "repetition_penalty": 1.2,
        "min_new_tokens": 3,
        "eos_token_id": 1,
    }
    batched = pipe(input_ids=PROMPTS, generator=seeds(), **kwargs)
    for row, prompt in enumerate(PROMPTS):
        alone = pipe(input_ids=prompt, generator=[seeds()[row]], **kwargs)
        assert torch.equal(alone.sequences[0], batched.sequences[row])
        assert alone.num_passes == int(batched.passes_per_row[row])
    assert batched.num_passes >= int(batched.passes_per_row.max())


@pytest.mark.parametrize("strategy", ["threshold", "joint"])
def test_adaptive_runs_need_fewer_passes_the_lower_their_threshold(pipe, strategy):
    kwargs = {**SHORT, "num_inference_steps": 10, "sampling": "marginal", "early_stop": False}
    passes = [
        pipe(input_ids=PROMPTS, strategy=strategy, threshold=threshold, **kwargs).passes_per_row
        for threshold in (0.0, 0.4, 1.0)
    ]
    assert passes[0].tolist() == [2, 2, 2]  # one for each block
    assert passes[2].tolist() == [10, 10, 10]
    assert 6 < int(passes[1].sum()) < 30


@pytest.mark.parametrize("sampling", SAMPLING)
def test_number_of_steps_is_a_ceiling(pipe, sampling):
    for strategy in ("threshold", "joint"):
        output = pipe(
            input_ids=PROMPTS, strategy=strategy, sampling=sampling, threshold=1.0, **SHORT
        )
        assert output.num_passes <= SHORT["num_inference_steps"]
        assert (output.sequences != 2).all()
