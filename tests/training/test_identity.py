"""Promises of runs that go on: only a fit of the same data, tokens and weights is taken for one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import processes
import pytest
import torch

from codd_hf import CoDDModel
from codd_hf.data.tokenizers import train_tokenizer
from codd_hf.runtime.locks import locked
from codd_hf.training.evidence.cache import cache_windows
from codd_hf.training.fits.conditional import fit_conditional, fit_head
from codd_hf.training.fits.pretraining import finetune_backbone
from codd_hf.training.loop.checkpoints import Checkpoints
from codd_hf.training.run import train
from codd_hf.training.settings import ConditionalConfig, PretrainingConfig, TrainConfig
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


def edited(config: TrainConfig, folder: Path, row: int) -> TrainConfig:
    """The finished run beside the same number of rows, of which one is another."""
    shutil.copytree(config.output_dir, folder / "run")
    lines = Path(config.dataset).read_text().splitlines(keepends=True)
    values = json.loads(lines[row]) | {"answer": " San Diego San Diego"}
    lines[row] = json.dumps(values) + "\n"
    (folder / "data.jsonl").write_text("".join(lines))
    return replace(config, dataset=str(folder / "data.jsonl"), output_dir=str(folder / "run"))


@pytest.mark.parametrize("stages", [None, ["generative"], ["conditional"]])
@pytest.mark.parametrize(("row", "said"), [(3, "training data"), (-20, "validation data")])
def test_edited_data_of_equal_length_are_refused_in_a_sentence(
    stages, row, said, config, finished, tmp_path
):
    changed = replace(edited(config, tmp_path, row), stages=stages)
    written = {p: p.stat().st_mtime_ns for p in tmp_path.glob("run/*/checkpoint-*/*")}
    remedy = rf"made with other {said} .*`--resume-from-checkpoint none`"
    with pytest.raises(ValueError, match=remedy):
        train(changed)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("run/*/checkpoint-*/*")} == written


def test_edited_data_are_fitted_where_a_run_begins_anew(config, finished, tmp_path, capsys):
    changed = edited(config, tmp_path, 3)
    train(replace(changed, resume_from_checkpoint="none"))
    said = capsys.readouterr().out
    assert "is of something else, and is deleted" in said
    assert "is complete" not in said
    train(changed)
    assert capsys.readouterr().out.count("is complete") == 3


def test_fit_that_is_half_done_does_not_go_on_with_other_data(config, finished, tmp_path):
    changed = edited(config, tmp_path, 3)
    more = replace(changed.conditional, max_steps=4)
    with pytest.raises(ValueError, match="made with other training data"):
        train(replace(changed, stages=["conditional"], conditional=more))
    assert Checkpoints(tmp_path / "run" / "conditional").steps() == [2]


@pytest.mark.parametrize(
    "changes", [{"alpha": 0.5}, {"emission_power": 0.5}, {"transition_power": 1.0}]
)
def test_conditional_fit_that_began_otherwise_is_refused(changes, config, finished, tmp_path):
    ((name, value),) = changes.items()
    shutil.copytree(finished, tmp_path / "run")
    changed = replace(config, output_dir=str(tmp_path / "run"), **changes)
    with pytest.raises(
        ValueError, match=rf"began with `{name}` {getattr(config, name)}, not {value}"
    ):
        train(changed)


def test_conditional_fit_of_another_head_is_refused(config, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    changed = replace(config, output_dir=str(tmp_path / "run"), conditioning=["latent"])
    with pytest.raises(ValueError, match=r"made with `conditioning` \['latent', 'copy'\], not"):
        train(changed)


def new_model(tokenizer, seed: int = 0) -> CoDDModel:
    backbone = tiny_backbone(vocab_size=len(tokenizer), eos_token_id=2)
    with torch.no_grad():
        backbone.lm_head.weight.mul_(1 + seed * 0.1)
    return CoDDModel.from_backbone(backbone, random_head(len(tokenizer), mask_token_id=1))


def test_backbone_or_tokenizer_that_is_another_is_refused(tiny_tokenizer, tmp_path):
    def fit(model, tokenizer, **options):
        fit_conditional(model, tokenizer, TRAIN, VALIDATION, tmp_path, FIT, **options)

    fit(new_model(tiny_tokenizer), tiny_tokenizer)
    fit(new_model(tiny_tokenizer), tiny_tokenizer)
    with pytest.raises(ValueError, match=r"other weights of the backbone \(`model_weights`\)"):
        fit(new_model(tiny_tokenizer, seed=1), tiny_tokenizer)
    other = train_tokenizer([*SENTENCES[::-1], "zzz zzz"], len(tiny_tokenizer))
    assert other.get_vocab() != tiny_tokenizer.get_vocab()
    with pytest.raises(ValueError, match=r"other tokens of the tokenizer \(`tokenizer`\)"):
        fit(new_model(tiny_tokenizer), other)
    fit(new_model(tiny_tokenizer, seed=1), tiny_tokenizer, resume_from_checkpoint="none")


def test_evidence_that_is_other_is_refused_by_a_fit_of_a_head_alone(tiny_tokenizer, tmp_path):
    evidence = FIT.evidence(1, 0)
    models = [new_model(tiny_tokenizer, seed) for seed in (0, 1)]
    for place in (None, tmp_path / "evidence"):
        caches = []
        for number, model in enumerate(models):
            folder = None if place is None else place / str(number)
            args = (model, tiny_tokenizer, TRAIN, evidence, folder)
            caches.append(cache_windows(*args, progress=False))
        folder = tmp_path / str(place is None)
        heads = [model.coupling_head for model in models]
        fit_head(heads[0], caches[0], caches[0], folder, FIT)
        fit_head(heads[0], caches[0], caches[0], folder, FIT)
        with pytest.raises(ValueError, match=r"other evidence \(`evidence`\)"):
            fit_head(heads[1], caches[1], caches[1], folder, FIT)


def test_given_backbone_that_is_another_is_not_trained_further(tiny_tokenizer, tmp_path):
    settings = PretrainingConfig(
        max_steps=1, tokens_per_batch=64, window_length=4, mixed_precision="no"
    )

    def fit(seed):
        backbone = new_model(tiny_tokenizer, seed).backbone
        finetune_backbone(backbone, tiny_tokenizer, TRAIN, VALIDATION, tmp_path, settings)

    fit(0)
    fit(0)
    with pytest.raises(ValueError, match="other weights of the backbone"):
        fit(1)


@pytest.mark.parametrize("number", [1, 2])
def test_second_run_into_an_output_folder_is_refused_and_nothing_is_lost(
    number, config, finished, tmp_path
):
    shutil.copytree(finished, tmp_path / "run")
    changed = replace(config, output_dir=str(tmp_path / "run"), resume_from_checkpoint="none")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with locked(tmp_path / "run" / ".lock", "`output_dir`"):
        started = processes.start(processes.whole_training, changed, processes=number)
        for process in started:
            process.join(60)
        assert [process.exitcode for process in started] == [1] * number
        with pytest.raises(OSError, match=r"`output_dir` '.*run' is being written by another run"):
            train(changed)
    after = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert after == before


def test_evidence_that_another_run_writes_is_refused_until_it_is_whole(tiny_tokenizer, tmp_path):
    model = new_model(tiny_tokenizer)
    arguments = (model, tiny_tokenizer, TRAIN, FIT.evidence(1, 0), tmp_path)
    with (
        locked(tmp_path / ".lock", "`x`"),
        pytest.raises(OSError, match=r"The evidence in .* is being written by another run"),
    ):
        cache_windows(*arguments, progress=False)
    cache_windows(*arguments, progress=False)
    with locked(tmp_path / ".lock", "`x`"):
        assert len(cache_windows(*arguments, progress=False)) == len(TRAIN)


@pytest.mark.parametrize("content", ["{", "[]"])
@pytest.mark.parametrize(
    "name",
    [
        "began_with.json",
        "evidence/train/fingerprint.json",
        "generative/checkpoint-9/state.json",
        "generative_history.json",
    ],
)
def test_damaged_file_of_a_run_is_named(name, content, config, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / name).write_text(content if name != "generative_history.json" else "{}")
    more = replace(config.conditional, max_steps=4)
    changed = replace(config, output_dir=str(tmp_path / "run"), conditional=more)
    with pytest.raises(ValueError, match=rf"{Path(name).parent}.*damaged"):
        train(replace(changed, stages=["conditional"]))
