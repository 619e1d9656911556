"""Promises of what a run says of itself, and of the backbones and data that it takes."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from codd_hf import CoDDModel, CoDDPipeline
from codd_hf.data.sources import Example, load_examples
from codd_hf.hub.cards import REWRITTEN
from codd_hf.training import TrainConfig, train
from codd_hf.training.result import save_held_out


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def short_config(trained_pipeline, trained_config, tmp_path) -> TrainConfig:
    """A head for the backbone of the pipeline that is there, in a few steps."""
    return replace(
        trained_config,
        backbone=str(trained_pipeline),
        output_dir=str(tmp_path / "run"),
        num_gap_problems=0,
        generative=replace(trained_config.generative, num_epochs=1),
        conditional=replace(trained_config.conditional, max_steps=2),
    )


def section(card: str, heading: str) -> str:
    return card.split(f"{heading}\n", 1)[1].split("\n#", 1)[0]


def test_card_says_what_was_trained_on_what_and_how(trained_pipeline, trained_config):
    card = (trained_pipeline / "README.md").read_text()
    training = section(card, "## Training")
    assert "Examples: training 88, validation 16, test 16" in training
    assert "dataset cities.jsonl (local), " in training
    assert f"torch {torch.__version__}" in training
    for stage in ("pretraining", "generative", "conditional"):
        settings = vars(getattr(trained_config, stage))
        line = section(card, f"### Stage: {stage}")
        for name in ("max_steps", "num_epochs"):
            assert name not in settings or f"{name} {settings[name]}" in line
    assert ModelCard(card).data.datasets is None
    assert "Training data: see below." in card


def test_card_has_the_curve_of_each_stage_as_its_history_is(trained_pipeline):
    card = (trained_pipeline / "README.md").read_text()
    run = trained_pipeline.parent
    for stage in ("generative", "conditional"):
        history = json.loads((run / stage / "history.json").read_text())
        kept = json.loads((trained_pipeline / "training" / f"{stage}_history.json").read_text())
        assert kept == history
        rows = re.findall(r"^\| (\d+ .*) \|$", section(card, f"### Stage: {stage}"), re.MULTILINE)
        assert len(rows) == len(history)
        last = [cell.strip() for cell in rows[-1].split("|")]
        values = [value for name, value in history[-1].items() if name != "tokens"]
        assert [float(cell) for cell in last] == pytest.approx(values, rel=6e-3, abs=1e-6)


def test_gap_on_the_card_is_that_of_evaluate_gap_on_the_test_examples(trained_pipeline, tmp_path):
    from codd_hf.cli import main

    figures = json.loads((trained_pipeline / "training" / "run.json").read_text())
    command = ["evaluate", "gap", "--model", str(trained_pipeline), "--num-problems", "32"]
    command += ["--ratios", "0.25", "0.5", "0.75", "1", "--output", str(tmp_path / "gap.json")]
    assert main(command) == 0
    rows = json.loads((tmp_path / "gap.json").read_text())["rows"]
    assert [row["mask ratio"] for row in figures["gap"]] == [row["mask ratio"] for row in rows]
    for ours, theirs in zip(figures["gap"], rows, strict=True):
        # The weights on disk are rounded to bfloat16.
        for mine, measured in (("coupled", "fitted"), ("sequential", "sequential")):
            assert ours[mine]["value"] == pytest.approx(theirs[measured]["value"], abs=0.1)
    card = (trained_pipeline / "README.md").read_text()
    gap = section(card, "### Measured gap")
    assert "at most 32 test examples" in gap
    assert f"| 1 | {figures['gap'][-1]['factorized']['value']:.3f} ±" in gap


def test_what_is_written_names_no_path_of_this_machine(trained_pipeline, trained_config):
    for file in trained_pipeline.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            for path in (trained_config.output_dir, str(Path(trained_config.dataset).parent)):
                assert path.encode() not in content, file
    assert [p.parent.name for p in trained_pipeline.rglob("README.md")] == [trained_pipeline.name]


def test_own_card_is_written_anew_and_that_of_somebody_stays(short_config):
    folder = train(short_config)
    card = folder / "README.md"
    assert "Measured gap" not in card.read_text()
    train(replace(short_config, num_gap_problems=4))
    assert "Measured gap" in card.read_text()
    own = card.read_text().replace(REWRITTEN, "").replace("# pipeline", "# Mine")
    card.write_text(own)
    train(short_config)
    assert card.read_text() == own


@pytest.mark.parametrize("part", ["", "model"])
def test_backbone_of_a_codd_pipeline_or_model_gets_a_new_head(
    part, trained_pipeline, short_config, tmp_path
):
    source = trained_pipeline / part
    if part:
        source = tmp_path / "model"
        CoDDModel.from_pretrained(trained_pipeline / "model").save_pretrained(source)
        CoDDPipeline.from_pretrained(trained_pipeline).tokenizer.save_pretrained(source)
    folder = train(replace(short_config, backbone=str(source)))
    ours, theirs = (
        load_file(f / "model" / "model.safetensors") for f in (folder, trained_pipeline)
    )
    backbone = [name for name in ours if not name.startswith("coupling_head")]
    assert backbone
    assert all(torch.equal(ours[name], theirs[name]) for name in backbone)
    assert not torch.equal(ours["coupling_head.emission"], theirs["coupling_head.emission"])
    assert f"backbone {source.name} (local), " in (folder / "README.md").read_text()


def test_codd_model_without_a_tokenizer_is_an_error(trained_pipeline, short_config, tmp_path):
    CoDDModel.from_pretrained(trained_pipeline / "model").save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"bare' has no tokenizer"):
        train(replace(short_config, backbone=str(tmp_path / "bare")))


def test_packed_text_is_trained_on_without_false_ends(trained_pipeline, short_config, tmp_path):
    answers = [example.answer for example in load_examples(short_config.dataset)]
    text = tmp_path / "a.txt"
    text.write_text("\n\n".join(answers))
    config = replace(short_config, dataset=str(text), packing=True, sample_by="paragraph")
    assert {getattr(config, s).max_extra_windows for s in ("conditional", "joint")} == {0}
    folder = train(replace(config, max_length=12))
    assert "packing True" in (folder / "README.md").read_text()
    with pytest.raises(ValueError, match=r"`max_length` \(10\) must be a multiple"):
        replace(config, max_length=10)


def test_held_out_conversations_are_read_back_as_they_were(tmp_path):
    chats = [
        Example("and 3?", "7", (("system", "Be brief."), ("user", "2?"), ("assistant", "2"))),
        Example("", "Hello.", (("system", "Greet."),)),
    ]
    plain = [Example("2 + 2?", "4"), Example("", "a text")]
    save_held_out(tmp_path, ([], chats, plain))
    assert load_examples(str(tmp_path / "validation.jsonl")) == chats
    assert load_examples(str(tmp_path / "test.jsonl")) == plain
