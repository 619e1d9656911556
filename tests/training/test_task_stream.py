"""Promises of training on tasks without end."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice

import pytest
import torch
from transformers import AutoModelForCausalLM

from codd_hf import CoDDModel
from codd_hf.data.sources import Example, load_examples
from codd_hf.data.tasks import draw_tasks, sample_tasks
from codd_hf.training import Checkpoints, PretrainingConfig, fit_backbone, train
from codd_hf.training.inputs import STRETCH, TaskStream, small_backbone_config


@pytest.fixture
def stream(tiny_tokenizer):
    return TaskStream(tiny_tokenizer)


def tokens(batch, window_length: int) -> int:
    windows = (-(-len(e.answer_ids) // window_length) for e in batch)
    return sum(len(e.prompt_ids) + n * window_length for e, n in zip(batch, windows, strict=True))


def test_batches_go_on_where_a_run_stopped(stream):
    whole = list(islice(stream.batches(300, 8, seed=0), 2 * STRETCH + 3))
    for stopped in (0, 1, STRETCH, STRETCH + 5):
        rest = islice(stream.batches(300, 8, 0, first_batch=stopped), len(whole) - stopped)
        assert list(rest) == whole[stopped:]
    assert list(islice(stream.batches(300, 8, seed=1), 3)) != whole[:3]


def test_stream_does_not_repeat_itself(stream):
    batches = islice(stream.batches(500, 8, seed=0), 3 * STRETCH)
    drawn = [tuple(e.prompt_ids) for batch in batches for e in batch]
    assert len(set(drawn)) > 0.95 * len(drawn)


@pytest.mark.parametrize("size", [1, 300, 1000])
def test_batches_have_the_size_asked_for_or_one_task_at_least(stream, size):
    sizes = [tokens(batch, 8) for batch in islice(stream.batches(size, 8, seed=0), 2 * STRETCH)]
    assert min(sizes) > 0
    assert sum(sizes) / len(sizes) == pytest.approx(max(size, 250), rel=0.5)


def test_stream_holds_training_tasks_of_the_kinds_asked_for_that_are_not_too_long(tiny_tokenizer):
    stream = TaskStream(tiny_tokenizer, "dates, sums", max_length=60)
    batches = islice(stream.batches(500, 8, seed=0), STRETCH)
    examples = [example for batch in batches for example in batch]
    assert max(len(e.prompt_ids) + len(e.answer_ids) for e in examples) <= 60
    questions = {tiny_tokenizer.decode(e.prompt_ids, skip_special_tokens=True) for e in examples}
    unseen = {task.question for task in islice(draw_tasks("test", 0), 2000)}
    assert not questions & unseen
    assert not any("JSON" in question or "order" in question for question in questions)


def test_examples_are_a_sample_of_a_split(tmp_path):
    tasks = sample_tasks("test[:30]", "records,dates")
    expected = [Example(task.question, task.answer) for task in tasks]
    assert load_examples("tasks", split="test[:30]", dataset_config="records,dates") == expected


def pretrain(stream, folder, log=None):
    config = PretrainingConfig(
        max_steps=6,
        tokens_per_batch=256,
        mixed_precision="no",
        evaluation_steps=3,
        checkpointing_steps=2,
    )
    torch.manual_seed(0)
    backbone = small_backbone_config(stream.tokenizer, hidden_size=32, num_layers=1)
    model = CoDDModel.from_backbone(AutoModelForCausalLM.from_config(backbone), mask_token_id=1)
    held_out = stream.beginning()[:4]
    checkpoints = Checkpoints(folder)
    args = (stream.tokenizer, stream, held_out, config, checkpoints, log)
    fit_backbone(model, *args, window_length=4)
    return model.state_dict()


def stop_at_step_five(step, told):
    if step == 5:
        raise KeyboardInterrupt


def test_stopped_pretraining_ends_bit_equal_to_one_that_was_not(stream, tmp_path):
    whole = pretrain(stream, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        pretrain(stream, tmp_path / "stopped", stop_at_step_five)
    stopped = pretrain(stream, tmp_path / "stopped")
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


def test_pretraining_does_not_go_on_with_other_tasks(stream, tmp_path):
    pretrain(stream, tmp_path)
    with pytest.raises(ValueError, match="data"):
        pretrain(replace(stream, kinds="sums"), tmp_path)


def test_run_on_tasks_ends_with_a_pipeline_whose_held_out_tasks_are_unseen(
    trained_config, tmp_path
):
    config = replace(
        trained_config,
        dataset="tasks",
        split="train[:200]",
        output_dir=str(tmp_path),
        vocab_size=400,
        num_gap_problems=0,
        pretraining=replace(trained_config.pretraining, max_steps=2),
        generative=replace(trained_config.generative, num_epochs=1),
        conditional=replace(trained_config.conditional, max_steps=2, num_draws=1),
    )
    folder = train(config)
    for name, number in (("validation", 16), ("test", 16)):
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        expected = sample_tasks(f"{name}[:{number}]")
        assert rows == [{"question": t.question, "answer": t.answer} for t in expected]


def test_training_on_held_out_tasks_is_refused(trained_config, tmp_path):
    config = replace(trained_config, dataset="tasks", split="test[:50]", output_dir=str(tmp_path))
    with pytest.raises(ValueError, match="`split` of 'tasks' must be a part of 'train', got 'test"):
        train(config)
