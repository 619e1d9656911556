"""Caches: what is kept is kept exactly, the rest is computed anew, and rows stay independent."""

from __future__ import annotations

import pytest
import torch
from windows import read, reader_of, stage_of

from codd_hf import CoDDModel, CoDDPipeline, CoDDScheduler
from tiny import random_head, tiny_backbone

PROMPTS = [[3, 4], [5, 6, 7, 8, 9, 10, 3], [4, 5, 6]]
SHORT = {"gen_length": 10, "block_length": 5, "num_inference_steps": 6, "output_type": "seq"}
CACHES = ["prefix", "dual"]
MASK = 2
BACKBONES = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "shifted": ("qwen2", {"logit_shift": True}),
    "shared keys": ("llama", {"num_key_value_heads": 1}),
    "eager": ("llama", {"attn_implementation": "eager"}),
    "block-causal": ("llama", {"block_length": 4}),
}


def pipeline_of(model, **scheduler):
    pipe = CoDDPipeline(model=model, scheduler=CoDDScheduler(**scheduler))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def copying_pipe():
    """With a head that reads hidden states before the window, and windows longer than a block."""
    head = random_head(
        window_length=8, conditioning=["latent", "copy"], context_size=16, copy_length=16
    )
    return pipeline_of(CoDDModel.from_backbone(tiny_backbone(), head), evidence_temperature=0.7)


def canvases() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens and mask of three ragged rows, and the block to fill: `[3, 20]`."""
    column = torch.arange(20)
    end = torch.tensor([[17], [20], [15]])
    mask, generated = (column < end).long(), (column >= end - 10) & (column < end)
    generator = torch.Generator().manual_seed(0)
    canvas = torch.randint(3, 12, mask.shape, generator=generator)
    canvas = canvas.masked_fill(generated, MASK).masked_fill(mask == 0, 0)
    return canvas, mask, generated & (column >= end - 7) & (column < end - 3)


def some_committed(canvas: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """The canvas with tokens at every second position of the block."""
    every_second = block & (torch.arange(canvas.shape[1]) % 2 == 0)
    return canvas.masked_fill(every_second, 5)


def recorded(backbone, kept: dict[str, torch.Tensor], again: torch.Tensor | None):
    """Hooks under which whole passes see kept keys and values, other than where they are new.

    With `again` None they are recorded.
    """

    def hook_for(name):
        def hook(module, args, output):
            if again is None:
                kept[name] = output.clone()
                return None
            return torch.where(again[..., None], output, kept[name])

        return hook

    return [
        module.register_forward_hook(hook_for(name))
        for name, module in backbone.named_modules()
        if name.endswith(("k_proj", "v_proj"))
    ]


@torch.no_grad()
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_partial_pass_is_a_whole_one_with_kept_keys_and_values(backbone, cache):
    kind, changes = BACKBONES[backbone]
    model = CoDDModel.from_backbone(tiny_backbone(kind, **changes), mask_token_id=MASK)
    canvas, mask, block = canvases()
    reader = reader_of(model, canvas, mask, cache=cache)
    reader.begin_stage(stage_of(block))

    kept: dict[str, torch.Tensor] = {}
    hooks = recorded(model.backbone, kept, None)
    first = model.backbone_states(canvas, mask).logits()
    for hook in hooks:
        hook.remove()
    assert torch.equal(read(reader, canvas, range(3)).logits(), first)
    unchanged = read(reader, canvas, range(3)).logits()
    real = mask.bool()
    torch.testing.assert_close(unchanged[real], first[real], atol=1e-5, rtol=0)

    later = some_committed(canvas, block)
    again = block if cache == "dual" else (block.cumsum(1) > 0) & real
    if changes.get("logit_shift"):
        again = again | again.roll(-1, 1)
    hooks = recorded(model.backbone, kept, again)
    expected = model.backbone_states(later, mask).logits()
    for hook in hooks:
        hook.remove()
    states = read(reader, later, range(3))
    torch.testing.assert_close(states.logits()[block], expected[block], atol=1e-5, rtol=0)
    at = block.nonzero(as_tuple=True)
    torch.testing.assert_close(states.logits(at), expected[at], atol=1e-5, rtol=0)
    whole = model.backbone_states(later, mask).logits()
    if backbone != "block-causal":
        assert (whole[block] - expected[block]).abs().max() > 1e-3  # it is an approximation

    fewer = read(reader, later, range(1, 3)).logits()
    torch.testing.assert_close(fewer[block[1:]], expected[1:][block[1:]], atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("cache", CACHES)
def test_later_steps_compute_the_block_alone_and_copy_nothing(cache):
    model = CoDDModel.from_backbone(tiny_backbone(), mask_token_id=MASK)
    canvas, mask, block = canvases()
    reader = reader_of(model, canvas, mask, cache=cache)
    lengths = []
    layer = model.backbone.get_decoder().layers[0].self_attn
    layer.k_proj.register_forward_hook(lambda m, args, out: lengths.append(out.shape[1]))
    reader.begin_stage(stage_of(block))
    memory = []
    for _ in range(3):
        read(reader, canvas, range(3))
        memory.append([reader.cache.layers[0].keys.data_ptr(), reader.cache.hidden.data_ptr()])
    assert lengths == [20] + [{"dual": 4, "prefix": 7}[cache]] * 2
    assert memory[0] == memory[1] == memory[2]


@torch.no_grad()
def test_row_that_is_new_is_read_whole_and_the_others_as_before():
    model = CoDDModel.from_backbone(tiny_backbone(), mask_token_id=MASK)
    canvas, mask, block = canvases()
    reader = reader_of(model, canvas, mask, cache="dual")
    reader.begin_stage(stage_of(block))
    read(reader, canvas, range(2))  # row 2 comes later
    later = some_committed(canvas, block)
    untouched = read(reader, later, range(1)).logits().clone()
    later[1, 0] = 4  # in its prompt
    reader.forget(torch.tensor([False, True, False]))
    states = read(reader, later, range(3)).logits()
    whole = model.backbone_states(later, mask).logits()
    torch.testing.assert_close(states[0][block[0]], untouched[0][block[0]], atol=1e-5, rtol=0)
    assert (states[0] - whole[0])[block[0]].abs().max() > 1e-3
    for row in (1, 2):
        torch.testing.assert_close(states[row][block[row]], whole[row][block[row]])


def test_row_that_a_caller_changes_is_read_again():
    model = CoDDModel.from_backbone(tiny_backbone(), mask_token_id=MASK)
    read, layer = [], model.backbone.get_decoder().layers[0].self_attn
    layer.k_proj.register_forward_hook(lambda m, args, out: read.append(tuple(out.shape[:2])))

    def change(step, timestep, state):
        state["canvas"][1, 0] = 4
        return state["canvas"]

    prompts = torch.tensor([[5, 6, 7], [8, 9, 10]])
    call = {"gen_length": 4, "num_inference_steps": 3, "eos_token_id": [], "cache": "dual"}
    model.generate(prompts, on_step=change, **call)
    assert read == [(2, 7), (2, 7), (2, 4)]


@pytest.mark.parametrize("cache", CACHES)
def test_one_step_a_block_needs_no_cache_and_gives_the_same_tokens(copying_pipe, cache):
    kwargs = {**SHORT, "num_inference_steps": 2, "sampling": "marginal", "temperature": 0.9}
    runs = [
        copying_pipe(
            input_ids=PROMPTS, generator=torch.Generator().manual_seed(0), cache=choice, **kwargs
        ).sequences
        for choice in (None, cache)
    ]
    assert torch.equal(*runs)


@pytest.mark.parametrize("cache", CACHES)
def test_block_causal_backbone_loses_nothing(cache):
    """Blocks that see nothing later have keys and values that no later token changes."""
    pipe = pipeline_of(CoDDModel.from_backbone(tiny_backbone(block_length=5), random_head()))
    prompts = [[3, 4, 5, 6, 7], [8, 9, 10, 3, 4, 5, 6, 7, 8, 9]]
    kwargs = {**SHORT, "num_inference_steps": 10, "sampling": "factorized", "eos_token_id": []}
    kept, plain = (pipe(input_ids=prompts, cache=c, **kwargs).sequences for c in (cache, None))
    assert torch.equal(kept, plain)
    assert kept.unique().numel() > 2


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("strategy", ["low_confidence", "threshold"])
def test_row_alone_and_in_a_batch_with_every_cache(copying_pipe, cache, strategy):
    def seeds() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(10 + row) for row in range(len(PROMPTS))]

    kwargs = {
        **SHORT,
        "sampling": "latent",
        "strategy": strategy,
        "temperature": 0.9,
        "threshold": 0.4,
        "eos_token_id": 1,
        "cache": cache,
    }
    batched = copying_pipe(input_ids=PROMPTS, generator=seeds(), **kwargs)
    for row, prompt in enumerate(PROMPTS):
        alone = copying_pipe(input_ids=prompt, generator=[seeds()[row]], **kwargs)
        assert torch.equal(alone.sequences[0], batched.sequences[row])
        assert alone.num_passes == int(batched.passes_per_row[row])


def test_full_paradigm_keeps_the_prompt_and_generate_takes_a_cache_as_well(copying_pipe):
    kwargs = {"num_inference_steps": 4, "sampling": "viterbi", "paradigm": "full"}
    piped = copying_pipe(
        input_ids=PROMPTS[1], gen_length=8, output_type="seq", cache="dual", **kwargs
    )
    generated = copying_pipe.model.generate(
        torch.tensor(PROMPTS[1:2]),
        max_new_tokens=8,
        cache="dual",
        scheduler=copying_pipe.scheduler,
        **kwargs,
    )
    assert torch.equal(generated[:, len(PROMPTS[1]) :], piped.sequences)


@pytest.mark.parametrize(
    ("kind", "changes", "cache", "said"),
    [
        ("bert", {}, "dual", "model type 'bert'"),
        ("roberta", {}, "prefix", "model type 'roberta'"),
        ("llama", {}, "static", "one of None, False, prefix, dual, got 'static'"),
        ("qwen2", {"use_sliding_window": True}, "dual", "`sliding_window="),
    ],
)
def test_cache_that_cannot_be_is_one_sentence_that_names_it(kind, changes, cache, said):
    backbone = tiny_backbone(kind, **changes)
    pipe = pipeline_of(CoDDModel.from_backbone(backbone, mask_token_id=MASK))
    with pytest.raises(ValueError, match="`cache`") as error:
        pipe(input_ids=PROMPTS, cache=cache, **SHORT)
    assert said in str(error.value)
