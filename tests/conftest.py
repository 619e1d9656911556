"""Fixtures that several test files share."""

from __future__ import annotations

import json
import logging
import os
import random

# One process a core: threads beside them would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from codd_hf import training  # whose parts are imported when they are used: not to distribute tests


class DeprecationsAreErrors(logging.Handler):
    """transformers and diffusers log some deprecations instead of warning of them."""

    def emit(self, record: logging.LogRecord) -> None:
        if "deprecated" in record.getMessage():
            raise DeprecationWarning(record.getMessage())


for library in ("transformers", "diffusers"):
    logging.getLogger(library).addHandler(DeprecationsAreErrors())

CITIES = (" San Diego", " New York", " Los Angeles", " Las Vegas")


@pytest.fixture(scope="session")
def tiny_tokenizer():
    from tiny import SENTENCES

    return training.train_tokenizer(SENTENCES, vocab_size=300)


@pytest.fixture(scope="session")
def cities_jsonl(tmp_path_factory):
    """Questions that do not tell the city, and answers of two-token cities."""
    draw = random.Random(0)
    rows = [
        {"question": "Where to?", "answer": "".join(draw.choice(CITIES) for _ in range(4))}
        for _ in range(120)
    ]
    path = tmp_path_factory.mktemp("data") / "cities.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def trained_config(cities_jsonl, tmp_path_factory):
    """A whole training run, at a size that takes seconds."""
    return training.TrainConfig(
        dataset=str(cities_jsonl),
        output_dir=str(tmp_path_factory.mktemp("run")),
        num_validation=16,
        num_test=16,
        vocab_size=300,
        hidden_size=64,
        num_layers=1,
        num_latents=8,
        window_length=4,
        pretraining=training.PretrainingConfig(
            max_steps=120,
            tokens_per_batch=512,
            warmup_steps=5,
            mixed_precision="no",  # bf16 is emulated on most processors
            evaluation_steps=60,
            checkpointing_steps=60,
        ),
        generative=training.GenerativeConfig(num_epochs=6, windows_per_batch=32),
        conditional=training.ConditionalConfig(
            max_steps=40,
            tokens_per_batch=512,
            learning_rate=0.05,
            warmup_steps=2,
            evaluation_steps=20,
            checkpointing_steps=20,
        ),
    )


@pytest.fixture(scope="session")
def trained_pipeline(trained_config):
    """The folder of the pipeline that the run wrote."""
    return training.train(trained_config)
