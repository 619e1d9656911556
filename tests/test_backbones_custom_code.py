"""Promises of backbones with their own code, and of the page on adding a family."""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from codd_hf import CoDDModel, CoDDPipeline, CoDDScheduler, backbones
from tiny import random_head

CODE = Path(__file__).parent / "fixtures" / "custom_code"
IDS = torch.tensor([[5, 6, 2, 7, 2, 8, 3], [9, 2, 3, 4, 2, 10, 11]])
BLOCK = 3


@pytest.fixture(autouse=True)
def _own_module_cache(tmp_path, monkeypatch):
    """What transformers copies of a repository's code stays in the test's folder."""
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path / "modules"), *sys.path])
    yield
    for name in [n for n in sys.modules if n.split(".")[0] == "transformers_modules"]:
        del sys.modules[name]


@pytest.fixture
def repository(tmp_path):
    return custom_repository(tmp_path / "blocky")


def custom_repository(folder: Path, num_hidden_layers: int = 1, **config) -> Path:
    shutil.copytree(CODE, folder)
    fields = {
        "model_type": "blocky",
        "architectures": ["BlockyForCausalLM"],
        "num_hidden_layers": num_hidden_layers,
        "vocab_size": 12,
        "hidden_size": 16,
        "mask_token_id": 2,
        "auto_map": {
            "AutoConfig": "configuration_blocky.BlockyConfig",
            "AutoModelForCausalLM": "modeling_blocky.BlockyForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(fields | config))
    generator = torch.Generator().manual_seed(0)
    shapes = {"tokens.weight": (12, 16), "positions.weight": (64, 16), "output.weight": (12, 16)}
    for layer in range(num_hidden_layers):
        for name in ("query", "key", "value", "mix"):
            shapes[f"layers.{layer}.{name}.weight"] = (16, 16)
            shapes[f"layers.{layer}.{name}.bias"] = (16,)
    weights = {name: 0.5 * torch.randn(s, generator=generator) for name, s in shapes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def padded(ids: torch.Tensor, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The first row behind or before two positions of padding, the second as long without."""
    zeros = torch.zeros(2, dtype=torch.long)
    row = torch.cat((zeros, ids[0, :5]) if side == "left" else (ids[0, :5], zeros))
    mask = torch.cat((zeros, zeros.new_ones(5)) if side == "left" else (zeros.new_ones(5), zeros))
    return torch.stack((row, ids[1])), torch.stack((mask, torch.ones_like(mask)))


def test_code_of_a_backbone_asks_for_the_switch(repository, tmp_path):
    with pytest.raises(ValueError, match=r"'blocky'\) brings its own code.*trust_remote_code=True"):
        CoDDModel.from_backbone(repository)
    head = random_head(base_model_name_or_path=str(repository))
    head.save_pretrained(tmp_path / "head")
    with pytest.raises(ValueError, match="own code"):
        CoDDModel.from_pretrained(tmp_path / "head", trust_remote_code=True)
    assert not any(n.startswith("transformers_modules.") for n in sys.modules)


def test_switch_does_not_reach_code_of_another_repository_and_needs_a_model_class(tmp_path):
    classes = {"AutoConfig": "configuration_blocky.BlockyConfig"}
    folder = custom_repository(tmp_path / "no class", auto_map=classes)
    with pytest.raises(ValueError, match="BlockyConfig names no model class"):
        CoDDModel.from_backbone(folder, trust_remote_code=True)
    elsewhere = {
        "AutoConfig": "someone/else--configuration_blocky.BlockyConfig",
        "AutoModelForCausalLM": "modeling_blocky.BlockyForCausalLM",
    }
    folder = custom_repository(tmp_path / "blocky", auto_map=elsewhere)
    with pytest.raises(ValueError, match="another repository, 'someone/else'"):
        CoDDModel.from_backbone(folder, trust_remote_code=True)


def test_switch_does_not_follow_an_adapter_to_the_repository_that_it_names(tmp_path):
    """Of a repository on the Hub, transformers would take the code of the adapter's base model."""
    for owner, code in (("evil", "raise AssertionError('code that nobody named ran')"), ("me", "")):
        repository = tmp_path / f"models--{owner}--blocky"
        snapshot = custom_repository(repository / "snapshots" / ("0" * 40))
        with (snapshot / "modeling_blocky.py").open("a") as file:
            file.write(code)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "evil/blocky"}
    (snapshot / "adapter_config.json").write_text(json.dumps(adapter))
    with contextlib.suppress(OSError, ValueError):  # the adapter has no weights
        CoDDModel.from_backbone(
            "me/blocky", trust_remote_code=True, cache_dir=tmp_path, local_files_only=True
        )


def test_backbone_with_code_predicts_as_it_does_alone_and_sees_everything(repository):
    model = CoDDModel.from_backbone(repository, random_head(), trust_remote_code=True)
    output = model(IDS)
    alone = model.backbone(IDS, output_hidden_states=True)
    assert torch.equal(output.logits, alone.logits)
    assert torch.equal(output.last_hidden_state, alone.hidden_states[-1])
    for changed_position in range(IDS.shape[1]):
        changed = IDS.clone()
        changed[:, changed_position] = 4 if changed_position != 3 else 5
        difference = (model(changed).logits - output.logits).abs().amax((0, 2))
        assert (difference > 1e-4).all()
    prompts = torch.tensor([[5, 6], [9, 3]])
    generated = model.generate(prompts, gen_length=4, num_inference_steps=2)
    assert not (generated == 2).any()


@pytest.mark.parametrize(("side", "block_length"), [("left", None), ("right", BLOCK)])
def test_padding_changes_nothing_for_a_backbone_with_code(repository, side, block_length):
    model = CoDDModel.from_backbone(repository, trust_remote_code=True, block_length=block_length)
    ids, mask = padded(IDS, side)
    found = model(ids, attention_mask=mask).logits
    assert torch.allclose(found[0][mask[0].bool()], model(IDS[:1, :5]).logits[0], atol=1e-5)
    assert torch.allclose(found[1], model(IDS[1:]).logits[0], atol=1e-5)


def test_block_causal_pass_is_the_full_pass_over_each_block_and_what_precedes_it(repository):
    """With one layer, keys and values are those of the embeddings, whoever sees them."""
    model = CoDDModel.from_backbone(repository, trust_remote_code=True, block_length=BLOCK)
    found = model(IDS).logits
    for start in range(0, IDS.shape[1], BLOCK):
        cut = model.backbone(IDS[:, : start + BLOCK]).logits
        assert torch.allclose(found[:, start : start + BLOCK], cut[:, start:], atol=1e-5)
    assert (found - model.backbone(IDS).logits)[:, :BLOCK].abs().max() > 1e-3


def test_known_block_diffusion_model_asks_for_its_block_length(tmp_path):
    folder = custom_repository(tmp_path / "sdar", model_type="sdar")
    code = folder / "configuration_blocky.py"
    code.write_text(code.read_text().replace('"blocky"', '"sdar"'))
    with pytest.raises(ValueError, match="`block_length` is missing: 'sdar'"):
        CoDDModel.from_backbone(folder, trust_remote_code=True)
    model = CoDDModel.from_backbone(folder, trust_remote_code=True, block_length=BLOCK)
    assert model(IDS).logits.shape == (2, 7, 12)


@pytest.mark.parametrize("padding", [None, "left"])
def test_logits_of_the_next_token_are_lined_up(repository, padding):
    plain = CoDDModel.from_backbone(repository, trust_remote_code=True)
    shifted = CoDDModel.from_backbone(repository, trust_remote_code=True, logit_shift=True)
    ids, mask = (IDS, None) if padding is None else padded(IDS, padding)
    before, after = plain(ids, attention_mask=mask), shifted(ids, attention_mask=mask)
    for row in range(2):
        real = slice(None) if mask is None else mask[row].bool()
        for field in ("logits", "last_hidden_state"):
            old, new = before[field][row][real], after[field][row][real]
            assert torch.allclose(new, torch.cat((old[:1], old[:-1])), atol=1e-5)


def test_saved_model_with_code_asks_again_and_loads_from_its_own_folder(tmp_path):
    repository = custom_repository(tmp_path / "blocky", num_hidden_layers=2)
    model = CoDDModel.from_backbone(
        repository, random_head(), trust_remote_code=True, block_length=BLOCK
    )
    logits = model(IDS).logits
    model.save_pretrained(tmp_path / "alone")
    with pytest.raises(ValueError, match=r"'blocky'; .*CoDDModel.from_pretrained\(\.\.\., trust"):
        AutoConfig.from_pretrained(tmp_path / "alone", trust_remote_code=True)
    for name in ("first", "second"):
        model.save_pretrained(tmp_path / name)
        shutil.rmtree(repository)
        names = {"configuration_blocky.py", "modeling_blocky.py", "blocky_layers.py"}
        assert {file.name for file in (tmp_path / name).glob("*blocky*.py")} == names
        with pytest.raises(ValueError, match="own code"):
            CoDDModel.from_pretrained(tmp_path / name)
        model = CoDDModel.from_pretrained(tmp_path / name, trust_remote_code=True).eval()
        assert torch.equal(model(IDS).logits, logits)
        repository = tmp_path / name


def test_registered_classes_of_the_user_are_saved_as_code(tmp_path, monkeypatch):
    shutil.copytree(CODE, tmp_path / "users" / "users_blocky")
    monkeypatch.syspath_prepend(tmp_path / "users")
    config_class = importlib.import_module("users_blocky.configuration_blocky").BlockyConfig
    model_class = importlib.import_module("users_blocky.modeling_blocky").BlockyForCausalLM
    config_class.register_for_auto_class()
    model_class.register_for_auto_class("AutoModelForCausalLM")
    model = CoDDModel.from_backbone(model_class(config_class(mask_token_id=2)), random_head())
    model.save_pretrained(tmp_path / "saved")
    loaded = CoDDModel.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_saved_pipeline_with_code_loads_from_its_own_folder(repository, tmp_path):
    model = CoDDModel.from_backbone(repository, random_head(), trust_remote_code=True)
    CoDDPipeline(model, CoDDScheduler()).save_pretrained(tmp_path / "pipeline")
    shutil.rmtree(repository)
    with pytest.raises(ValueError, match="own code"):
        CoDDModel.from_pretrained(tmp_path / "pipeline", subfolder="model")
    loaded = CoDDModel.from_pretrained(
        tmp_path / "pipeline", subfolder="model", trust_remote_code=True
    )
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    with pytest.raises(ValueError, match="own code"):
        CoDDPipeline.from_pretrained(tmp_path / "pipeline")
    arguments = {"trust_remote_code": True, "dtype": "bfloat16"}
    pipe = CoDDPipeline.from_pretrained(tmp_path / "pipeline", **arguments)
    assert pipe.model.dtype == torch.bfloat16
    pipe.save_pretrained(tmp_path / "again")
    pipe = CoDDPipeline.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert torch.allclose(pipe.model(IDS).logits.float(), model(IDS).logits, atol=0.5)


def test_page_on_adding_a_family_works(tmp_path, monkeypatch):
    for name in ("FAMILIES", "LAYOUTS"):
        entries = [*getattr(backbones, name)]
        for module in (backbones, backbones.family):
            monkeypatch.setattr(module, name, entries)
    indented = re.findall(r"(?:^    .*\n|^\n)+", backbones.__doc__, flags=re.MULTILINE)
    for block in indented:
        exec(re.sub(r"^    ", "", block, flags=re.MULTILINE), {"__name__": "page"})

    sizes = {"vocab_size": 12, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    mistral = MistralForCausalLM(
        MistralConfig(
            **sizes,
            intermediate_size=16,
            num_key_value_heads=2,
            sliding_window=None,
            initializer_range=0.4,
        )
    )
    model = CoDDModel.from_backbone(mistral.eval())
    changed = IDS.clone()
    changed[:, -1] = 4
    assert (model(IDS).logits[:, 0] - model(changed).logits[:, 0]).abs().max() > 1e-3

    native = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=64, bos_token_id=None)).eval()
    names = {"model.embed_tokens.": "embed.", "lm_head.": "head.", "model.norm.": "final_norm."}
    weights = {}
    for name, tensor in native.state_dict().items():
        for prefix, other in names.items():
            name = name.replace(prefix, other) if name.startswith(prefix) else name
        weights[re.sub(r"^model\.layers\.(\d+)\.", r"layer\1.", name)] = tensor
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    del sizes["num_hidden_layers"]
    config = {"model_type": "acme-diffusion", "intermediate_size": 64, "depth": 2, "mask": 2}
    (tmp_path / "config.json").write_text(json.dumps(config | sizes))
    found = CoDDModel.from_backbone(tmp_path)
    assert found.config.mask_token_id == 2
    assert torch.equal(found(IDS).logits, CoDDModel.from_backbone(native)(IDS).logits)
