"""A row is decoded alike whatever shares its batch, and adaptive runs say what they cost."""

from __future__ import annotations

import pytest
import torch

from codd_hf import CoDDModel, CoDDPipeline, CoDDScheduler
from tiny import random_head, tiny_backbone, tiny_model

MASK, EOS = 2, 1
PROMPTS = [[3, 4], [5, 6, 7, 8, 9, 10, 3], [4, 5, 6]]
TEMPLATES = [
    [3, MASK, MASK, MASK, 5],
    [5, 6, 7, MASK, 8, 9, 3, 4, MASK, MASK, MASK, MASK, MASK, 11],
    [MASK, 4, 5, MASK, 6, MASK],
]
SHORT = {"gen_length": 10, "block_length": 5, "num_inference_steps": 6, "output_type": "seq"}
SAMPLING = ["latent", "any_order", "marginal", "viterbi", "factorized"]
STRATEGIES = ["low_confidence", "random", "left_to_right", "threshold", "joint"]
CONTROLS = {
    "temperature": 0.9,
    "threshold": 0.4,
    "activation_ratio": 0.8,
    "repetition_penalty": 1.2,
    "eos_token_id": EOS,
}
ROW_KEYS = ("gen_length", "num_inference_steps", "min_new_tokens")


@pytest.fixture(scope="module")
def pipe():
    pipe = CoDDPipeline(model=tiny_model(), scheduler=CoDDScheduler(evidence_temperature=0.7))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeds() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(10 + row) for row in range(len(PROMPTS))]


def padded(rows: list[list[int]], side: str) -> dict[str, torch.Tensor]:
    """The rows padded with token 7 to more than the longest."""
    width = max(map(len, rows)) + 2
    gaps = [width - len(row) for row in rows]
    left = side == "left"
    ids = [[7] * n + row if left else row + [7] * n for row, n in zip(rows, gaps, strict=True)]
    mask = [
        [0] * n + [1] * len(row) if left else [1] * len(row) + [0] * n
        for row, n in zip(rows, gaps, strict=True)
    ]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def assert_rows_are_independent(pipe, rows: list[list[int]], side: str, **kwargs) -> torch.Tensor:
    """Each row alone, with its own entry of per-row arguments, and the batch padded."""
    batched = pipe(input_ids=rows, generator=seeds(), **kwargs)
    for row, prompt in enumerate(rows):
        own = {name: kwargs[name][row] for name in ROW_KEYS if isinstance(kwargs.get(name), list)}
        alone = pipe(input_ids=prompt, generator=[seeds()[row]], **(kwargs | own))
        length = alone.sequences.shape[1]
        assert torch.equal(alone.sequences[0], batched.sequences[row, :length])
        assert (batched.sequences[row, length:] == 0).all()  # padding
        assert alone.num_passes == int(batched.passes_per_row[row])
    with_padding = pipe(**padded(rows, side), generator=seeds(), **kwargs)
    assert torch.equal(with_padding.sequences, batched.sequences)
    assert not (batched.sequences == MASK).any()
    return batched.sequences


def kinds(number: int, sampling: str) -> tuple[dict, str]:
    """Settings in which every mode meets every strategy, and the padded side."""
    odd = (number + SAMPLING.index(sampling)) % 2
    settings = {"sampling": sampling, "strategy": STRATEGIES[number], "output_type": "seq"}
    settings["paradigm"] = "full" if odd else "block"
    return CONTROLS | settings, "left" if number % 2 else "right"


@pytest.mark.parametrize("number", range(len(STRATEGIES)))
@pytest.mark.parametrize("sampling", SAMPLING)
def test_row_with_lengths_of_its_own_alone_in_a_batch_and_padded(pipe, sampling, number):
    settings, side = kinds(number, sampling)
    per_row = {"gen_length": [9, 3, 6], "min_new_tokens": [3, 0, 2]}
    per_row["num_inference_steps"] = [5, 2, 4]
    assert_rows_are_independent(pipe, PROMPTS, side, **settings, **per_row, block_length=3)


@pytest.mark.parametrize("number", range(len(STRATEGIES)))
@pytest.mark.parametrize("step", [0, 1])
def test_template_alone_in_a_batch_and_padded(pipe, number, step):
    """Two modes for each strategy, of which one is in blocks; the prompts meet all pairs."""
    sampling = SAMPLING[(number + step) % len(SAMPLING)]
    settings, side = kinds(number, sampling)
    task = {"infill": True, "num_inference_steps": [2, 4, 3], "block_length": 4}
    filled = assert_rows_are_independent(pipe, TEMPLATES, side, **settings, **task)
    for row, template in enumerate(TEMPLATES):
        for token, given in zip(filled[row].tolist(), template, strict=False):
            assert given in (token, MASK)


@pytest.mark.parametrize(
    ("kind", "window", "paradigm"),
    [("bert", 3, "full"), ("qwen2", 3, "block"), ("qwen2", 16, "full")],
)
def test_other_backbones_and_windows_shorter_and_longer_than_blocks(kind, window, paradigm):
    """`qwen2` has Dream's shift: what it computes at a position predicts the next one."""
    backbone = tiny_backbone(kind, **({"logit_shift": True} if kind == "qwen2" else {}))
    head = random_head(window_length=window)
    pipe = CoDDPipeline(CoDDModel.from_backbone(backbone, head), CoDDScheduler())
    pipe.set_progress_bar_config(disable=True)
    task = {"gen_length": [13, 4, 7], "num_inference_steps": [4, 2, 2], "block_length": 5}
    task |= {"paradigm": paradigm, "output_type": "seq"}
    assert_rows_are_independent(pipe, PROMPTS, "left", **CONTROLS, **task)


@pytest.mark.parametrize("strategy", ["threshold", "joint"])
def test_adaptive_runs_need_fewer_passes_the_lower_their_threshold(pipe, strategy):
    kwargs = {**SHORT, "num_inference_steps": 10, "sampling": "marginal", "eos_token_id": []}
    passes = [
        pipe(input_ids=PROMPTS, strategy=strategy, threshold=threshold, **kwargs).passes_per_row
        for threshold in (0.0, 0.4, 1.0)
    ]
    assert passes[0].tolist() == [2, 2, 2]  # one for each block
    assert passes[2].tolist() == [10, 10, 10]
    assert 6 < int(passes[1].sum()) < 30
