"""The antibody example, on a tiny random BERT of AntiBERTy's layout and made-up sequences."""

from __future__ import annotations

import csv
import io
import json
import random
import zipfile
from functools import partial

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from codd_hf.backbones.loading import load_backbone
from codd_hf.training import ConditionalConfig
from test_examples import load_example

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"ACDEFGHIKLMNPQRSTVWY"]


@pytest.fixture(scope="module")
def example():
    return load_example("infill_antibody")


@pytest.fixture(scope="module")
def original():
    """A random model; AntiBERTy's file holds more weights than it needs."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    sizes |= {"vocab_size": 25, "num_hidden_layers": 1, "max_position_embeddings": 160}
    return BertForMaskedLM(BertConfig(**sizes, initializer_range=0.5)).eval()


@pytest.fixture(scope="module")
def wheels(example, original, tmp_path_factory):
    """Both archives, with 60 sequences that are not alike."""
    folder = tmp_path_factory.mktemp("wheels")
    weights = original.state_dict() | {"cls.species.weight": torch.zeros(6, 16)}
    stored = io.BytesIO()
    torch.save(weights, stored)
    with zipfile.ZipFile(folder / "antiberty-0.1.3-py3-none-any.whl", "w") as archive:
        fields = original.config.to_dict() | {"architectures": ["AntiBERTy"]}
        archive.writestr(f"{example.MODEL}/config.json", json.dumps(fields))
        archive.writestr(f"{example.MODEL}/pytorch_model.bin", stored.getvalue())
        archive.writestr(example.VOCABULARY, "\n".join(VOCABULARY))
    draw, rows = random.Random(0), io.StringIO()
    table = csv.DictWriter(rows, ["seq_id", "aligned_seq"])
    table.writeheader()
    for number in range(60):
        letters = draw.choices(VOCABULARY[5:], k=149)
        letters[115:130] = "-" * 15
        table.writerow({"seq_id": number, "aligned_seq": "".join(letters)})
    with zipfile.ZipFile(folder / "abnativ-2.0.9-py3-none-any.whl", "w") as archive:
        archive.writestr(example.SEQUENCES, rows.getvalue())
    return folder


def test_converted_model_predicts_as_the_original_one_does(example, original, wheels, tmp_path):
    example.convert(wheels / "antiberty-0.1.3-py3-none-any.whl", tmp_path)
    ids = torch.tensor([[2, 5, 6, 4, 8, 3]])
    with torch.no_grad():
        assert torch.equal(load_backbone(str(tmp_path))(ids).logits, original(ids).logits)


def test_nothing_to_fit_to_is_alike_what_is_held_out(example, wheels):
    letters = example.read_sequences(wheels / "abnativ-2.0.9-py3-none-any.whl", 0)
    near = letters[:3].clone()
    near[0, :10] = ord("A")  # nearly the whole sequence
    near[1, : example.LOOP.start] = ord("A")  # the loop alone
    near[2, ::3] = ord("A")  # neither
    held, fitted = example.far_apart(torch.cat((letters[:3], near)), 3, 9)
    assert torch.equal(held, letters[:3])
    assert torch.equal(fitted, near[2:])


def test_head_is_fitted_and_infilling_is_measured(example, wheels, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(example, "PASSES", (1, 2))
    few = partial(ConditionalConfig, max_steps=4, num_validation_draws=1)
    monkeypatch.setattr(example, "ConditionalConfig", few)
    command = ["--wheels", str(wheels), "--output", str(tmp_path / "run")]
    command += ["--num-train", "20", "--num-validation", "2", "--num-test", "3"]
    command += ["--num-latents", "24", "--json", str(tmp_path / "antibody.json")]
    result = example.main(command)
    assert json.loads((tmp_path / "antibody.json").read_text()) == result
    for task in ("cdr3", "span"):
        residues = result[task]["2"]["residues"]
        difference = residues["coupled"]["value"] - residues["factorized"]["value"]
        assert residues["difference"]["value"] == pytest.approx(difference)
        assert set(result[task]["nats_per_residue"]) == {"factorized", "coupled", "difference"}
