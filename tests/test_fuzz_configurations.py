"""Promises on configurations that anybody may have written: one sentence, or a model that works."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from codd_hf import (
    CoDDConfig,
    CoDDHead,
    CoDDHeadConfig,
    CoDDModel,
    CoDDPipeline,
    CoDDScheduler,
)
from tiny import head_config, random_head, tiny_backbone

REFUSALS = (ValueError, TypeError, OSError)
NUMBERS = [0, 1, 2, 3, 4, 5, 12, -1, -3, 17, 2**15, 2**31, 2**63, 2**64, 10**12, 10**30, 10**400]
NUMBERS += [0.0, -0.0, 0.5, 1.5, 1e-320, 1e308, math.inf, -math.inf, math.nan]
TEXTS = ["", "x", "latent", "dense", "tied", "float16", "bfloat16", "none", "llama"]
TEXTS += ["\x00", "\x1b[31m", "é", "../..", "low_confidence", "threshold", "viterbi", "row"]
SCALARS = st.sampled_from([None, True, False, *NUMBERS, *TEXTS]) | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
UNKNOWN = st.sampled_from(["num_latens", "unknown", "transformers_weights", "_x"])
HEAD = st.sampled_from(sorted(CoDDHeadConfig.__annotations__)) | UNKNOWN
MODEL = st.sampled_from(["coupling", "mask_token_id", "forbidden_token_ids", "text_config"]) | HEAD
TEXT = st.sampled_from(sorted(tiny_backbone().config.to_dict())) | UNKNOWN
SCHEDULER = st.sampled_from(sorted(CoDDScheduler().config)) | UNKNOWN
INDEX = st.sampled_from(["_class_name", "model", "scheduler", "tokenizer", "unet", "_module"])

quick = settings(
    max_examples=40,
    derandomize=True,
    database=None,
    deadline=10_000,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def fields(names: st.SearchStrategy[str]) -> st.SearchStrategy[dict]:
    return st.dictionaries(names, VALUES, min_size=1, max_size=3)


def made(make, *args, names=(), **kwargs):
    """What `make` gives, or None where it refuses in one sentence that names one of `names`."""
    try:
        return make(*args, **kwargs)
    except REFUSALS as error:
        refusal = str(error)
    assert refusal
    assert "\n" not in refusal
    assert not names or any(name in refusal for name in names), refusal
    return None


def change(path: Path, changes: dict, *inside: str) -> None:
    content = part = json.loads(path.read_text())
    for name in inside:
        part = part[name]
    part.update(changes)
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzz")
    head = random_head(conditioning=["latent"], context_size=16)
    head.save_pretrained(root / "head")
    model = CoDDModel.from_backbone(tiny_backbone(), head)
    CoDDPipeline(model, CoDDScheduler()).save_pretrained(root / "pipeline")
    return root


def check_head_config(changes: dict) -> None:
    given_fields = head_config().to_dict() | changes
    config = made(CoDDHeadConfig, **given_fields, names=changes)
    if config is None:
        return
    assert isinstance(config.num_latents, int)
    assert not isinstance(config.num_latents, bool)
    assert config.num_latents >= 1
    assert 0 <= config.alpha < math.inf
    again = CoDDHeadConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()


def check_model_config(changes: dict) -> None:
    base = {"text_config": tiny_backbone().config, "head_config": head_config()}
    config = made(CoDDConfig, **(base | changes), names=changes)
    if config is not None:
        assert config.coupling in ("none", "marginal", "latent")
        assert config.mask_token_id is None or 0 <= config.mask_token_id < config.vocab_size


def check_scheduler_config(changes: dict) -> None:
    changes = {name: value for name, value in changes.items() if not name.startswith("_")}
    scheduler = made(CoDDScheduler.from_config, changes, names=changes)
    if scheduler is not None:
        scheduler.set_timesteps(4)
        logits = torch.randn(1, 4, 12, generator=torch.Generator().manual_seed(0))
        sample = torch.full((1, 4), 2)
        step = made(scheduler.step, logits, 1.0, sample, mask_token_id=2)
        assert step is None or not step.sampled_probs.isnan().any()


def check_folder(root: Path, folder: Path, part: str, changes: dict) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(root, folder)
    if part == "head":
        change(folder / "head/config.json", changes)
        loaded = [made(CoDDHead.from_pretrained, folder / "head")]
    elif part == "index":
        change(folder / "pipeline/model_index.json", changes)
        loaded = [made(CoDDPipeline.from_pretrained, folder / "pipeline")]
    else:
        change(folder / "pipeline/model/config.json", changes, part)
        loaded = [
            made(CoDDModel.from_pretrained, folder / "pipeline"),
            made(CoDDPipeline.from_pretrained, folder / "pipeline"),
        ]
    for model in loaded:
        weights = getattr(model, "model", model)
        if weights is not None:
            assert all(p.isfinite().all() for p in weights.parameters())


@quick
@given(fields(HEAD))
def test_head_configuration_is_made_or_refused_in_one_sentence(changes):
    check_head_config(changes)


@quick
@given(fields(MODEL))
def test_model_configuration_is_made_or_refused_in_one_sentence(changes):
    check_model_config(changes)


@quick
@given(fields(SCHEDULER))
def test_scheduler_configuration_is_made_or_refused_in_one_sentence(changes):
    check_scheduler_config(changes)


@pytest.mark.parametrize(
    ("part", "names"),
    [("head", HEAD), ("head_config", HEAD), ("text_config", TEXT), ("index", INDEX)],
)
def test_folder_is_loaded_or_refused_in_one_sentence(part, names, saved, tmp_path):
    @quick
    @given(fields(names))
    def check(changes):
        check_folder(saved, tmp_path / "folder", part, changes)

    check()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("check", "names"),
    [(check_head_config, HEAD), (check_model_config, MODEL), (check_scheduler_config, SCHEDULER)],
)
def test_many_configurations_are_made_or_refused_in_one_sentence(check, names):
    settings(quick, max_examples=3000, derandomize=False)(given(fields(names))(check))()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "names"),
    [("head", HEAD), ("head_config", HEAD), ("text_config", TEXT), ("index", INDEX)],
)
def test_many_folders_are_loaded_or_refused_in_one_sentence(part, names, saved, tmp_path):
    def check(changes):
        check_folder(saved, tmp_path / "folder", part, changes)

    settings(quick, max_examples=500, derandomize=False)(given(fields(names))(check))()
