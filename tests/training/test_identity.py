"""Promises of runs that go on: only a fit of the same data, tokens and weights is taken for one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import processes
import pytest
import torch

import launch
from codd_hf import CoDDModel
from codd_hf.data.tokenizers import train_tokenizer
from codd_hf.runtime.files import locked
from codd_hf.training import (
    Checkpoints,
    ConditionalConfig,
    PretrainingConfig,
    TrainConfig,
    fit_backbone,
    fit_conditional,
    train,
)
from tiny import SENTENCES, correlated_examples, random_head, tiny_backbone

TRAIN, VALIDATION = correlated_examples(12), correlated_examples(6, seed=1)
FIT = ConditionalConfig(
    max_steps=2, tokens_per_batch=128, windows_per_batch=4, num_draws=1, num_validation_draws=1
)


@pytest.fixture(scope="module")
def config(trained_config, cities_jsonl, tmp_path_factory) -> TrainConfig:
    """A run of three stages on data that may be edited, a few steps of each."""
    folder = tmp_path_factory.mktemp("edited")
    shutil.copy(cities_jsonl, folder / "data.jsonl")
    return replace(
        trained_config,
        dataset=str(folder / "data.jsonl"),
        output_dir=str(folder / "run"),
        pretraining=replace(trained_config.pretraining, max_steps=2),
        generative=replace(trained_config.generative, num_epochs=1),
        conditional=replace(trained_config.conditional, max_steps=2),
        num_gap_problems=0,
    )


@pytest.fixture(scope="module")
def finished(config) -> Path:
    train(config)
    return Path(config.output_dir)


@pytest.fixture
def copy(config, finished, tmp_path) -> TrainConfig:
    """The finished run in a folder that may be changed."""
    shutil.copytree(finished, tmp_path / "run")
    return replace(config, output_dir=str(tmp_path / "run"))


def edited(config: TrainConfig, row: int) -> TrainConfig:
    """The run beside the same number of rows, of which one is another."""
    lines = Path(config.dataset).read_text().splitlines(keepends=True)
    values = json.loads(lines[row]) | {"answer": " San Diego San Diego"}
    lines[row] = json.dumps(values) + "\n"
    path = Path(config.output_dir).with_name("data.jsonl")
    path.write_text("".join(lines))
    return replace(config, dataset=str(path))


@pytest.mark.parametrize("stages", [None, ["conditional"]])
@pytest.mark.parametrize(("row", "said"), [(3, "data"), (-20, "validation_data")])
def test_edited_data_of_equal_length_are_refused_in_a_sentence(stages, row, said, copy):
    changed, run = replace(edited(copy, row), stages=stages), Path(copy.output_dir)
    written = {p: p.stat().st_mtime_ns for p in run.glob("*/checkpoint-*/*")}
    remedy = rf"made with another `{said}` .*`--resume-from-checkpoint none`"
    with pytest.raises(ValueError, match=remedy):
        train(changed)
    more = replace(changed, conditional=replace(changed.conditional, max_steps=4))
    with pytest.raises(ValueError, match=remedy):  # nor is a fit that is half done continued
        train(more)
    assert {p: p.stat().st_mtime_ns for p in run.glob("*/checkpoint-*/*")} == written


def test_edited_data_are_fitted_where_a_run_begins_anew(copy, capsys):
    changed = edited(copy, 3)
    train(replace(changed, resume_from_checkpoint="none"))
    said = capsys.readouterr().out
    assert "goes on" not in said
    train(changed)
    assert capsys.readouterr().out.count("goes on") == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"conditioning": ["latent"]}, r"`conditioning` \(\['latent', 'copy'\], not"),
        ({"conditional.emission_power": 0.5}, r"`emission_power` \(0\.8, not 0\.5"),
    ],
)
def test_conditional_fit_that_began_otherwise_is_refused(changes, said, copy):
    ((name, value),) = changes.items()
    stage, _, field = name.rpartition(".")
    part = replace(getattr(copy, stage), **{field: value}) if stage else value
    with pytest.raises(ValueError, match=f"made with another {said}"):
        train(replace(copy, **{stage or field: part}))


def new_model(tokenizer, seed: int = 0) -> CoDDModel:
    backbone = tiny_backbone(vocab_size=len(tokenizer), eos_token_id=2)
    with torch.no_grad():
        backbone.lm_head.weight.mul_(1 + seed * 0.1)
    return CoDDModel.from_backbone(backbone, random_head(len(tokenizer), mask_token_id=1))


def test_backbone_or_tokenizer_that_is_another_is_refused(tiny_tokenizer, tmp_path):
    def fit(model, tokenizer):
        checkpoints = Checkpoints(tmp_path / "conditional")
        fit_conditional(model, tokenizer, TRAIN, VALIDATION, FIT, checkpoints)

    fit(new_model(tiny_tokenizer), tiny_tokenizer)
    fit(new_model(tiny_tokenizer), tiny_tokenizer)
    with pytest.raises(ValueError, match="another `model_weights`"):
        fit(new_model(tiny_tokenizer, seed=1), tiny_tokenizer)
    other = train_tokenizer([*SENTENCES[::-1], "zzz zzz"], len(tiny_tokenizer))
    assert other.get_vocab() != tiny_tokenizer.get_vocab()
    with pytest.raises(ValueError, match="another `tokenizer`"):
        fit(new_model(tiny_tokenizer), other)


def test_given_backbone_that_is_another_is_not_trained_further(tiny_tokenizer, tmp_path):
    settings = PretrainingConfig(max_steps=1, tokens_per_batch=64, mixed_precision="no")

    def fit(seed):
        args = (tiny_tokenizer, TRAIN, VALIDATION, settings, Checkpoints(tmp_path))
        fit_backbone(new_model(tiny_tokenizer, seed), *args, window_length=4)

    fit(0)
    fit(0)
    with pytest.raises(ValueError, match="another `model_weights`"):
        fit(1)


@pytest.mark.parametrize("number", [1, 2])
def test_second_run_into_an_output_folder_is_refused_and_nothing_is_lost(number, copy):
    changed, run = replace(copy, resume_from_checkpoint="none"), Path(copy.output_dir)
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
    with locked(run / ".lock", "`output_dir`"):
        started = launch.start(processes.whole_training, changed, processes=number)
        for process in started:
            process.join(60)
        assert [process.exitcode for process in started] == [1] * number
        with pytest.raises(OSError, match=r"`output_dir` '.*run' is being written by another run"):
            train(changed)
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("content", ["{", "[]"])
def test_damaged_file_of_a_run_is_named(content, copy):
    (Path(copy.output_dir) / "conditional/checkpoint-2/state.json").write_text(content)
    more = replace(copy.conditional, max_steps=4)
    with pytest.raises(ValueError, match=r"conditional/checkpoint-2.*damaged"):
        train(replace(copy, stages=["conditional"], conditional=more))
