"""Promises of backbones whose class is not of transformers, and of the page on adding a family."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
)

from codd_hf import CoDDConfig, CoDDModel, CoDDPipeline, CoDDScheduler, backbones
from tiny import random_head, tiny_backbone

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


def loaded(folder: Path):
    """The backbone as its user loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def padded(ids: torch.Tensor, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The first row behind or before two positions of padding, the second as long without."""
    zeros = torch.zeros(2, dtype=torch.long)
    row = torch.cat((zeros, ids[0, :5]) if side == "left" else (ids[0, :5], zeros))
    mask = torch.cat((zeros, zeros.new_ones(5)) if side == "left" else (zeros.new_ones(5), zeros))
    return torch.stack((row, ids[1])), torch.stack((mask, torch.ones_like(mask)))


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": True}])
def test_backbone_with_code_is_refused_by_name_and_nothing_of_it_runs(trust, repository, tmp_path):
    remedy = rf"'blocky'\) brings its own code, .*from_pretrained\('{repository}', trust_remote"
    head = random_head(base_model_name_or_path=str(repository))
    head.save_pretrained(tmp_path / "head")
    for entry, name in (
        (CoDDModel.from_backbone, repository),
        (CoDDModel.from_pretrained, tmp_path / "head"),
        (CoDDPipeline.from_pretrained, repository),
    ):
        with pytest.raises(ValueError, match=remedy):
            entry(name, **trust)
    config = json.loads((repository / "config.json").read_text())
    with pytest.raises(ValueError, match=r"`text_config.model_type` .* given with the head to `Co"):
        CoDDConfig(text_config=config)
    assert not any(n.startswith("transformers_modules.") for n in sys.modules)


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": True}])
def test_code_beside_a_model_that_transformers_has_does_not_run(trust, tmp_path):
    sizes = {"vocab_size": 12, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    native = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=16))
    for model, name in ((native, "backbone"), (CoDDModel.from_backbone(native), "whole")):
        folder = tmp_path / name
        model.save_pretrained(folder)
        classes = {kind: "evil.Evil" for kind in ("AutoConfig", "AutoModelForCausalLM")}
        config = json.loads((folder / "config.json").read_text()) | {"auto_map": classes}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "evil.py").write_text("raise AssertionError('code that nobody asked for ran')")
    with pytest.warns(UserWarning, match="code of its own, which is not run"):
        CoDDModel.from_backbone(tmp_path / "backbone", **trust)
    CoDDModel.from_pretrained(tmp_path / "whole", **trust)


def test_tokenizer_with_code_is_given_by_the_user(tmp_path, tiny_tokenizer):
    mask, size = tiny_tokenizer.mask_token_id, len(tiny_tokenizer)
    model = CoDDModel.from_backbone(tiny_backbone("llama", size), mask_token_id=mask)
    CoDDPipeline(model, CoDDScheduler(), tiny_tokenizer).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer" / "tokenizer_config.json"
    classes = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | classes))
    (tmp_path / "tokenizer" / "evil.py").write_text("raise AssertionError('nobody asked for it')")
    with pytest.raises(ValueError, match=r"brings its own code.* give it as `tokenizer`"):
        CoDDPipeline.from_pretrained(tmp_path)
    pipe = CoDDPipeline.from_pretrained(tmp_path, tokenizer=tiny_tokenizer)
    assert pipe.tokenizer is tiny_tokenizer


def test_object_with_code_predicts_as_it_does_alone_sees_everything_and_decodes(repository):
    model = CoDDModel.from_backbone(loaded(repository), random_head())
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


def test_head_of_an_object_with_code_is_saved_and_joined_again(repository, tmp_path):
    model = CoDDModel.from_backbone(loaded(repository), random_head())
    model.save_head(tmp_path / "head")
    assert not list((tmp_path / "head").glob("*.py"))
    again = CoDDModel.from_backbone(loaded(repository), tmp_path / "head")
    expected = model(IDS, coupling="marginal").logits
    assert torch.equal(again(IDS, coupling="marginal").logits, expected)


def test_whole_that_could_not_be_loaded_again_is_not_saved(repository, tmp_path):
    model = CoDDModel.from_backbone(loaded(repository), random_head())
    for part in (model, CoDDPipeline(model, CoDDScheduler())):
        with pytest.raises(ValueError, match=r"'blocky'\) is of a class .* by `save_head`"):
            part.save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize(("side", "block_length"), [("left", None), ("right", BLOCK)])
def test_padding_changes_nothing_for_a_backbone_with_code(repository, side, block_length):
    model = CoDDModel.from_backbone(loaded(repository), block_length=block_length)
    ids, mask = padded(IDS, side)
    found = model(ids, attention_mask=mask).logits
    assert torch.allclose(found[0][mask[0].bool()], model(IDS[:1, :5]).logits[0], atol=1e-5)
    assert torch.allclose(found[1], model(IDS[1:]).logits[0], atol=1e-5)


def test_block_causal_pass_is_the_full_pass_over_each_block_and_what_precedes_it(repository):
    """With one layer, keys and values are those of the embeddings, whoever sees them."""
    model = CoDDModel.from_backbone(loaded(repository), block_length=BLOCK)
    found = model(IDS).logits
    for start in range(0, IDS.shape[1], BLOCK):
        cut = model.backbone(IDS[:, : start + BLOCK]).logits
        assert torch.allclose(found[:, start : start + BLOCK], cut[:, start:], atol=1e-5)
    assert (found - model.backbone(IDS).logits)[:, :BLOCK].abs().max() > 1e-3


@pytest.mark.parametrize("padding", [None, "left"])
def test_logits_of_the_next_token_are_lined_up(repository, padding):
    plain = CoDDModel.from_backbone(loaded(repository))
    shifted = CoDDModel.from_backbone(loaded(repository), logit_shift=True)
    ids, mask = (IDS, None) if padding is None else padded(IDS, padding)
    before, after = plain(ids, attention_mask=mask), shifted(ids, attention_mask=mask)
    for row in range(2):
        real = slice(None) if mask is None else mask[row].bool()
        for field in ("logits", "last_hidden_state"):
            old, new = before[field][row][real], after[field][row][real]
            assert torch.allclose(new, torch.cat((old[:1], old[:-1])), atol=1e-5)


def test_page_on_adding_a_family_works(tmp_path, monkeypatch):
    for name in ("FAMILIES", "LAYOUTS"):
        entries = [*getattr(backbones, name)]
        for module in (backbones, backbones.family):
            monkeypatch.setattr(module, name, entries)
    indented = re.findall(r"(?:^    .*\n|^\n)+", backbones.__doc__, flags=re.MULTILINE)
    for block in indented:
        exec(re.sub(r"^    ", "", block, flags=re.MULTILINE), {"__name__": "page"})

    sizes = {"vocab_size": 12, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    olmo = Olmo2ForCausalLM(
        Olmo2Config(
            **sizes,
            intermediate_size=16,
            num_key_value_heads=2,
            initializer_range=0.4,
        )
    )
    model = CoDDModel.from_backbone(olmo.eval())
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
