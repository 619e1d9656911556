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
    return lambda name: Path(shutil.copytree(folders / name, tmp_path / name, dirs_exist_ok=True))


def change_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, part: str = "text_config", **changes) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    content.get(part, content).update(changes)
    path.write_text(json.dumps(content))


def pickle_weights(folder: Path) -> dict[str, torch.Tensor]:
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return weights


def load_backbone(folder: Path, **kwargs) -> CoDDModel:
    return CoDDModel.from_backbone(folder, **kwargs)


WITH_BACKBONE = [
    ("backbone", "", load_backbone),
    ("backbone", "", CoDDPipeline.from_pretrained),
    ("model", "backbone.", CoDDModel.from_pretrained),
    ("model", "backbone.", AutoModelForCausalLM.from_pretrained),
]
WITH_HEAD = [
    ("head", "", CoDDHead.from_pretrained),
    ("head", "", AutoModel.from_pretrained),
    ("model", "coupling_head.", CoDDHead.from_pretrained),
    ("model", "coupling_head.", CoDDModel.from_pretrained),
    ("model", "coupling_head.", AutoModelForCausalLM.from_pretrained),
]


def refusal(load, folder: Path, error: type = ValueError, **kwargs) -> str:
    with pytest.raises(error) as caught:
        load(folder, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize(("name", "prefix", "load"), WITH_BACKBONE)
def test_backbone_is_refused_that_lacks_weights_or_has_others(name, prefix, load, pickled, copied):
    lost = [f"{prefix}model.layers.1.mlp.up_proj.weight", f"{prefix}lm_head.weight"]
    folder = copied(name)
    change_weights(folder, lambda weights: [weights.pop(key) for key in lost])
    if pickled:
        pickle_weights(folder)
    message = refusal(load, folder)
    assert all(key in message for key in lost)
    assert "missing" in message
    if pickled:
        return
    folder = copied(name)
    change_config(folder, num_hidden_layers=1)
    message = refusal(load, folder)
    assert f"{prefix}model.layers.1.input_layernorm.weight" in message
    assert "and 5 more in no place of the model" in message
    folder = copied(name)
    change_weights(folder, lambda weights: weights.update({f"{prefix}extra": torch.ones(2)}))
    assert f"{prefix}extra in no place of the model" in refusal(load, folder)
    for changes in ({"hidden_size": 32}, {"intermediate_size": 12}, {"vocab_size": 10}):
        folder = copied(name)
        change_config(folder, **changes)
        message = refusal(load, folder)
        assert "of another shape" in message or "but its files have" in message


def test_backbone_in_shards_is_checked_as_one_in_a_file_is(folders, copied):
    assert len(list((folders / "sharded").glob("*.safetensors"))) > 1
    load_backbone(folders / "sharded")
    folder = copied("sharded")
    change_config(folder, num_hidden_layers=1)
    assert "in no place of the model" in refusal(load_backbone, folder)
    sorted(folder.glob("*.safetensors"))[0].unlink()
    assert "which is not beside it" in refusal(load_backbone, folder, OSError)
    for index in ("{}", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../b"}}'):
        (folder / "model.safetensors.index.json").write_text(index)
        assert "model.safetensors.index.json" in refusal(load_backbone, folder, OSError)


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize(("name", "prefix", "load"), WITH_HEAD)
def test_head_is_refused_whose_weights_are_not_those_described(name, prefix, load, pickled, copied):
    def message(change, error: type = ValueError) -> str:
        folder = copied(name)
        change_weights(folder, change)
        if pickled:
            pickle_weights(folder)
        return refusal(load, folder, error)

    key = f"{prefix}emission"
    assert "emission missing" in message(lambda weights: weights.pop(key))
    told = message(lambda weights: weights.update({key: weights[key][:2].clone()}))
    assert "emission (2, 12), not (3, 12) of another shape" in told
    told = message(lambda weights: weights.update({f"{prefix}extra": torch.ones(2)}))
    assert "extra in no place of the model" in told
    suggested = f"{prefix}context_maps.suggested"
    for state in (-1, 3):
        told = message(lambda weights, state=state: weights[suggested].fill_(state))
        assert f"`context_maps.suggested` must hold numbers of states, 0 to 2, got {state}" in told


@pytest.mark.parametrize(("name", "prefix", "load"), WITH_HEAD)
def test_pickle_loads_weights_and_runs_nothing(name, prefix, load, copied):
    folder = copied(name)
    weights = pickle_weights(folder)
    load(folder)
    file = folder / "pytorch_model.bin"
    torch.save(weights | {f"{prefix}emission": torch.zeros(1).expand(1 << 40)}, file)
    assert "of another shape" in refusal(load, folder)
    file.write_bytes(b"cos\nsystem\n(S'true'\ntR." + bytes(100_000))
    assert "cannot be loaded" in refusal(load, folder, OSError)


def test_masked_lm_may_hold_what_pretraining_added_for_pairs_of_sentences(tmp_path):
    sizes = {"vocab_size": 12, "embedding_size": 8, "hidden_size": 16, "num_hidden_layers": 4}
    sizes |= {"num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 32}
    config = AlbertConfig(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=1)
    AlbertForMaskedLM(config).save_pretrained(tmp_path)
    change_weights(tmp_path, lambda weights: weights.update({"albert.pooler.bias": torch.ones(2)}))
    assert load_backbone(tmp_path, mask_token_id=2).backbone.config.num_hidden_layers == 4
    change_weights(tmp_path, lambda weights: weights.update({"albert.other.bias": torch.ones(2)}))
    refusal(load_backbone, tmp_path, mask_token_id=2)


ABSURD = [
    {"num_hidden_layers": 2**31},
    {"num_labels": 2**31},
    {"hidden_size": 2**31},
    {"hidden_size": 2**40, "intermediate_size": 2**40},
    {"vocab_size": 2**31},
    {"head_dim": 2**31},
    {"num_attention_heads": 2**31, "num_key_value_heads": 2**31},
    {"vocab_size": 10**30},
    {"num_attention_heads": 0},
    {"pad_token_id": 99},
]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "bert"])
def test_backbone_of_absurd_sizes_is_refused_before_anything_is_allocated(kind, tmp_path):
    tiny_backbone(kind).save_pretrained(tmp_path / "backbone")
    CoDDModel.from_backbone(tiny_backbone(kind), random_head()).save_pretrained(tmp_path / "model")
    for name, load in (
        ("backbone", load_backbone),
        ("model", CoDDModel.from_pretrained),
        ("model", AutoModelForCausalLM.from_pretrained),
    ):
        whole = (tmp_path / name / "config.json").read_text()
        for changes in ABSURD:
            if kind == "bert" and "head_dim" in changes:
                continue  # it has no such field
            change_config(tmp_path / name, **changes)
            if load == AutoModelForCausalLM.from_pretrained:  # it refuses in words of its own
                with pytest.raises(Exception):  # noqa: B017, PT011
                    load(tmp_path / name)
            else:
                refusal(load, tmp_path / name, (ValueError, OSError))
            (tmp_path / name / "config.json").write_text(whole)


ABSURD_HEADS = [
    {"num_latents": 10**9},
    {"vocab_size": 10**12},
    {"num_latents": 10**9, "vocab_size": 10**12},
    {"window_length": 1 << 16, "tie_emissions": False},
    {"emission": "tied", "emission_rank": 10**9, "context_size": 10**6},
    {"context_size": 10**12},
]


@pytest.mark.parametrize("name", ["head", "model", "pipeline"])
def test_head_of_absurd_sizes_is_refused_before_anything_is_allocated(name, folders, copied):
    for changes in ABSURD_HEADS:
        folder = copied(name)
        change_config(folder / ("model" if name == "pipeline" else ""), "head_config", **changes)
        for load in (CoDDModel.from_pretrained, CoDDHead.from_pretrained):
            refusal(load, folder)


def test_configuration_may_not_say_where_weights_are(copied):
    folder = copied("backbone")
    change_config(folder, transformers_weights="other.safetensors")
    assert "`transformers_weights` in the configuration" in refusal(load_backbone, folder)
    folder = copied("head")
    change_config(folder, transformers_weights="other.safetensors")
    assert "`transformers_weights` is no field" in refusal(CoDDHead.from_pretrained, folder)


def test_sizes_may_differ_where_transformers_is_told_so(copied):
    folder = copied("head")
    change_config(folder, num_latents=5)
    head = CoDDHead.from_pretrained(folder, ignore_mismatched_sizes=True)
    assert head.config.num_latents == 5
