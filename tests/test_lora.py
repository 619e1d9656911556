"""Promises of LoRA on the backbone: trained with the head, saved beside it, merged, switched."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from codd_hf import CoDDModel, CoDDPipeline
from tiny import random_head, tiny_backbone

MASK = 2
IDS = torch.tensor([[5, 6, 7, MASK, 8, MASK, MASK], [9, 4, MASK, MASK, 3, MASK, 10]])
LABELS = torch.where(IDS == MASK, torch.tensor([4, 5, 6, 7, 8, 9, 3]), -100)


def lora(**changes) -> LoraConfig:
    kwargs = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    return LoraConfig(**(kwargs | changes))


def coupled(model, **call) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, coupling="marginal", **call).logits.softmax(-1)


@pytest.fixture
def backbone_folder(tmp_path):
    tiny_backbone().save_pretrained(tmp_path / "backbone")
    return tmp_path / "backbone"


def wrapped(backbone_folder, **head) -> PeftModel:
    torch.manual_seed(0)
    model = CoDDModel.from_backbone(backbone_folder, random_head(**head))
    return get_peft_model(model, lora(modules_to_save=["coupling_head"]))


def adapter_folder(tmp_path, seed: int = 0, name: str = "lora", **changes):
    """A LoRA of the backbone alone, as PEFT writes it."""
    torch.manual_seed(seed)
    get_peft_model(tiny_backbone(), lora(**changes)).save_pretrained(tmp_path / name)
    return tmp_path / name


@pytest.fixture
def plain(backbone_folder):
    return CoDDModel.from_backbone(backbone_folder, random_head())


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("conditioning", [[], ["latent", "copy"]])
def test_peft_trains_lora_and_head_together_and_nothing_else(backbone_folder, conditioning, task):
    model = CoDDModel.from_backbone(
        backbone_folder, random_head(conditioning=conditioning, context_size=16)
    )
    config = LoraConfig(
        r=2,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["coupling_head"],
        task_type=task,
    )
    tuned = get_peft_model(model, config)
    trained = [n for n, p in tuned.named_parameters() if p.requires_grad]
    assert all("lora_" in n or "coupling_head.modules_to_save.default" in n for n in trained)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(6):
        loss = tuned(input_ids=IDS, labels=LABELS).loss
        losses.append(loss.item())
        loss.backward()
        reached = {n for n, p in tuned.named_parameters() if p.grad is not None and p.grad.any()}
        optimizer.step()
        optimizer.zero_grad()
    assert reached <= set(trained)
    assert any("lora_A" in n for n in reached)
    assert any("coupling_head" in n for n in reached)
    assert losses[-1] < losses[0] - 0.2


def test_peft_model_generates_and_disables(backbone_folder, plain):
    tuned = wrapped(backbone_folder).eval()
    kwargs = {"max_new_tokens": 8, "sampling": "marginal"}
    tokens = tuned.generate(input_ids=IDS[:1, :2], **kwargs)
    assert torch.equal(tokens, tuned.get_base_model().generate(IDS[:1, :2], **kwargs))
    with tuned.disable_adapter():
        assert torch.equal(coupled(tuned), coupled(plain))


@pytest.mark.parametrize("way", ["PEFT wraps the model", "adapter of the backbone"])
def test_head_folder_with_adapter_brings_both_back(way, backbone_folder, tmp_path):
    if way == "PEFT wraps the model":
        tuned = wrapped(backbone_folder)
        model, expected = tuned.get_base_model(), coupled(tuned)
    else:
        model = CoDDModel.from_backbone(backbone_folder, random_head(), adapter_folder(tmp_path))
        expected = coupled(model)
    model.save_head(tmp_path / "small")
    assert sorted(load_file(tmp_path / "small" / "model.safetensors")) == [
        "emission",
        "initial",
        "token_marginal",
        "transition",
    ]
    written = json.loads((tmp_path / "small" / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(backbone_folder)
    assert written["modules_to_save"] is None
    loaded = CoDDModel.from_pretrained(tmp_path / "small")
    assert torch.equal(coupled(loaded), expected)
    assert torch.equal(coupled(CoDDPipeline.from_pretrained(tmp_path / "small").model), expected)
    joined = CoDDModel.from_backbone(tiny_backbone(), tmp_path / "small")
    assert torch.equal(coupled(joined), expected)
    lone = PeftModel.from_pretrained(tiny_backbone(), tmp_path / "small" / "adapter")
    bare = CoDDModel.from_backbone(lone, mask_token_id=MASK)
    assert torch.allclose(bare(IDS).logits, model(IDS).logits, atol=1e-5)


def test_model_with_an_adapter_is_saved_as_plain_backbone_and_adapter(backbone_folder, tmp_path):
    model = CoDDModel.from_backbone(backbone_folder, random_head(), adapter_folder(tmp_path))
    plain = CoDDModel.from_backbone(backbone_folder, random_head())
    model.save_pretrained(tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert stored.keys() == plain.state_dict().keys()
    assert all(torch.equal(stored[name], value) for name, value in plain.state_dict().items())
    loaded = CoDDModel.from_pretrained(tmp_path / "model")
    assert torch.equal(coupled(loaded), coupled(model))
    loaded.disable_adapters()
    assert torch.equal(coupled(loaded), coupled(plain))
    plain.save_pretrained(tmp_path / "model")
    assert torch.equal(coupled(CoDDModel.from_pretrained(tmp_path / "model")), coupled(plain))


def test_each_head_has_its_own_adapter(backbone_folder, plain, tmp_path):
    first, second = (
        CoDDModel.from_backbone(
            backbone_folder, random_head(seed=seed), adapter_folder(tmp_path, seed, str(seed))
        )
        for seed in (1, 2)
    )
    second.save_head(tmp_path / "second")
    model = CoDDModel.from_backbone(backbone_folder, random_head(seed=1), tmp_path / "1")
    model.load_head(tmp_path / "second", "second")
    model.load_head(random_head(), "bare")
    assert torch.equal(coupled(model), coupled(first))
    for name, alone in (("second", second), ("bare", plain), ("default", first)):
        assert torch.equal(coupled(model, head=name), coupled(alone))
    model.delete_head("second")
    assert list(model.backbone.peft_config) == ["default"]
    assert torch.equal(coupled(model), coupled(first))


def test_adapter_of_another_backbone_is_refused(backbone_folder, tmp_path):
    other = tiny_backbone(hidden_size=32)
    get_peft_model(other, lora()).save_pretrained(tmp_path / "wide")
    get_peft_model(tiny_backbone("bert"), lora(target_modules=["query"])).save_pretrained(
        tmp_path / "bert"
    )
    wrapped(backbone_folder).save_pretrained(tmp_path / "whole")
    for name in ("wide", "bert", "whole"):
        with pytest.raises(ValueError, match="not trained on a backbone like this one"):
            CoDDModel.from_backbone(backbone_folder, random_head(), tmp_path / name)


def test_folder_without_an_adapter_is_refused(backbone_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="`adapter`: there is no file or folder"):
        CoDDModel.from_backbone(backbone_folder, adapter=tmp_path / "none")
    with pytest.raises(OSError, match=r"holds no PEFT adapter: .*adapter_config.json"):
        CoDDModel.from_backbone(backbone_folder, adapter=backbone_folder)
