"""Which positions are decoded when, and under which windows: paradigms, blocks and gaps."""

from __future__ import annotations

import re

import pytest
import torch

from codd_hf import CoDDModel, CoDDPipeline, CoDDScheduler
from tiny import random_head, tiny_backbone, tiny_model

MASK, EOS, PAD, WINDOW = 2, 1, 0, 4
PROMPT = [3, 4, 5]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def pipe(model):
    pipe = CoDDPipeline(model, CoDDScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def committed(model, input_ids, monkeypatch=None, **kwargs) -> tuple[list[list[int]], list]:
    """The positions of the first row that each step committed, and its windows if recorded."""
    steps, windows = [], []
    if monkeypatch is not None:
        read = model.window_distribution

        def recorded(states, tokens, window_start, *rest, **others):
            windows.append(window_start.tolist())
            return read(states, tokens, window_start, *rest, **others)

        monkeypatch.setattr(model, "window_distribution", recorded)

    def remember(step, timestep, state):
        steps.append(state["transfer_index"][0].nonzero()[:, 0].tolist())

    kwargs = {"gen_length": 16, "block_length": 4, "eos_token_id": [], **kwargs}
    model.generate(torch.tensor([input_ids]), on_step=remember, **kwargs)
    return steps, windows


@pytest.mark.parametrize("strategy", ["low_confidence", "entropy", "random", "joint"])
def test_full_paradigm_commits_under_its_windows_alone_and_fills_everything(
    model, monkeypatch, strategy
):
    steps, windows = committed(
        model,
        PROMPT,
        monkeypatch,
        paradigm="full",
        strategy=strategy,
        threshold=0.9,
        num_inference_steps=6,
    )
    assert sorted(p for positions in steps for p in positions) == list(range(3, 19))
    assert len(steps) == len(windows) <= 6
    for positions, starts in zip(steps, windows, strict=True):
        assert all(any(s <= p < s + WINDOW for s in starts) for p in positions)
        assert all((s - len(PROMPT)) % WINDOW == 0 for s in starts)
        if strategy != "joint":  # a minimum cover: no window without a token
            assert all(any(s <= p < s + WINDOW for p in positions) for s in starts)
    # Not in the order of blocks.
    firsts = [min(positions) for positions in steps]
    assert firsts != sorted(firsts)


def test_full_paradigm_in_a_single_step_fills_everything(model):
    steps, _ = committed(model, PROMPT, paradigm="full", num_inference_steps=1)
    assert steps == [list(range(3, 19))]


def test_full_paradigm_takes_the_positions_of_the_backbones_prediction(model):
    """By `select_positions`: the share of an even pace, by the best token's probability."""
    steps, _ = committed(model, PROMPT, paradigm="full", num_inference_steps=8)
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT + [MASK] * 16])).logits[0, 3:]
    best = logits.index_fill(-1, torch.tensor([MASK]), -torch.inf).softmax(-1).amax(-1)
    assert steps[0] == sorted((best.argsort(descending=True)[:2] + 3).tolist())
    assert [len(positions) for positions in steps] == [2] * 8


@pytest.mark.parametrize(("prompt", "first"), [(4, 4), (5, 3), (7, 1), (2, 2)])
def test_blocks_of_a_block_causal_backbone_are_those_of_its_attention(prompt, first):
    """Counted from position 0, so that the first decoding block ends where attention's does."""
    model = CoDDModel.from_backbone(tiny_backbone(block_length=4), random_head())
    steps, _ = committed(
        model, [3] * prompt, gen_length=10, num_inference_steps=4, strategy="left_to_right"
    )
    blocks = [{p // 4 for p in positions} for positions in steps]
    assert all(len(block) == 1 for block in blocks)
    assert [b for (b,) in blocks] == sorted(b for (b,) in blocks)
    assert sum(len(p) for p, (b,) in zip(steps, blocks, strict=True) if b == prompt // 4) == first
    plain, _ = committed(tiny_model(), [3] * prompt, gen_length=10, num_inference_steps=3)
    assert [len(positions) for positions in plain] == [4, 4, 2]


@pytest.mark.parametrize("prompt_length", [3, 8])
@pytest.mark.parametrize("block_length", [2, 4])
def test_block_causal_backbone_reads_no_further_than_its_block(prompt_length, block_length):
    model = CoDDModel.from_backbone(tiny_backbone(block_length=4), random_head())
    prompt, lengths = torch.arange(3, 3 + prompt_length)[None], []
    model.backbone.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    steps, _ = committed(
        model,
        prompt[0].tolist(),
        gen_length=12,
        block_length=block_length,
        cache=False,
        num_inference_steps=8,
    )
    ends = [min(4 * (positions[0] // 4) + 4, prompt_length + 12) for positions in steps]
    assert lengths == ends


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"paradigm": "full"}, "`paradigm` must be 'block' and"),
        ({"block_length": 3}, "`block_length` must divide the 4 tokens"),
        ({"block_length": 8}, "which sees nothing beyond, got 'block' and 8: give 4."),
    ],
)
def test_what_a_block_causal_backbone_cannot_do_is_an_error(kwargs, said):
    model = CoDDModel.from_backbone(tiny_backbone(block_length=4), random_head())
    with pytest.raises(ValueError, match=re.escape(said)):
        committed(model, PROMPT, num_inference_steps=8, **kwargs)
    assert model.generate(torch.tensor([PROMPT]), max_new_tokens=6).shape == (1, 9)
    assert committed(model, PROMPT, num_inference_steps=9, block_length=2)[0]


@pytest.mark.parametrize("paradigm", ["block", "full"])
def test_window_of_128_tokens(paradigm):
    backbone = tiny_backbone("qwen2", logit_shift=True, max_position_embeddings=256)
    model = CoDDModel.from_backbone(backbone, random_head(window_length=128))
    ids = model.generate(
        torch.tensor([PROMPT]),
        max_new_tokens=140,
        block_length=32,
        num_inference_steps=6,
        paradigm=paradigm,
        eos_token_id=[],
    )
    assert ids.shape == (1, 143)
    assert not (ids == MASK).any()


@pytest.mark.parametrize("paradigm", ["block", "full"])
def test_nothing_is_decoded_behind_the_end_of_a_text(model, paradigm):
    kwargs = {"paradigm": paradigm, "num_inference_steps": 16, "eos_token_id": 9}
    ended, _ = committed(model, PROMPT, forced_tokens={5: 9}, **kwargs)
    assert sorted(p for positions in ended for p in positions) == [3, 4, 5, 6, 7]
    kwargs |= {"gen_length": 16, "block_length": 4, "forced_tokens": {5: 9}}
    text = model.generate(torch.tensor([PROMPT]), **kwargs)[0, 3:]
    end = text.tolist().index(9)
    assert end <= 5
    assert (text[end + 1 :] == PAD).all()


def test_steps_are_shared_by_the_blocks_that_have_gaps(model):
    template = [MASK, 3, 4, 5, 6, 7, 8, 9, 3, 4, MASK, MASK, MASK, 5, 6, MASK]
    steps, _ = committed(model, template, infill=True, num_inference_steps=5)
    blocks = [{p // 4 for p in positions} for positions in steps]
    assert blocks == [{0}, {2}, {2}, {3}, {3}]  # one step, two and two: the first has one mask
    with pytest.raises(ValueError, match=re.escape("that are decoded, 3 in row 0 with")):
        committed(model, template, infill=True, num_inference_steps=2)


@pytest.mark.parametrize("paradigm", ["block", "full"])
def test_windows_cover_given_text_on_both_sides_of_a_gap(model, monkeypatch, paradigm):
    template = [3, 4, 5, 6, MASK, MASK, 7, 8, 9, 10]
    kwargs = {"infill": True, "paradigm": paradigm}
    _, windows = committed(model, template, monkeypatch, num_inference_steps=1, **kwargs)
    assert windows == [[3]]  # positions 3 to 6: one given token on each side


@pytest.mark.parametrize("paradigm", ["block", "full"])
def test_gap_follows_the_exact_law_given_all_other_text(model, paradigm):
    """Any-order draws of three masks in one step against the coupled distribution's own queries."""
    template = torch.tensor([[3, 4, MASK, 5, MASK, MASK, 7, 8]]).expand(2000, -1)
    filled = model.generate(
        template,
        infill=True,
        sampling="any_order",
        temperature=1.0,
        paradigm=paradigm,
        num_inference_steps=1,
        generator=torch.Generator().manual_seed(0),
    )
    assert torch.equal(filled[template != MASK], template[template != MASK])
    with torch.no_grad():
        logits = model(template[:1]).logits[:, 2:6]
        logits[..., [EOS, PAD]] = -torch.inf
        at = template[:1, 2:6]
        law = model.coupling_head(logits, tokens=at, observed=at != MASK)
    drawn, counts = filled[:, 2:6].unique(dim=0, return_counts=True)
    for tokens, count in zip(drawn, counts, strict=True):
        if count >= 30:
            probability = float(law.log_prob(tokens[None]).detach().exp())
            error = (probability * (1 - probability) / 2000) ** 0.5
            assert abs(count / 2000 - probability) < 4.5 * error


@pytest.mark.parametrize("paradigm", ["block", "full"])
@pytest.mark.parametrize("sampling", ["latent", "marginal", "factorized"])
def test_gap_holds_no_end_and_no_padding(pipe, sampling, paradigm):
    template = [3] + [MASK] * 9 + [4] + [MASK] * 3
    kwargs = {"sampling": sampling, "temperature": 50.0, "output_type": "seq"}
    kwargs |= {"infill": True, "paradigm": paradigm, "num_inference_steps": 3}
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        filled = pipe(input_ids=template, generator=generator, **kwargs).sequences
        assert not torch.isin(filled, torch.tensor([EOS, PAD, MASK])).any()


def test_generate_puts_what_it_filled_in_where_the_padding_leaves_it(model):
    ids = torch.tensor([[0, 0, 3, MASK, 4], [5, MASK, 6, MASK, 7]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    filled = model.generate(ids, attention_mask=mask, infill=True)
    assert torch.equal(filled[ids != MASK], ids[ids != MASK])
    assert not (filled == MASK).any()


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"infill": True}, "`infill` fills mask tokens, of which there is none in row 0"),
        ({"infill": True, "min_new_tokens": 2}, "are for text after a prompt: leave them out"),
        ({"paradigm": "fuller"}, "`paradigm` must be one of block, full, got 'fuller'"),
        ({"gen_length": [4, 5]}, "`gen_length` must have one entry per prompt (1), got 2"),
        ({"gen_length": [0]}, "`gen_length` must be at least 1, got 0"),
        ({"num_inference_steps": [2, 3]}, "`num_inference_steps` must have one entry per prompt"),
    ],
)
def test_tasks_that_make_no_sense_get_one_clear_sentence(pipe, kwargs, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        pipe(input_ids=PROMPT, output_type="seq", **({"gen_length": 8} | kwargs))
