"""Promises of evidence: it stands for the backbone, and for nothing else."""

from __future__ import annotations

import re
import resource
from dataclasses import replace

import pytest
import torch
from fitting import new_model

from codd_hf.data.canvases import TokenizedExample, batch_indices
from codd_hf.data.fingerprint import identity_of
from codd_hf.data.noise import draw_canvases
from codd_hf.training import Checkpoints, ConditionalConfig, fit_conditional
from codd_hf.training.fits import conditional
from codd_hf.training.fits.conditional import Evidence
from tiny import correlated_examples

EXAMPLES, CONTEXT = correlated_examples(24), ("latent", "copy")
CONFIG = ConditionalConfig(max_steps=3, tokens_per_batch=64, windows_per_batch=8, warmup_steps=1)


def write(model, tokenizer, folder, config=CONFIG, examples=EXAMPLES, **options) -> Evidence:
    backbone = identity_of(model, tokenizer)
    options = {"num_draws": 2} | options
    return Evidence(model, tokenizer, examples, config, backbone, folder, **options)


def equal(one: Evidence, other: Evidence) -> bool:
    rows = torch.arange(len(one))
    ours, theirs = one.take(rows).columns, other.take(rows).columns
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(conditional, "SHARD_BATCHES", 2)


@pytest.mark.parametrize("conditioning", [(), ("latent",), ("latent", "copy")])
def test_evidence_on_disk_is_that_in_memory(tiny_tokenizer, tmp_path, conditioning, small_shards):
    model = new_model(tiny_tokenizer, conditioning, evidence_temperature=0.7)
    held = write(model, tiny_tokenizer, None)
    made = write(model, tiny_tokenizer, tmp_path)
    assert len(held) == len(made) == 48
    found = write(model, tiny_tokenizer, tmp_path)
    forward, model.backbone.forward = model.backbone.forward, None
    assert (len(held.parts), len(found.parts) > 3) == (1, True)
    model.backbone.forward = forward
    assert equal(held, made)
    assert equal(held, found)
    windows = held.take(torch.arange(48))
    assert ("hidden" in windows.columns) == bool(conditioning)
    assert len(windows.columns["log_rest"]) == windows.columns["masked"].sum()
    rows = torch.tensor([47, 0, 13, 13, 30])
    gains = [evidence.scores(model.coupling_head, rows).gain for evidence in (held, found)]
    assert torch.equal(*gains)
    assert held.evaluate(model.coupling_head) == found.evaluate(model.coupling_head)


def test_size_is_said_when_the_first_file_is_written(
    tiny_tokenizer, tmp_path, capsys, small_shards
):
    model = new_model(tiny_tokenizer, CONTEXT)
    evidence = write(model, tiny_tokenizer, tmp_path, num_draws=200)
    assert len(evidence) == 4800
    said = re.search(r"Evidence about 4,800 windows: about ([\d.]+) GB", capsys.readouterr().out)
    on_disk = sum(file.stat().st_size for file in tmp_path.glob("*/*.safetensors"))
    assert float(said[1]) * 1e9 == pytest.approx(on_disk, rel=0.4)


def test_evidence_of_another_setting_model_or_text_is_another(tiny_tokenizer, tmp_path):
    model = new_model(tiny_tokenizer, CONTEXT)
    others = {
        "cache_size": 3,
        "mean_span_length": 2.0,
        "max_extra_windows": 0,
        "mixed_precision": "bf16",
    }
    made = [write(model, tiny_tokenizer, None)]
    made += [write(model, tiny_tokenizer, None, replace(CONFIG, **{k: others[k]})) for k in others]
    made += [write(model, tiny_tokenizer, None, **some) for some in ({"seed": 1}, {"num_draws": 3})]
    made += [write(model, tiny_tokenizer, None, examples=x) for x in (EXAMPLES[::-1], EXAMPLES[1:])]
    made += [write(new_model(tiny_tokenizer, c), tiny_tokenizer, None) for c in ((), ("latent",))]
    other = new_model(tiny_tokenizer, CONTEXT, {"rms_norm_eps": 1e-3}, evidence_temperature=0.5)
    made.append(write(other, tiny_tokenizer, None))
    with torch.no_grad():
        model.backbone.model.norm.weight[3] += 1e-3
    made.append(write(model, tiny_tokenizer, None))
    assert len({str(evidence.identity) for evidence in made}) == len(made)


def test_shards_that_a_kill_left_out_are_written_and_the_others_kept(
    tiny_tokenizer, tmp_path, small_shards
):
    model = new_model(tiny_tokenizer, CONTEXT)
    whole = write(model, tiny_tokenizer, None)
    assert len(write(model, tiny_tokenizer, tmp_path)) == 48
    shards = sorted(tmp_path.glob("*/*.safetensors"))
    shards[2].with_name(shards[2].name + ".new").write_bytes(shards[2].read_bytes()[:100])
    for shard in shards[2:]:
        shard.unlink()
    before = [shard.stat().st_mtime_ns for shard in shards[:2]]
    assert equal(write(model, tiny_tokenizer, tmp_path), whole)
    assert [shard.stat().st_mtime_ns for shard in shards[:2]] == before
    assert not list(tmp_path.glob("*/*.new"))


def test_damaged_file_is_an_error_that_says_what_to_do(tiny_tokenizer, tmp_path):
    model = new_model(tiny_tokenizer, CONTEXT)
    assert len(write(model, tiny_tokenizer, tmp_path)) == 48
    file = next(tmp_path.glob("*/*.safetensors"))
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(ValueError, match=r"is damaged .* delete the folder"):
        len(write(model, tiny_tokenizer, tmp_path))


def test_lack_of_room_is_an_error_that_says_so_and_the_run_goes_on_later(tiny_tokenizer, tmp_path):
    model = new_model(tiny_tokenizer, CONTEXT)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(OSError, match=r"could not be written: .* Make room and start again"):
            len(write(model, tiny_tokenizer, tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.glob("*/*.safetensors*"))
    assert equal(write(model, tiny_tokenizer, tmp_path), write(model, tiny_tokenizer, None))


def test_fit_that_goes_on_reads_its_evidence_and_needs_no_backbone(tiny_tokenizer, tmp_path):
    model, checkpoints = new_model(tiny_tokenizer, CONTEXT), Checkpoints(tmp_path / "conditional")
    data = (tiny_tokenizer, EXAMPLES, EXAMPLES[:4])
    fit_conditional(model, *data, CONFIG, checkpoints)
    model = new_model(tiny_tokenizer, CONTEXT)
    model.backbone.forward = None
    history = fit_conditional(model, *data, replace(CONFIG, max_steps=5), checkpoints)
    assert history[-1]["step"] == 5


def gradients(head, loss) -> list[torch.Tensor]:
    return torch.autograd.grad(loss, list(head.parameters()))


def live_gradients(model, tokenizer, examples, config) -> list[torch.Tensor]:
    """Those of the windows that the evidence is about, from the backbone itself."""
    lengths = [len(e.prompt_ids) + -(-len(e.answer_ids) // 4) * 4 for e in examples]
    batch = next(batch_indices(lengths, config.tokens_per_batch, 0))
    generator, rows = torch.Generator().manual_seed(0), [examples[i] for i in batch]
    canvas, noise = draw_canvases(rows, tokenizer, 4, 1, generator, window_probability=1.0)
    starts = noise.span.long().argmax(1)
    ids = canvas.input_ids.masked_fill(noise.masked, 1)
    states = model.backbone_states(ids, canvas.attention_mask)
    distribution = model.window_distribution(states, ids, starts, canvas.attention_mask)
    truth = canvas.input_ids.gather(1, starts[:, None] + torch.arange(4))
    loss = -(distribution.coupling_gain(truth) / noise.level).sum()
    return gradients(model.coupling_head, loss)


def test_gradients_from_evidence_are_those_of_the_live_backbone(tiny_tokenizer, tmp_path):
    model = new_model(tiny_tokenizer, CONTEXT).requires_grad_(False)
    head = model.coupling_head.requires_grad_(True)
    config = replace(CONFIG, cache_size=10_000, tokens_per_batch=10_000)
    evidence = write(model, tiny_tokenizer, tmp_path, config, num_draws=1)
    scores = evidence.scores(head, torch.arange(len(evidence)))
    cached = gradients(head, -(scores.gain / scores.level).sum())
    live = live_gradients(model, tiny_tokenizer, EXAMPLES, config)
    largest = max(g.abs().max() for g in live)
    assert largest > 1
    for ours, theirs in zip(cached, live, strict=True):
        assert (ours - theirs).abs().max() <= 1e-2 * largest


def test_empty_prompts_have_evidence_too(tiny_tokenizer, tmp_path):
    examples = [TokenizedExample([], e.answer_ids) for e in EXAMPLES]
    model = new_model(tiny_tokenizer, CONTEXT)
    evidence = write(model, tiny_tokenizer, tmp_path, examples=examples)
    windows = evidence.take(torch.arange(len(evidence)))
    assert (windows.columns["preceding_tokens"] == -1).all(1).any()
