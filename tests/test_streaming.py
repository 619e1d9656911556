"""Promises of streaming in `generate`: transformers' protocol for diffusion streamers."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
import torch
from transformers import TextDiffusionStreamer, TextIteratorStreamer, TextStreamer, pipeline

from tiny_pipeline import tiny_pipeline

SHORT = {"gen_length": 10, "block_length": 4, "num_inference_steps": 6}
PROMPTS = torch.tensor([[40, 41, 42], [50, 51, 52]])


class Recorder:
    """A streamer that remembers what it heard."""

    def __init__(self):
        self.heard = []

    def put(self, value):
        self.heard.append(("put", value))

    def put_draft(self, value):
        self.heard.append(("draft", value))

    def end(self):
        self.heard.append(("end", None))

    def values(self, kind):
        return [value for name, value in self.heard if name == kind]


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def seed() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_prompt_drafts_and_blocks_arrive_in_order_and_the_blocks_are_the_result(pipe):
    streamer = Recorder()
    output = pipe.model.generate(PROMPTS, **SHORT, generator=seed(), streamer=streamer)
    kinds = [name for name, _ in streamer.heard]
    assert kinds == ["put", *["draft", "draft", "put"] * 3, "end"]
    prompt, *blocks = streamer.values("put")
    assert torch.equal(prompt, PROMPTS)
    assert [block.shape for block in blocks] == [(2, 4), (2, 4), (2, 2)]
    assert torch.equal(torch.cat([prompt, *blocks], dim=1), output)
    assert torch.equal(output, pipe.model.generate(PROMPTS, **SHORT, generator=seed()))


@pytest.mark.parametrize(
    "settings",
    [
        {"strategy": "threshold", "threshold": 0.02, "num_inference_steps": 10},
        {"strategy": "random", "sampling": "marginal"},
        {"forced_tokens": {1: 60, 4: 61, 5: 62, 6: 63, 7: 64}},
    ],
)
def test_blocks_are_the_result_however_tokens_are_committed(pipe, settings):
    streamer = Recorder()
    output = pipe.model.generate(PROMPTS, **(SHORT | settings), generator=seed(), streamer=streamer)
    assert torch.equal(torch.cat(streamer.values("put"), dim=1), output)
    for (kind, draft), (following, block) in pairwise(streamer.heard):
        if kind == "draft" and following == "put":
            assert torch.equal(draft, block)


@pytest.mark.parametrize("paradigm", ["block", "full"])
def test_rows_of_different_lengths_stream_what_is_returned(pipe, paradigm):
    streamer = Recorder()
    ids, mask = torch.tensor([[40, 41, 42], [0, 50, 51]]), torch.tensor([[1, 1, 1], [0, 1, 1]])
    output = pipe.model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=[3, 9],
        num_inference_steps=[1, 4],
        block_length=4,
        paradigm=paradigm,
        generator=seed(),
        streamer=streamer,
    )
    assert output.shape == (2, 12)
    assert (output[0, 6:] == pipe.model.config.pad_token_id).all()
    assert torch.equal(torch.cat(streamer.values("put"), dim=1), output)
    blocks = [4, 4, 1] if paradigm == "block" else [9]
    assert [block.shape[1] for block in streamer.values("put")[1:]] == blocks
    assert all(draft.shape[1] in blocks for draft in streamer.values("draft"))


def test_gaps_are_not_streamed(pipe):
    mask = pipe.tokenizer.mask_token_id
    with pytest.raises(ValueError, match="`streamer` is told what follows a prompt"):
        pipe.model.generate(torch.tensor([[40, mask]]), infill=True, streamer=Recorder())


def test_drafts_are_the_block_in_work_with_masks_where_nothing_is_committed(pipe):
    streamer, canvases = Recorder(), []

    def remember(step, timestep, state):
        canvases.append(state["canvas"])

    pipe.model.generate(PROMPTS, **SHORT, generator=seed(), streamer=streamer, on_step=remember)
    starts = [3, 3, 7, 7, 11, 11]
    drafts = streamer.values("draft")
    for draft, canvas, start in zip(drafts, canvases, starts, strict=True):
        assert torch.equal(draft, canvas[:, start : start + 4])
    masks = [int((draft == pipe.model.config.mask_token_id).sum()) for draft in drafts]
    assert masks == [4, 0, 4, 0, 2, 0]


def test_drafts_show_the_canvas_that_a_callback_returned(pipe):
    def write_77(step, timestep, state):
        return torch.where(state["generated"], 77, state["canvas"])

    streamer = Recorder()
    pipe.model.generate(PROMPTS, **SHORT, streamer=streamer, on_step=write_77)
    assert (streamer.values("draft")[0] == 77).all()


def test_blocks_after_the_end_of_all_texts_are_left_out(pipe):
    plain = pipe.model.generate(PROMPTS[:1], **SHORT, generator=seed())
    end = int(plain[0, 4])
    streamer = Recorder()
    ended = pipe.model.generate(
        PROMPTS[:1], **SHORT, generator=seed(), eos_token_id=end, streamer=streamer
    )
    _, *blocks = streamer.values("put")
    assert [block.tolist() for block in blocks] == [ended[:, 3:7].tolist()]
    assert ended[0, 4] == end
    assert (ended[0, 5:] == pipe.model.config.pad_token_id).all()


def test_transformers_streamer_draws_drafts_and_leaves_prompt_and_text(pipe, capsys):
    tokenizer = pipe.tokenizer
    ids = tokenizer("Tom has 3 eggs", return_tensors="pt")["input_ids"]
    words = tokenizer(" eggs and 5 red apples. He has 7", add_special_tokens=False)["input_ids"]
    assert len(words) >= SHORT["gen_length"]

    def write_words(step, timestep, state):
        canvas = state["canvas"].clone()
        chosen = state["transfer_index"][0].nonzero()[:, 0]
        canvas[0, chosen] = torch.tensor(words)[chosen - ids.shape[1]]
        return canvas

    streamer = TextDiffusionStreamer(tokenizer)
    output = pipe.model.generate(ids, **SHORT, streamer=streamer, on_step=write_words)
    drawn = capsys.readouterr().out
    # A draft stands between a saved cursor and the clearing behind it.
    left, drafts = re.subn("\x1b7.*?\x1b8\x1b\\[J", "", drawn, flags=re.DOTALL)
    assert drafts == 6
    assert left.rstrip() == tokenizer.decode(output[0]).rstrip()


@pytest.mark.parametrize("kind", [TextStreamer, TextIteratorStreamer])
def test_streamers_without_drafts_get_the_text(pipe, kind, capsys):
    streamer = kind(pipe.tokenizer, skip_prompt=True)
    output = pipe.model.generate(PROMPTS[:1], **SHORT, generator=seed(), streamer=streamer)
    text = "".join(streamer) if kind is TextIteratorStreamer else capsys.readouterr().out[:-1]
    assert text == pipe.tokenizer.decode(output[0, 3:])


def test_text_generation_pipeline_passes_a_streamer_on(pipe):
    streamer = Recorder()
    generator = pipeline("text-generation", model=pipe.model, tokenizer=pipe.tokenizer)
    generator("Tom has", max_new_tokens=8, block_length=4, streamer=streamer)
    assert sum(block.shape[1] for block in streamer.values("put")[1:]) == 8
    assert streamer.heard[-1] == ("end", None)
