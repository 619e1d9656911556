"""Promises that a model is made of the weights that are stored, all of them, or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AlbertConfig, AlbertForMaskedLM, AutoModel, AutoModelForCausalLM

from codd_hf import CoDDHead, CoDDModel, CoDDPipeline, CoDDScheduler
from tiny import random_head, tiny_backbone

KINDS = {
    "integer": torch.int64,
    "boolean": torch.bool,
    "complex": torch.complex64,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("stored")
    head = random_head(conditioning=["latent", "copy"], context_size=16)
    model = CoDDModel.from_backbone(tiny_backbone(), head)
    model.backbone.save_pretrained(root / "backbone")
    model.backbone.save_pretrained(root / "sharded", max_shard_size="5KB")
    head.save_pretrained(root / "head")
    model.save_pretrained(root / "model")
    CoDDPipeline(model, CoDDScheduler()).save_pretrained(root / "pipeline")
    return root


@pytest.fixture
def copied(folders, tmp_path):
    return lambda name: Path(shutil.copytree(folders / name, tmp_path / name))


def change_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    content.get("text_config", content).update(changes)
    path.write_text(json.dumps(content))


def pickle_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def load_backbone(folder: Path, **kwargs) -> CoDDModel:
    return CoDDModel.from_backbone(folder, **kwargs)


WITH_BACKBONE = [
    ("backbone", "", load_backbone),
    ("model", "backbone.", CoDDModel.from_pretrained),
    ("model", "backbone.", AutoModelForCausalLM.from_pretrained),
    ("backbone", "", CoDDPipeline.from_pretrained),
]
WITH_HEAD = [
    ("head", "", CoDDHead.from_pretrained),
    ("head", "", AutoModel.from_pretrained),
    ("model", "coupling_head.", CoDDHead.from_pretrained),
    ("model", "coupling_head.", CoDDModel.from_pretrained),
    ("model", "coupling_head.", AutoModelForCausalLM.from_pretrained),
]


def refusal(load, folder: Path, **kwargs) -> str:
    with pytest.raises(ValueError, match="weights") as caught:
        load(folder, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize(("name", "prefix", "load"), WITH_BACKBONE)
def test_backbone_that_lacks_weights_is_refused_and_they_are_named(
    name, prefix, load, pickled, copied
):
    folder = copied(name)
    lost = [f"{prefix}model.layers.1.mlp.up_proj.weight", f"{prefix}lm_head.weight"]
    change_weights(folder, lambda weights: [weights.pop(key) for key in lost])
    if pickled:
        pickle_weights(folder)
    message = refusal(load, folder)
    assert all(f"`{key}`" in message for key in lost)
    assert "missing" in message


@pytest.mark.parametrize(("name", "prefix", "load"), WITH_BACKBONE)
def test_backbone_with_weights_that_it_has_no_place_for_is_refused(name, prefix, load, copied):
    folder = copied(name)
    change_config(folder, num_hidden_layers=1)
    message = refusal(load, folder)
    assert f"`{prefix}model.layers.1.input_layernorm.weight`" in message
    assert "and 5 more in no place of the model" in message
    folder = copied(name) if not folder.exists() else folder
    change_config(folder, num_hidden_layers=2)
    change_weights(folder, lambda weights: weights.update({f"{prefix}extra": torch.ones(2)}))
    assert f"`{prefix}extra` in no place of the model" in refusal(load, folder)


@pytest.mark.parametrize(
    "changes", [{"hidden_size": 32}, {"intermediate_size": 12}, {"vocab_size": 10}]
)
@pytest.mark.parametrize(("name", "prefix", "load"), WITH_BACKBONE)
def test_backbone_of_other_shapes_is_refused_and_they_are_named(
    name, prefix, load, changes, copied
):
    folder = copied(name)
    change_config(folder, **changes)
    message = refusal(load, folder)
    assert "not of the shapes that its configuration (`config.json`) describes" in message
    assert f"`{prefix}" in message


def test_backbone_in_shards_is_checked_as_one_in_a_file_is(folders, copied):
    assert len(list((folders / "sharded").glob("*.safetensors"))) > 1
    load_backbone(folders / "sharded")
    folder = copied("sharded")
    change_config(folder, num_hidden_layers=1)
    assert "in no place of the model" in refusal(load_backbone, folder)
    sorted(folder.glob("*.safetensors"))[0].unlink()
    with pytest.raises(OSError, match=r"names the file 'model-.*', which is not beside it"):
        load_backbone(folder)


@pytest.mark.parametrize(
    "index", ["{}", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../b"}}']
)
def test_index_of_weights_that_names_no_files_is_one_sentence(index, copied):
    folder = copied("sharded")
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(OSError, match=r"weight_map|JSON object|not beside it"):
        load_backbone(folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize(("name", "prefix", "load"), WITH_HEAD)
def test_head_weights_of_another_kind_are_refused(name, prefix, load, pickled, kind, copied):
    folder = copied(name)
    key = f"{prefix}emission"
    change_weights(folder, lambda weights: weights.update({key: weights[key].to(KINDS[kind])}))
    if pickled:
        pickle_weights(folder)
    message = refusal(load, folder)
    assert "`emission` must be of shape (3, 12) and floating-point" in message
    assert message.endswith(f"and {kind}.")


@pytest.mark.parametrize(("name", "prefix", "load"), WITH_HEAD)
def test_head_in_a_pickle_is_checked_as_one_in_safetensors_is(name, prefix, load, copied):
    folder = copied(name)
    pickle_weights(folder)
    load(folder)
    weights = torch.load(folder / "pytorch_model.bin")
    emission = weights.pop(f"{prefix}emission")
    torch.save(weights, folder / "pytorch_model.bin")
    assert "`emission` must be" in refusal(load, folder)
    torch.save(weights | {f"{prefix}emission": emission[:2]}, folder / "pytorch_model.bin")
    assert "is of shape (2, 12)" in refusal(load, folder)
    repeated = torch.zeros(1).expand(1 << 40)
    torch.save(weights | {f"{prefix}emission": repeated}, folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="are larger than their file"):
        load(folder)
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(OSError, match="are damaged, or hold more than weights"):
        load(folder)


@pytest.mark.parametrize(("name", "prefix", "load"), WITH_HEAD)
def test_head_with_weights_that_it_has_no_place_for_is_refused(name, prefix, load, copied):
    folder = copied(name)
    change_weights(folder, lambda weights: weights.update({f"{prefix}extra": torch.ones(2)}))
    assert "extra` in no place of the model" in refusal(load, folder)


@pytest.mark.parametrize("state", [-1, 3])
@pytest.mark.parametrize(("name", "prefix", "load"), WITH_HEAD)
def test_head_that_copies_to_states_that_it_has_not_is_refused(name, prefix, load, state, copied):
    folder = copied(name)
    key = f"{prefix}context_maps.suggested"
    change_weights(folder, lambda weights: weights[key].fill_(state))
    assert f"must hold states from 0 to 2, got {state} to {state}" in refusal(load, folder)


def test_masked_lm_may_hold_what_pretraining_added_for_pairs_of_sentences(tmp_path):
    config = AlbertConfig(
        vocab_size=12,
        embedding_size=8,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    AlbertForMaskedLM(config).save_pretrained(tmp_path)
    change_weights(tmp_path, lambda weights: weights.update({"albert.pooler.bias": torch.ones(2)}))
    assert load_backbone(tmp_path, mask_token_id=2).backbone.config.num_hidden_layers == 4
    change_weights(tmp_path, lambda weights: weights.update({"albert.other.bias": torch.ones(2)}))
    refusal(load_backbone, tmp_path, mask_token_id=2)


ABSURD = [
    {"num_hidden_layers": 2**31},
    {"num_hidden_layers": 1500},
    {"hidden_size": 2**31},
    {"hidden_size": 2**40, "intermediate_size": 2**40},
    {"vocab_size": 2**31},
    {"head_dim": 2**31},
    {"num_attention_heads": 2**31, "num_key_value_heads": 2**31},
    {"num_labels": 2**31},
    {"vocab_size": 10**30},
]


@pytest.mark.parametrize("changes", ABSURD, ids=str)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "bert"])
def test_backbone_of_absurd_sizes_is_refused_before_anything_is_allocated(kind, changes, tmp_path):
    tiny_backbone(kind).save_pretrained(tmp_path / "backbone")
    CoDDModel.from_backbone(tiny_backbone(kind), random_head()).save_pretrained(tmp_path / "model")
    if kind == "bert" and "head_dim" in changes:
        pytest.skip("BERT has no such field")
    for folder, load in (
        (tmp_path / "backbone", load_backbone),
        (tmp_path / "model", CoDDModel.from_pretrained),
        (tmp_path / "model", AutoModelForCausalLM.from_pretrained),
    ):
        change_config(folder, **changes)
        with pytest.raises(ValueError, match=r"weights|layers|labels|configuration|head"):
            load(folder)


@pytest.mark.parametrize(
    "changes", [{"num_attention_heads": 0}, {"hidden_size": "x"}, {"pad_token_id": 99}]
)
@pytest.mark.parametrize(("name", "prefix", "load"), WITH_BACKBONE)
def test_backbone_that_cannot_be_made_is_one_sentence(name, prefix, load, changes, copied):
    folder = copied(name)
    change_config(folder, **changes)
    with pytest.raises(ValueError, match=r"config|head") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_configuration_may_not_say_where_weights_are(copied):
    folder = copied("backbone")
    change_config(folder, transformers_weights="other.safetensors")
    with pytest.raises(ValueError, match="`transformers_weights` in the configuration"):
        load_backbone(folder)
    folder = copied("head")
    change_config(folder, transformers_weights="other.safetensors")
    with pytest.raises(ValueError, match="`transformers_weights` is no field"):
        CoDDHead.from_pretrained(folder)
