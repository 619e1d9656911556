"""Promises of settings: set once, on the command line, in a file or in Python, and checked."""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import asdict

import numpy as np
import pytest
import yaml

from codd_hf.cli import main
from codd_hf.data.tokenizers import train_tokenizer
from codd_hf.training import (
    ConditionalConfig,
    GenerativeConfig,
    JointConfig,
    PretrainingConfig,
    TrainConfig,
)
from codd_hf.training.run import STAGES as RUN_STAGES
from codd_hf.training.settings import STAGES, build_config, named_settings, read_config
from tiny import tiny_backbone


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"window_length": 1}, "`window_length` must be at least 2, got 1"),
        ({"num_latents": 0}, "`num_latents` must be at least 1, got 0"),
        ({"num_test": -1}, "`num_test` must be at least 0, got -1"),
        ({"max_length": True}, "`max_length` must be an integer, got True"),
        ({"window_length": 4.0}, r"`window_length` must be an integer, got 4\.0"),
        ({"hidden_size": "64"}, "`hidden_size` must be an integer, got '64'"),
        ({"packing": "no"}, "`packing` must be True or False, got 'no'"),
        ({"conditioning": "copy"}, "`conditioning` must be a list, got 'copy'"),
        ({"backbone": 3}, "`backbone` must be a text, got 3"),
        ({"generative": None}, "`generative` must be a GenerativeConfig, got None"),
        ({"stages": ["em"]}, "`stages` must be one of pretraining, .*, got 'em'"),
        ({"resume_from_checkpoint": "x/y"}, "`resume_from_checkpoint` must be one of latest, none"),
        ({"report_to": ["mlflow"]}, "`report_to` must be one of tensorboard, .*, got 'mlflow'"),
    ],
)
def test_setting_of_a_run_that_cannot_be_is_named(changes, said):
    with pytest.raises(ValueError, match=said):
        TrainConfig("data.jsonl", "run", **changes)


@pytest.mark.parametrize(
    "kind", [PretrainingConfig, GenerativeConfig, ConditionalConfig, JointConfig]
)
def test_every_stage_checks_its_numbers_and_takes_numpys(kind):
    for name, value in asdict(kind()).items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        for wrong in (-1, float("inf"), "1"):
            with pytest.raises(ValueError, match=f"`{name}` must be .*, got {wrong!r}"):
                kind(**{name: wrong})
        same = kind(**{name: np.float64(value) if isinstance(value, float) else np.int64(value)})
        assert json.dumps(asdict(same)) == json.dumps(asdict(kind()))


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (ConditionalConfig, "evidence_temperature", 0.0),
        (JointConfig, "evidence_temperature", 1e30),
        (PretrainingConfig, "window_probability", 2.0),
        (PretrainingConfig, "decay_fraction", 1.5),
        (ConditionalConfig, "mixed_precision", "fp16"),
    ],
)
def test_value_that_a_stage_cannot_compute_with_is_named_before_anything_runs(kind, name, value):
    said = rf"`{name}` must be (at least|at most|one of) .*, got {re.escape(repr(value))}"
    with pytest.raises(ValueError, match=said):
        kind(**{name: value})


@pytest.mark.parametrize(
    ("examples", "steps"), [(25, 200), (1_900, 380), (7_000, 1400), (10**6, 2000)]
)
def test_number_of_steps_grows_with_the_data_unless_it_is_set(examples, steps):
    assert ConditionalConfig().with_steps(examples).max_steps == steps
    assert ConditionalConfig(max_steps=7).with_steps(examples).max_steps == 7


def test_given_backbone_gets_lower_rates_by_default_and_what_is_set_stays():
    given, new = (PretrainingConfig().completed(kind) for kind in ("given", "new"))
    assert given.learning_rate < new.learning_rate / 5
    assert PretrainingConfig(max_steps=7).completed("given").max_steps == 7


def test_every_setting_explains_itself_and_every_stage_has_settings():
    assert all(setting.doc for _, setting in named_settings())
    assert tuple(stage.name for stage in RUN_STAGES) == STAGES


def printed(capsys, *argv: str) -> dict:
    assert main(["train", *argv, "--print-config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_printed_file_is_read_back_and_flags_come_before_it(capsys, tmp_path):
    names = dict(named_settings())
    every = printed(capsys)
    assert every.keys() == {name.partition(".")[0] for name in names}
    words = ["--dataset", "a.jsonl", "--output", "run", "--num-latents", "8", "--packing"]
    words += ["--set", "conditional.learning_rate=2e-3", "--set", "report_to=[wandb]"]
    words += ["--set", "mask_token_id=null", "--conditioning"]
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(printed(capsys, *words)))
    config = build_config(read_config(path))
    assert config == TrainConfig(
        "a.jsonl",
        "run",
        num_latents=8,
        packing=True,
        report_to=["wandb"],
        conditioning=[],
        conditional=ConditionalConfig(learning_rate=2e-3),
    )
    again = printed(capsys, "--config", str(path), "--num-latents", "9", "--set", "joint.seed=3")
    assert (again["num_latents"], again["joint"]["seed"]) == (9, 3)
    assert again["conditional"] == asdict(config.conditional)
    path.write_text("num_latents: 16\nconditional:\n  learning_rate: 3e-3\n")
    few = printed(capsys, "--config", str(path))
    assert (few["num_latents"], few["conditional"]["learning_rate"]) == (16, 3e-3)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--set", "conditional.lerning_rate=1"], "did you mean conditional.learning_rate"),
        (["--set", "conditional"], "`--set` must be NAME=VALUE, got 'conditional'"),
        (["--set", "joint.max_steps=2.5"], "In `joint`: `max_steps` must be an integer"),
        (["--set", "report_to=[wandb"], "`report_to` is no YAML"),
        (["--window-length", "1"], "`window_length` must be at least 2, got 1"),
        (["--num-latents", "many"], "`num_latents` must be an integer, got 'many'"),
        (["--set", f"generative.seed={'1' * 30}"], "`seed` must be at most"),
        (["--dataset", "x"], "`output_dir` must be given"),
    ],
)
def test_setting_that_cannot_be_is_bad_usage_in_a_sentence(words, said, capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["train", *words, *([] if "--dataset" in words else ["--print-config"])])
    assert leaving.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[1]", "must hold settings"),
        ("a: [", "is no YAML"),
        ("conditional:\n  steps: 3", "There is no setting 'conditional.steps'"),
        ("joint: 3", "There is no setting 'joint'"),
        (None, "No such file"),
    ],
)
def test_file_of_no_settings_is_one_line(content, said, capsys, tmp_path):
    if content is not None:
        (tmp_path / "run.yaml").write_text(content)
    with contextlib.suppress(SystemExit):  # bad usage, unless the file cannot be read
        assert main(["train", "--config", str(tmp_path / "run.yaml")]) == 1
    error = capsys.readouterr().err
    assert said in error.splitlines()[-1]
    assert "Traceback" not in error


def test_help_shows_the_common_settings_with_their_defaults_in_thirty_flags(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    assert "--num-latents LATENTS States of the circuit. (default 448)" in " ".join(text.split())
    assert len(re.findall(r"^  -", text, re.MULTILINE)) <= 30


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
        "--generative-num-epochs": 1,
        "--conditional-max-steps": 2,
    }
    words = [word for name, value in options.items() for word in (name, *str(value).split())]
    for name in ("pretraining.max_steps=2", "joint.max_steps=1", "joint.windows_per_batch=4"):
        words += ["--set", name]
    assert main(["train", *words]) == 0, capsys.readouterr().err
    assert (tmp_path / "run" / "pipeline" / "README.md").exists()
