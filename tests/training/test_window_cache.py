"""Promises of the evidence cache: it stands for the backbone, and for nothing else."""

from __future__ import annotations

import re
import resource
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from fitting import equal_states, new_model

from codd_hf.data.canvases import TokenizedExample, batch_indices
from codd_hf.data.noise import draw_windows
from codd_hf.training import Checkpoints, ConditionalConfig, fit_conditional, fit_head
from codd_hf.training.evidence import cache as window_cache
from codd_hf.training.evidence.cache import WindowCache, cache_windows
from codd_hf.training.fits.conditional import evaluate_head
from tiny import correlated_examples

EXAMPLES, CONTEXT = correlated_examples(24), ("latent", "copy")
CONFIG = ConditionalConfig(max_steps=3, tokens_per_batch=64, windows_per_batch=8, warmup_steps=1)


def write(model, tokenizer, folder, config=CONFIG, examples=EXAMPLES, **options) -> WindowCache:
    options = {"num_draws": 2} | options
    return cache_windows(model, tokenizer, examples, config, folder, **options)


def equal(one: WindowCache, other: WindowCache) -> bool:
    rows = torch.arange(len(one))
    pairs = zip(vars(one.take(rows)).values(), vars(other.take(rows)).values(), strict=True)
    return all(a is b is None or torch.equal(a, b) for a, b in pairs)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(window_cache, "SHARD_BYTES", 4096)


@pytest.mark.parametrize("conditioning", [(), ("latent",), ("latent", "copy")])
def test_evidence_on_disk_is_that_in_memory(tiny_tokenizer, tmp_path, conditioning, small_shards):
    model = new_model(tiny_tokenizer, conditioning)
    config = replace(CONFIG, evidence_temperature=0.7)
    held = write(model, tiny_tokenizer, None, config)
    made = write(model, tiny_tokenizer, tmp_path, config)
    found = WindowCache.open(tmp_path)
    assert len(held) == len(made) == len(found) == 48
    assert (len(held.parts), len(found.parts) > 3) == (1, True)
    assert equal(held, made)
    assert equal(held, found)
    assert found.temperature == 0.7
    windows = held.take(torch.arange(48))
    assert (windows.hidden is None) == (conditioning == ())
    assert len(windows.log_rest) == windows.masked.sum()
    rows = torch.tensor([47, 0, 13, 13, 30])
    gains = [cache.scores(model.coupling_head, rows).gain for cache in (held, found)]
    assert torch.equal(*gains)
    measured = [evaluate_head(model.coupling_head, cache) for cache in (held, found)]
    assert measured[0] == measured[1]


def test_size_is_said_before_anything_is_written(tiny_tokenizer, tmp_path, capsys):
    model = new_model(tiny_tokenizer, CONTEXT)
    cache = write(model, tiny_tokenizer, tmp_path, num_draws=8)
    printed = capsys.readouterr().out
    assert "Evidence about 192 of 192 windows of 4 tokens" in printed
    each = float(re.search(r"\(([\d.]+) GB per million tokens\)", printed)[1]) * 4 * 1e3
    assert each * 192 == pytest.approx(sum(part.size for part in cache.parts), rel=0.2)
    on_disk = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert each * 192 == pytest.approx(on_disk, rel=0.2)


def test_evidence_of_another_setting_model_or_text_is_refused_and_the_field_named(
    tiny_tokenizer, tmp_path
):
    model = new_model(tiny_tokenizer, CONTEXT)
    write(model, tiny_tokenizer, tmp_path)
    changes = {
        "evidence_temperature": 0.5,
        "cache_size": 3,
        "mean_span_length": 2.0,
        "max_extra_windows": 0,
        "mixed_precision": "bf16",
    }
    for name, value in changes.items():
        with pytest.raises(ValueError, match=f"made with `{name}` .*, not {value!r}"):
            write(model, tiny_tokenizer, tmp_path, replace(CONFIG, **{name: value}))
    for options in ({"seed": 1}, {"num_draws": 3}):
        with pytest.raises(ValueError, match=f"made with `{next(iter(options))}`"):
            write(model, tiny_tokenizer, tmp_path, **options)
    for examples in (EXAMPLES[::-1], EXAMPLES[:-1]):
        with pytest.raises(ValueError, match=r"other examples \(`examples`\)"):
            write(model, tiny_tokenizer, tmp_path, examples=examples)
    with pytest.raises(ValueError, match="made with `hidden_states` True, not False"):
        write(new_model(tiny_tokenizer, ()), tiny_tokenizer, tmp_path)
    with pytest.raises(ValueError, match="made with `copy_length` 6, not 0"):
        write(new_model(tiny_tokenizer, ("latent",)), tiny_tokenizer, tmp_path)
    with pytest.raises(ValueError, match="other settings of the backbone"):
        write(new_model(tiny_tokenizer, CONTEXT, {"rms_norm_eps": 1e-3}), tiny_tokenizer, tmp_path)
    with torch.no_grad():
        model.backbone.model.norm.weight[3] += 1e-3
    with pytest.raises(ValueError, match=r"other weights of the backbone .*another `evidence_dir`"):
        write(model, tiny_tokenizer, tmp_path)


def test_shards_that_a_kill_left_out_are_written_and_the_others_kept(
    tiny_tokenizer, tmp_path, small_shards
):
    model = new_model(tiny_tokenizer, CONTEXT)
    whole = write(model, tiny_tokenizer, None)
    write(model, tiny_tokenizer, tmp_path)
    shards = sorted(tmp_path.glob("*.safetensors"))
    (tmp_path / (shards[2].name + ".new")).write_bytes(shards[2].read_bytes()[:100])
    for shard in shards[2:]:
        shard.unlink()
    with pytest.raises(FileNotFoundError, match="no complete evidence"):
        WindowCache.open(tmp_path)
    before = [shard.stat().st_mtime_ns for shard in shards[:2]]
    assert equal(write(model, tiny_tokenizer, tmp_path), whole)
    assert [shard.stat().st_mtime_ns for shard in shards[:2]] == before
    assert not list(tmp_path.glob("*.new"))


@pytest.mark.parametrize("content", [None, b"{", b"{}"])
@pytest.mark.parametrize("pattern", ["*.safetensors", "fingerprint.json"])
def test_damaged_file_is_an_error_that_says_what_to_do(tiny_tokenizer, tmp_path, pattern, content):
    write(new_model(tiny_tokenizer, CONTEXT), tiny_tokenizer, tmp_path)
    file = next(tmp_path.glob(pattern))
    file.write_bytes(file.read_bytes()[:20] if content is None else content)
    with pytest.raises(ValueError, match=r"damaged|does not say what made the evidence"):
        WindowCache.open(tmp_path)


def test_lack_of_room_is_an_error_that_says_so_and_the_run_goes_on_later(
    tiny_tokenizer, tmp_path, monkeypatch
):
    model = new_model(tiny_tokenizer, CONTEXT)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100))
        with pytest.raises(OSError, match=r"takes about .* GB left: make room"):
            write(model, tiny_tokenizer, tmp_path / "large")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(OSError, match=r"could not be written: .* Make room and start again"):
            write(model, tiny_tokenizer, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.glob("*.safetensors*"))
    assert equal(write(model, tiny_tokenizer, tmp_path), write(model, tiny_tokenizer, None))


def test_fit_from_evidence_needs_no_backbone(tiny_tokenizer, tmp_path):
    model, checkpoints = new_model(tiny_tokenizer, CONTEXT), Checkpoints(tmp_path / "conditional")
    data = (tiny_tokenizer, EXAMPLES, EXAMPLES[:4])
    fit_conditional(model, *data, CONFIG, checkpoints)
    head = new_model(tiny_tokenizer, CONTEXT).coupling_head
    caches = [WindowCache.open(tmp_path / "evidence" / name) for name in ("train", "validation")]
    fit_head(head, *caches, CONFIG)
    assert equal_states(model.coupling_head, head)
    # Nor does a run that is continued.
    model = new_model(tiny_tokenizer, CONTEXT)
    model.backbone.forward = None
    history = fit_conditional(model, *data, replace(CONFIG, max_steps=5), checkpoints)
    assert history[-1]["step"] == 5


def gradients(head, loss) -> list[torch.Tensor]:
    return torch.autograd.grad(loss, list(head.parameters()))


def live_gradients(model, tokenizer, examples, config) -> list[torch.Tensor]:
    """Those of the windows that the cache draws, from the backbone itself."""
    lengths = [len(e.prompt_ids) + -(-len(e.answer_ids) // 4) * 4 for e in examples]
    batch = next(batch_indices(lengths, config.tokens_per_batch, 0))
    canvas, noise, starts = draw_windows(
        [examples[i] for i in batch], tokenizer, 4, 1, torch.Generator().manual_seed(0)
    )
    ids = canvas.input_ids.masked_fill(noise.masked, 1)
    states = model.backbone_states(ids, canvas.attention_mask)
    distribution = model.window_distribution(states, ids, starts, canvas.attention_mask)
    truth = canvas.input_ids.gather(1, starts[:, None] + torch.arange(4))
    loss = -(distribution.coupling_gain(truth) / noise.level).sum()
    return gradients(model.coupling_head, loss)


def test_gradients_from_the_cache_are_those_of_the_live_backbone(tiny_tokenizer, tmp_path):
    model = new_model(tiny_tokenizer, CONTEXT).requires_grad_(False)
    head = model.coupling_head.requires_grad_(True)
    config = replace(CONFIG, cache_size=10_000, tokens_per_batch=10_000)
    cache = write(model, tiny_tokenizer, tmp_path, config, num_draws=1)
    scores = cache.scores(head, torch.arange(len(cache)))
    cached = gradients(head, -(scores.gain / scores.level).sum())
    live = live_gradients(model, tiny_tokenizer, EXAMPLES, config)
    largest = max(g.abs().max() for g in live)
    assert largest > 1
    for ours, theirs in zip(cached, live, strict=True):
        assert (ours - theirs).abs().max() <= 1e-2 * largest


def test_empty_prompts_have_evidence_too(tiny_tokenizer, tmp_path):
    examples = [TokenizedExample([], e.answer_ids) for e in EXAMPLES]
    cache = write(new_model(tiny_tokenizer, CONTEXT), tiny_tokenizer, tmp_path, examples=examples)
    windows = cache.take(torch.arange(len(cache)))
    assert (windows.preceding_tokens == -1).all(1).any()
