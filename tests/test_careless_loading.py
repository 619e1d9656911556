"""Promises to those who give a wrong thing in place of a model: one sentence, at once."""

from __future__ import annotations

import pytest
import torch

from codd_hf import CoDDHead, CoDDModel, CoDDPipeline, CoDDScheduler
from tiny import random_head, tiny_backbone


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("careless")
    tiny_backbone().save_pretrained(root / "backbone")
    random_head().save_pretrained(root / "head")
    model = CoDDModel.from_backbone(root / "backbone", root / "head")
    model.save_pretrained(root / "model")
    CoDDPipeline(model, CoDDScheduler()).save_pretrained(root / "pipeline")
    return root


@pytest.mark.parametrize("cls", [CoDDHead, CoDDModel, CoDDPipeline])
@pytest.mark.parametrize("name", [3, None, "", torch.nn.Linear(1, 1)])
def test_name_that_is_none_is_an_error(cls, name):
    with pytest.raises(TypeError, match=r"must be a folder or an id on the Hub, got .*\.$"):
        cls.from_pretrained(name)


@pytest.mark.parametrize("backbone", [None, 3, tiny_backbone().config])
def test_backbone_that_is_none_is_an_error(backbone):
    with pytest.raises(TypeError, match="`backbone` must be a transformers model"):
        CoDDModel.from_backbone(backbone, random_head())


def test_head_that_is_none_is_an_error():
    for head in (3, tiny_backbone(), CoDDModel.from_backbone(tiny_backbone())):
        with pytest.raises(TypeError, match="`head` must be a CoDD head"):
            CoDDModel.from_backbone(tiny_backbone(), head)


def test_backbone_and_head_in_the_wrong_order_are_an_error(folders):
    for backbone in (random_head(), folders / "head"):
        with pytest.raises(ValueError, match="must be a backbone, got a CoDD model or head"):
            CoDDModel.from_backbone(backbone, tiny_backbone())
    with pytest.raises(ValueError, match="holds a model of type 'llama' without a CoDD head"):
        CoDDModel.from_backbone(tiny_backbone(), folders / "backbone")


def test_model_as_a_backbone_is_an_error(folders):
    for backbone in (CoDDModel.from_pretrained(folders / "model"), folders / "model"):
        with pytest.raises(ValueError, match="must be a backbone, got a CoDD model or head"):
            CoDDModel.from_backbone(backbone, random_head())
    with pytest.raises(OSError, match=r"pipeline' holds no .*`config.json`"):
        CoDDModel.from_backbone(folders / "pipeline", random_head())


@pytest.mark.parametrize("argument", ["backbone", "head", "adapter"])
def test_missing_path_is_an_error_that_names_the_argument(argument, tmp_path):
    given = {"backbone": tiny_backbone(), "head": random_head()} | {argument: tmp_path / "none"}
    with pytest.raises(FileNotFoundError, match=f"`{argument}`: there is no file or folder"):
        CoDDModel.from_backbone(**given)
    for load in (CoDDModel.from_pretrained, CoDDHead.from_pretrained, CoDDPipeline.from_pretrained):
        with pytest.raises(FileNotFoundError, match="there is no file or folder"):
            load(tmp_path / "none")


def test_options_for_loading_with_a_loaded_backbone_are_an_error_that_names_them():
    with pytest.raises(ValueError, match="`dtype` cannot be given"):
        CoDDModel.from_backbone(tiny_backbone(), dtype=torch.bfloat16)
