"""Promises to those who give a wrong, damaged or hostile thing: one sentence, at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from codd_hf import CoDDHead, CoDDModel, CoDDPipeline, CoDDScheduler
from tiny import random_head, tiny_backbone

ABSURD = {
    "states": {"num_latents": 10**9},
    "tokens": {"vocab_size": 10**12},
    "number of bytes": {"num_latents": 10**9, "vocab_size": 10**12},
    "positions": {"window_length": 1 << 16, "tie_emissions": False},
    "rank": {"emission": "tied", "emission_rank": 10**9, "context_size": 10**6},
    "context": {"conditioning": ["latent"], "context_size": 10**12},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("careless")
    tiny_backbone().save_pretrained(root / "backbone")
    random_head().save_pretrained(root / "head")
    model = CoDDModel.from_backbone(root / "backbone", root / "head")
    model.save_pretrained(root / "model")
    model.save_pretrained(root / "sharded", max_shard_size="5KB")
    CoDDPipeline(model, CoDDScheduler()).save_pretrained(root / "pipeline")
    return root


def copied(folders: Path, name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders / name, tmp_path / name))


def change_config(folder: Path, changes: dict) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    (content if content["model_type"] == "codd-head" else content["head_config"]).update(changes)
    path.write_text(json.dumps(content))


def assert_one_sentence(error: BaseException) -> None:
    assert "\n" not in str(error)
    assert str(error).endswith(".")


@pytest.mark.parametrize("cls", [CoDDHead, CoDDModel, CoDDPipeline])
@pytest.mark.parametrize("name", [3, None, "", torch.nn.Linear(1, 1)])
def test_name_that_is_none_is_an_error(cls, name):
    with pytest.raises(TypeError, match="must be a folder or an id on the Hub, got") as caught:
        cls.from_pretrained(name)
    assert_one_sentence(caught.value)


@pytest.mark.parametrize("backbone", [None, 3, tiny_backbone().config])
def test_backbone_that_is_none_is_an_error(backbone):
    with pytest.raises(TypeError, match="`backbone` must be a transformers model"):
        CoDDModel.from_backbone(backbone, random_head())


@pytest.mark.parametrize("head", [3, "backbone", "model"])
def test_head_that_is_none_is_an_error(head, folders):
    given = {"backbone": tiny_backbone, "model": lambda: CoDDModel.from_backbone(tiny_backbone())}
    with pytest.raises(TypeError, match="`head` must be a CoDD head"):
        CoDDModel.from_backbone(tiny_backbone(), given.get(head, lambda: head)())


def test_backbone_and_head_in_the_wrong_order_are_an_error(folders):
    for backbone in (random_head(), folders / "head"):
        with pytest.raises(ValueError, match="`backbone` is a CoDD head: give the backbone first"):
            CoDDModel.from_backbone(backbone, tiny_backbone())
    with pytest.raises(ValueError, match="holds a model of type 'llama' without a CoDD head"):
        CoDDModel.from_backbone(tiny_backbone(), folders / "backbone")


def test_model_as_a_backbone_is_an_error(folders):
    for backbone in (CoDDModel.from_pretrained(folders / "model"), folders / "model"):
        with pytest.raises(ValueError, match="is a CoDD model already"):
            CoDDModel.from_backbone(backbone, random_head())
    with pytest.raises(ValueError, match=r"pipeline' has no `config.json`"):
        CoDDModel.from_backbone(folders / "pipeline", random_head())


@pytest.mark.parametrize("name", ["head", "model", "sharded", "pipeline"])
def test_weights_that_are_cut_off_are_said_to_be_damaged(name, folders, tmp_path):
    folder = copied(folders, name, tmp_path)
    for file in folder.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-8])
    loaders = [CoDDModel.from_pretrained, CoDDHead.from_pretrained, CoDDPipeline.from_pretrained]
    for load in loaders[: 2 if name == "head" else 3]:
        with pytest.raises(OSError, match=r"safetensors' is damaged \(.*download it again\."):
            load(folder)


@pytest.mark.parametrize("name", ["head", "model", "sharded", "pipeline"])
@pytest.mark.parametrize("what", ABSURD)
def test_absurd_sizes_are_refused_before_anything_is_allocated(what, name, folders, tmp_path):
    folder = copied(folders, name, tmp_path)
    change_config(folder / "model" if name == "pipeline" else folder, ABSURD[what])
    for load in (CoDDModel.from_pretrained, CoDDHead.from_pretrained):
        with pytest.raises(ValueError, match="head") as caught:
            load(folder)
        assert_one_sentence(caught.value)
        assert "weights" in str(caught.value)


@pytest.mark.parametrize("name", ["head", "model"])
def test_head_that_lacks_weights_is_refused(name, folders, tmp_path):
    folder = copied(folders, name, tmp_path)
    weights = load_file(folder / "model.safetensors")
    prefix = "" if name == "head" else "coupling_head."
    del weights[f"{prefix}token_marginal"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for load in (CoDDModel.from_pretrained, CoDDHead.from_pretrained):
        with pytest.raises(ValueError, match=r"`token_marginal` must be .*, but is missing\.$"):
            load(folder)


def test_backbone_of_other_sizes_than_its_weights_is_one_sentence(folders, tmp_path):
    folder = copied(folders, "model", tmp_path)
    content = json.loads((folder / "config.json").read_text())
    content["text_config"]["hidden_size"] = 32
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="not of the shapes that its configuration") as caught:
        CoDDModel.from_pretrained(folder)
    assert_one_sentence(caught.value)


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_configuration_that_is_damaged_is_one_sentence(content, folders, tmp_path):
    folder = copied(folders, "head", tmp_path)
    (folder / "config.json").write_text(content)
    for cls in (CoDDHead, CoDDModel, CoDDPipeline):
        with pytest.raises(OSError, match="config") as caught:
            cls.from_pretrained(folder)
        assert_one_sentence(caught.value)


def test_sizes_may_differ_where_transformers_is_told_so(folders, tmp_path):
    folder = copied(folders, "head", tmp_path)
    change_config(folder, {"num_latents": 5})
    head = CoDDHead.from_pretrained(folder, ignore_mismatched_sizes=True)
    assert head.config.num_latents == 5
