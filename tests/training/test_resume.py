"""Promises of stages, and of the choice where to go on from."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from codd_hf import CoDDHead, CoDDModel, CoDDPipeline
from codd_hf.training import (
    Checkpoints,
    JointConfig,
    TrainConfig,
    train,
)


@pytest.fixture(scope="module")
def config(trained_config, trained_pipeline, tmp_path_factory) -> TrainConfig:
    """A run on a given backbone, with many checkpoints."""
    return replace(
        trained_config,
        backbone=str(trained_pipeline.parent / "backbone"),
        output_dir=str(tmp_path_factory.mktemp("resume")),
        num_gap_problems=0,
        generative=replace(trained_config.generative, num_epochs=3, checkpointing_steps=9),
        conditional=replace(trained_config.conditional, max_steps=6, checkpointing_steps=1),
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


def same_head(config: TrainConfig, finished: Path) -> bool:
    paths = (Path(config.output_dir), finished)
    ours, theirs = (load_file(p / "conditional/head/model.safetensors") for p in paths)
    return all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_complete_stages_are_not_run_again(copy, finished, capsys):
    folder = Path(copy.output_dir)
    shutil.rmtree(folder / "evidence")
    shutil.rmtree(folder / "pipeline")
    written = {p: p.stat().st_mtime_ns for p in folder.glob("*/checkpoint-*/*")}
    assert len(written) == 8
    train(copy)
    assert {p: p.stat().st_mtime_ns for p in folder.glob("*/checkpoint-*/*")} == written
    assert not (folder / "evidence").exists()
    printed = capsys.readouterr().out
    assert "The generative fit goes on from step 27 of 27." in printed
    assert "The conditional fit goes on from step 6 of 6." in printed
    assert same_head(copy, finished)
    CoDDPipeline.from_pretrained(folder / "pipeline")


def test_run_goes_on_from_the_older_checkpoint_where_the_newest_is_damaged(copy, finished, capsys):
    checkpoints = Checkpoints(Path(copy.output_dir) / "conditional")
    assert checkpoints.steps() == [5, 6]
    file = checkpoints.path(6) / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"checkpoint-6' cannot be continued .* delete it, and"):
        train(copy)
    shutil.rmtree(checkpoints.path(6))
    train(copy)
    assert "goes on from step 5 of 6" in capsys.readouterr().out
    assert same_head(copy, finished)


def test_stages_begin_anew_where_that_is_asked_for(copy, finished, capsys):
    before = (Path(copy.output_dir) / "generative").stat().st_ino
    train(replace(copy, stages=["conditional"], resume_from_checkpoint="none"))
    assert (Path(copy.output_dir) / "generative").stat().st_ino == before
    printed = capsys.readouterr().out
    assert "The stage 'conditional' begins anew" in printed
    assert "The conditional fit measures" in printed
    assert "generative" not in printed
    assert same_head(copy, finished)


def test_stage_is_not_continued_once_the_one_before_it_was_run_on(copy):
    more = replace(copy.generative, num_epochs=4)
    for _ in range(2):  # the second time, the stage before is complete
        with pytest.raises(ValueError, match="made with another `start`"):
            train(replace(copy, generative=more))
    train(replace(copy, generative=more, stages=["conditional"], resume_from_checkpoint="none"))
    train(replace(copy, generative=more))


def test_stages_run_alone_and_in_turns(config, finished, tmp_path):
    config = replace(config, output_dir=str(tmp_path))
    with pytest.raises(ValueError, match="no finished result of the stage 'generative': add"):
        train(replace(config, stages=["conditional"]))
    pipeline = train(replace(config, stages=["generative"]))
    coupled = CoDDModel.from_pretrained(pipeline / "model").coupling_head
    circuit = CoDDHead.from_pretrained(tmp_path / "generative/head")
    assert torch.allclose(coupled.emission, circuit.emission, rtol=1e-2, atol=1e-2)
    with pytest.raises(ValueError, match="no finished result of the stage 'conditional': add"):
        train(replace(config, stages=["joint"]))
    train(replace(config, stages=["conditional"]))
    assert same_head(config, finished)


def test_given_backbone_is_trained_further_if_that_is_asked_for(config, tmp_path):
    short = replace(config.pretraining, max_steps=2)
    config = replace(config, output_dir=str(tmp_path), stages=["pretraining"], pretraining=short)
    folder = train(config)
    assert folder == tmp_path / "backbone"
    given, trained = (
        CoDDModel.from_backbone(name).backbone.state_dict() for name in (config.backbone, folder)
    )
    moved = [(given[name] - trained[name]).abs().max().item() for name in given]
    assert 0 < max(moved) < 0.2
    assert json.loads((tmp_path / "pretraining/history.json").read_text())[-1]["step"] == 2
    missing = replace(config, backbone=None, output_dir=str(tmp_path / "none"))
    with pytest.raises(ValueError, match="no finished result of the stage 'pretraining'"):
        train(replace(missing, stages=["generative"]))


def test_joint_stage_goes_on_from_the_fitted_head_and_ships_its_lora(copy, finished):
    joint = JointConfig(max_steps=4, checkpointing_steps=1, learning_rate=0.05, warmup_steps=1)
    joint = replace(joint, lora_rank=2, backbone_learning_rate=0.01, evidence_temperature=0.9)
    config = replace(copy, stages=["joint"], joint=joint)
    pipeline = train(config)
    assert (pipeline / "model" / "adapter" / "adapter_config.json").exists()
    whole = load_file(pipeline / "model" / "adapter" / "adapter_model.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in whole.items() if "lora_B" in name)
    model = CoDDModel.from_pretrained(pipeline / "model")
    assert model.coupling_head.config.evidence_temperature == 0.9
    fitted = CoDDHead.from_pretrained(finished / "conditional/head")
    assert not torch.allclose(model.coupling_head.emission, fitted.emission, rtol=1e-2)
    history = json.loads((Path(copy.output_dir) / "joint/history.json").read_text())
    assert [entry["step"] for entry in history] == [0, 4]
    shutil.rmtree(Path(copy.output_dir) / "joint" / "checkpoint-4")
    train(config)
    again = load_file(pipeline / "model" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(again[name], whole[name]) for name in whole)
