"""Promises of what is told of a run: figures of every step, and trackers through Accelerate."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import replace

import pytest

from codd_hf.training import train
from codd_hf.training.run import tracking

BUCKETS = ["0.00-0.25", "0.25-0.50", "0.50-0.75", "0.75-1.00"]


def test_tensorboard_gets_the_curves_of_every_stage(trained_config, trained_pipeline, tmp_path):
    module = "tensorboard.backend.event_processing.event_accumulator"
    accumulator = pytest.importorskip(module)
    config = replace(
        trained_config,
        backbone=str(trained_pipeline.parent / "backbone"),
        output_dir=str(tmp_path),
        report_to=["tensorboard"],
        generative=replace(trained_config.generative, num_epochs=2),
        conditional=replace(trained_config.conditional, max_steps=4, evaluation_steps=2),
    )
    train(config)

    def curves(stage: str) -> dict[str, list[tuple[int, float]]]:
        events = accumulator.EventAccumulator(str(tmp_path / "logs" / f"codd-hf-{stage}")).Reload()
        return {
            tag: [(event.step, event.value) for event in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]
        }

    generative, conditional = curves("generative"), curves("conditional")
    assert generative.keys() >= {"loss", "validation_nats", "step_size"}
    assert conditional.keys() >= {"loss", "gain", "learning_rate", "validation_gain"}
    assert [step for step, _ in conditional["loss"]] == [1, 2, 3, 4]
    for bucket in BUCKETS:
        assert [step for step, _ in conditional[f"validation_gain_{bucket}"]] == [2, 4]
    rates = [rate for _, rate in conditional["learning_rate"]]
    assert rates[0] == pytest.approx(config.conditional.learning_rate / 2)  # of two to warm up
    assert 0 < rates[-1] < rates[1]


@pytest.mark.parametrize(
    ("tracker", "written"), [("wandb", "wandb/offline-run-*/*.wandb"), ("trackio", "trackio/*.db")]
)
def test_other_trackers_keep_a_run_per_stage(
    tracker, written, trained_config, tmp_path, monkeypatch
):
    variables = {"WANDB_MODE": "offline", "WANDB_DIR": tmp_path, "WANDB_SILENT": "true"}
    for name, value in (variables | {"TRACKIO_DIR": tmp_path / "trackio"}).items():
        monkeypatch.setenv(name, str(value))
    pytest.importorskip(tracker)
    config = replace(trained_config, output_dir=str(tmp_path / "mine"), report_to=[tracker])
    for stage in ("generative", "conditional"):
        with tracking(config, stage) as log:
            for step in (1, 2):
                log(step, {"loss": 0.5 / step, "gain": 0.25})
    files = sorted(tmp_path.glob(written))
    assert len(files) == 2
    if tracker == "trackio":
        with sqlite3.connect(files[0]) as database:
            told = database.execute("select step, metrics from metrics order by step")
            rows = [(step, json.loads(values)["loss"]) for step, values in told]
        assert rows == [(1, 0.5), (2, 0.25)]


def test_tracker_that_is_not_installed_is_one_clear_sentence(trained_config, tmp_path, monkeypatch):
    monkeypatch.setattr("codd_hf.training.run.find_spec", lambda name: None)
    config = replace(trained_config, output_dir=str(tmp_path / "run"), report_to=["trackio"])
    with pytest.raises(ValueError, match=r"'trackio', but .* not installed: `pip install trackio`"):
        train(config)
    assert not (tmp_path / "run").exists()
