"""Promises of settings: a number that cannot be meant is refused before anything is trained."""

from __future__ import annotations

import json
import re
from dataclasses import asdict

import numpy as np
import pytest
import torch

from codd_hf.cli import main
from codd_hf.data.canvases import Example, collate, padding_token_id, tokenize_examples
from codd_hf.data.tokenizers import train_tokenizer
from codd_hf.training.fits.generative import fit_generative
from codd_hf.training.joint_settings import JointConfig
from codd_hf.training.settings import (
    ConditionalConfig,
    EvidenceConfig,
    GenerativeConfig,
    PretrainingConfig,
    TrainConfig,
)
from tiny import SENTENCES, tiny_backbone


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"window_length": 1}, "`window_length` must be at least 2, got 1"),
        ({"num_latents": 0}, "`num_latents` must be at least 1, got 0"),
        ({"num_test": -1}, "`num_test` must be at least 0, got -1"),
        ({"mask_token_id": -1}, "`mask_token_id` must be at least 0, got -1"),
        ({"max_length": True}, "`max_length` must be an integer, got True"),
        ({"window_length": 4.0}, r"`window_length` must be an integer, got 4\.0"),
        ({"alpha": float("nan")}, "`alpha` must be at least 0, got nan"),
        ({"hidden_size": "64"}, "`hidden_size` must be an integer, got '64'"),
    ],
)
def test_number_of_a_run_that_is_out_of_its_range_is_named(changes, said):
    with pytest.raises((TypeError, ValueError), match=said):
        TrainConfig("data.jsonl", "run", **changes)


@pytest.mark.parametrize(
    "kind", [PretrainingConfig, GenerativeConfig, EvidenceConfig, ConditionalConfig, JointConfig]
)
def test_every_stage_checks_its_numbers_and_takes_numpys(kind):
    for name, value in asdict(kind()).items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        for wrong in (-1, float("inf"), None if name != "backbone_learning_rate" else "1", "1"):
            with pytest.raises(
                (TypeError, ValueError), match=f"`{name}` must be .*, got {wrong!r}"
            ):
                kind(**{name: wrong})
        same = kind(**{name: np.float64(value) if isinstance(value, float) else np.int64(value)})
        assert json.dumps(asdict(same)) == json.dumps(asdict(kind()))


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (ConditionalConfig, "evidence_temperature", 0.0),
        (ConditionalConfig, "evidence_temperature", 1e30),
        (JointConfig, "evidence_temperature", 0.0),
        (EvidenceConfig, "temperature", 1e-30),
        (PretrainingConfig, "window_length", 1),
        (PretrainingConfig, "window_probability", 2.0),
        (PretrainingConfig, "decay_fraction", 1.5),
    ],
)
def test_number_that_a_stage_cannot_compute_with_is_named_before_anything_runs(kind, name, value):
    with pytest.raises(
        ValueError, match=rf"`{name}` must be at (least|most) .*, got {re.escape(repr(value))}"
    ):
        kind(**{name: value})


def test_window_of_one_token_is_one_sentence_on_the_command_line(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--dataset", "a.jsonl", "--output", "run", "--window-length", "1"])
    assert "`window_length` must be at least 2, got 1" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"`windows` must be .* at least 2 .* shape \(3, 1\)"):
        fit_generative(torch.zeros(3, 1, dtype=int), torch.zeros(3, 1, dtype=int), torch.eye(4), 2)


def test_a_tokenizer_without_a_padding_token_pads_with_what_no_model_reads():
    tokenizer = train_tokenizer(SENTENCES, 300)
    tokenizer.pad_token = None
    assert padding_token_id(tokenizer) == tokenizer.eos_token_id
    examples = tokenize_examples([Example("", s) for s in SENTENCES], tokenizer)
    canvas = collate(
        examples,
        window_length=4,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=padding_token_id(tokenizer),
    )
    ends = canvas.input_ids == tokenizer.eos_token_id
    assert ends[canvas.attention_mask == 0].all()


def test_a_backbone_whose_tokenizer_has_no_padding_token_is_trained(cities_jsonl, tmp_path, capsys):
    tokenizer = train_tokenizer([cities_jsonl.read_text()], 300)
    backbone = tiny_backbone("llama", len(tokenizer), pad_token_id=None, eos_token_id=2)
    backbone.config.mask_token_id = tokenizer.mask_token_id
    tokenizer.pad_token = None
    backbone.save_pretrained(tmp_path / "backbone")
    tokenizer.save_pretrained(tmp_path / "backbone")
    options = {
        "--dataset": cities_jsonl,
        "--backbone": tmp_path / "backbone",
        "--output": tmp_path / "run",
        "--stages": "pretraining generative conditional joint",
        "--num-validation": 16,
        "--num-latents": 4,
        "--window-length": 4,
        "--num-gap-problems": 4,
        "--pretraining-max-steps": 2,
        "--generative-num-epochs": 1,
        "--conditional-max-steps": 2,
        "--joint-max-steps": 1,
        "--joint-windows-per-batch": 4,
    }
    words = [word for name, value in options.items() for word in (name, *str(value).split())]
    assert main(["train", *words]) == 0, capsys.readouterr().err
    assert (tmp_path / "run" / "pipeline" / "README.md").exists()
