"""Promises of adapters: which are taken, that those come back, and that a file can do no harm."""

from __future__ import annotations

import json
import re
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from codd_hf import CoDDHead, CoDDModel, CoDDPipeline, CoDDScheduler
from codd_hf.coupling.adapters import active_adapter, delete_adapter
from codd_hf.evaluation.judge import load_judge
from tiny import random_head, tiny_backbone

MASK = 2
IDS = torch.tensor([[5, 6, 7, MASK, 8, MASK, MASK], [9, 4, MASK, MASK, 3, MASK, 10]])
KINDS = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True, "lora_alpha": 5},
    "DoRA": {"use_dora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "with a bias of its own": {"lora_bias": True},
    "ranks and scales by layer": {
        "rank_pattern": {"v_proj": 3, "layers.1.self_attn.q_proj": 5},
        "alpha_pattern": {".*q_proj": 7},
    },
    "one layer": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "a pattern": {"target_modules": r".*layers\.0.*(q|v)_proj"},
    "embeddings": {"target_modules": ["embed_tokens", "lm_head"]},
    "modules in full": {"modules_to_save": ["lm_head", "norm"]},
    "all-linear": {"target_modules": "all-linear"},
    "all-linear and head": {"target_modules": "all-linear", "modules_to_save": ["coupling_head"]},
}


def lora(**changes) -> LoraConfig:
    return LoraConfig(**({"r": 2, "target_modules": ["q_proj", "v_proj"]} | changes))


def coupled(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, coupling="marginal").logits.softmax(-1)


def trained(model: nn.Module) -> CoDDModel:
    """Every weight of the adapter somewhere else than where it began."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_backbone().save_pretrained(folder)
    return folder


@pytest.fixture
def model(base) -> CoDDModel:
    return CoDDModel.from_backbone(base, random_head(conditioning=["latent"], context_size=16))


WAYS = [("get_peft_model", kind) for kind in KINDS]
WAYS += [(way, kind) for way in ("add_adapter", "joined") for kind in ("LoRA", "DoRA")]


@pytest.mark.parametrize(("way", "kind"), WAYS)
def test_kinds_that_are_taken_come_back(way, kind, base, model, tmp_path):
    plain, plain_logits, made = coupled(model), model(IDS).logits, model
    torch.manual_seed(0)
    if way == "get_peft_model":
        made = get_peft_model(model, lora(**KINDS[kind]))
    elif way == "add_adapter":
        model.add_adapter(lora(**KINDS[kind]))
    else:
        wrapped = get_peft_model(model.backbone, lora(**KINDS[kind]))
        model = made = CoDDModel.from_backbone(wrapped, model.coupling_head)
    assert torch.allclose(coupled(model.eval()), plain, atol=1e-5)
    trained(model)
    expected = coupled(model)
    assert (expected - plain).abs().max() > 0.1
    model.save_pretrained(tmp_path / "model")
    loaded = CoDDModel.from_pretrained(tmp_path / "model")
    assert torch.equal(coupled(loaded), expected)
    if kind == "LoRA":
        CoDDPipeline(made, CoDDScheduler()).save_pretrained(tmp_path / "pipeline")
        pipe = CoDDPipeline.from_pretrained(tmp_path / "pipeline")
        assert torch.equal(coupled(pipe.model), expected)
    for number, source in enumerate((model, loaded)):
        source.save_head(tmp_path / str(number))
        joined = CoDDModel.from_backbone(base, tmp_path / str(number))
        assert torch.allclose(coupled(joined), expected, atol=1e-5)
        joined.disable_adapters()
        assert torch.equal(joined(IDS).logits, plain_logits)


REFUSED = {
    "AdaLoRA": peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10),
    "trainable tokens": peft.TrainableTokensConfig(
        token_indices=[1, 2], target_modules=["embed_tokens"]
    ),
    "norms": peft.LNTuningConfig(target_modules=["norm"]),
    "LoRA on the head": lora(target_modules=["latent"]),
    "LoRA on both": lora(target_modules=["q_proj", "latent"]),
    "a part of the head in full": lora(modules_to_save=["context_maps"]),
    "tokens in LoRA": lora(trainable_token_indices=[1, 2]),
    "biases": lora(bias="lora_only"),
    "a start off the weights": lora(init_lora_weights="pissa"),
    "parameters": lora(target_modules=[], target_parameters=["coupling_head.emission"]),
    "no such layer": lora(target_modules=["nope"]),
    "rank 0": lora(r=0),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_kinds_are_refused_when_they_are_made(kind, model):
    plain = coupled(model)
    if kind not in ("LoRA on both", "a part of the head in full"):  # which is not in the backbone
        with pytest.raises(ValueError, match=r"must|cannot|not|should|has to"):
            model.add_adapter(REFUSED[kind])
        model.add_adapter(lora())
        assert torch.allclose(coupled(model.eval()), plain, atol=1e-6)
        delete_adapter(model.backbone, "default")
    with pytest.raises(ValueError, match=r"must|cannot|not|should|has to"):
        get_peft_model(model, REFUSED[kind])


def test_virtual_tokens_would_be_lost_in_a_pipeline(model):
    wrapped = get_peft_model(
        model, peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    )
    with pytest.raises(ValueError, match=r"`peft_type` of .*PROMPT_TUNING.*: use a `peft.LoraCo"):
        CoDDPipeline(wrapped, CoDDScheduler())
    with pytest.raises(TypeError, match="inputs_embeds"):
        wrapped(input_ids=IDS)


def test_pipeline_takes_the_model_out_of_the_wrapper(model, tmp_path):
    wrapped = trained(get_peft_model(model, lora()))
    pipe = CoDDPipeline(model, CoDDScheduler())
    pipe.model = wrapped
    assert pipe.model is model
    pipe.save_pretrained(tmp_path)
    loaded = CoDDPipeline.from_pretrained(tmp_path, model=wrapped)
    assert loaded.model is model
    assert torch.equal(coupled(CoDDPipeline.from_pretrained(tmp_path).model), coupled(model))


def test_adapter_that_leaves_the_head_alone_saves_after_one_that_trains_it(model, tmp_path):
    wrapped = get_peft_model(model, lora(modules_to_save=["coupling_head"]))
    wrapped.add_adapter("second", lora(init_lora_weights=False))
    trained(wrapped)
    for active in ("second", "default"):
        wrapped.set_adapter(active)
        model.save_pretrained(tmp_path / active)
        model.save_head(tmp_path / f"{active} head")
        for folder in (tmp_path / active, tmp_path / f"{active} head"):
            assert torch.equal(coupled(CoDDModel.from_pretrained(folder)), coupled(model))
    wrapped.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"several active adapters \(default, second\)"):
        model.save_pretrained(tmp_path / "both")


def test_model_without_a_head_saves_its_adapter(base, tmp_path):
    model = CoDDModel.from_backbone(base, mask_token_id=MASK)
    model.add_adapter(lora())
    trained(model).save_pretrained(tmp_path)
    assert torch.equal(CoDDModel.from_pretrained(tmp_path)(IDS).logits, model(IDS).logits)


def test_state_dict_that_the_caller_has_is_saved_without_the_adapter(model, tmp_path):
    wrapped = get_peft_model(model, lora(modules_to_save=["coupling_head"]))
    wrapped.add_adapter("second", lora())
    trained(model).save_pretrained(tmp_path, state_dict=model.state_dict())
    loaded = CoDDModel.from_pretrained(tmp_path)
    assert torch.equal(coupled(loaded), coupled(model))


def test_merged_adapter_is_not_saved_twice(model, tmp_path):
    wrapped = trained(get_peft_model(model, lora()))
    expected = coupled(model)
    wrapped.merge_adapter()
    with pytest.raises(ValueError, match="merged into the backbone's weights"):
        model.save_pretrained(tmp_path)
    wrapped.unmerge_adapter()
    model.save_pretrained(tmp_path)
    assert torch.allclose(coupled(CoDDModel.from_pretrained(tmp_path)), expected, atol=1e-5)
    merged = wrapped.merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter" / "adapter_config.json").exists()
    assert torch.allclose(coupled(CoDDModel.from_pretrained(tmp_path)), expected, atol=1e-5)


def test_adapters_of_a_model_are_those_of_its_backbone(model, tmp_path):
    plain = coupled(model)
    model.add_adapter(lora(init_lora_weights=False), "a")
    model.add_adapter(lora(init_lora_weights=False, target_modules=["down_proj"]), "b")
    model.eval()
    second = coupled(model)
    model.set_adapter("a")
    first = coupled(model)
    assert len({str(x) for x in (plain, first, second)}) == 3
    model.disable_adapters()
    assert torch.equal(coupled(model), plain)
    model.enable_adapters()
    assert torch.equal(coupled(model), first)
    model.save_head(tmp_path)
    delete_adapter(model.backbone, "a")
    assert torch.equal(coupled(model), plain)
    model.load_adapter(tmp_path, "again")
    assert torch.equal(coupled(model), first)
    for name in ("a", "none"):
        with pytest.raises(ValueError, match=f"There is no adapter '{name}': .*'b', 'again'"):
            model.set_adapter(name)
    with pytest.raises(ValueError, match="an adapter 'b' already"):
        model.load_adapter(tmp_path, "b")
    model.set_adapter("b")
    assert torch.equal(coupled(model), second)


def test_naming_heads_trains_nothing_that_was_not_trained(base, stored):
    model = CoDDModel.from_backbone(base, random_head(), stored)
    model.load_head(random_head(seed=3), "other", stored)
    before = {name: p.requires_grad for name, p in model.backbone.named_parameters()}
    assert not any(flag for name, flag in before.items() if "lora_" in name)
    for name in ("other", "default", "other"):
        model(IDS, coupling="marginal", head=name)
        assert {n: p.requires_grad for n, p in model.backbone.named_parameters()} == before
    model.set_adapter("other")
    trained = {n for n, p in model.backbone.named_parameters() if p.requires_grad}
    assert trained - {n for n, flag in before.items() if flag} == {
        n for n in before if ".other." in n
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapter_of_a_half_precision_backbone_is_kept_in_float32(dtype, tmp_path):
    tiny_backbone().to(dtype).save_pretrained(tmp_path / "base")
    model = CoDDModel.from_backbone(tmp_path / "base", random_head(), dtype=dtype)
    model.add_adapter(lora())
    trained(model).save_head(tmp_path / "head")
    stored = load_file(tmp_path / "head" / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    loaded = CoDDModel.from_backbone(tmp_path / "base", tmp_path / "head", dtype=dtype)
    assert torch.equal(coupled(loaded), coupled(model))


ON_DISK = {
    "model.embed_tokens": "disk",
    "model.rotary_emb": "cpu",
    "model.layers.0": "disk",
    "model.layers.1": "cpu",
    "model.norm": "cpu",
    "lm_head": "cpu",
}


def test_adapters_do_not_go_on_offloaded_layers(base, model, tmp_path):
    model.add_adapter(lora())
    model.save_head(tmp_path / "head")
    offloaded = {"device_map": ON_DISK, "offload_folder": tmp_path / "offloaded"}
    with pytest.raises(ValueError, match="offloaded"):
        CoDDModel.from_backbone(base, tmp_path / "head", **offloaded)
    whole = CoDDModel.from_backbone(base, model.coupling_head)
    there = CoDDModel.from_backbone(base, model.coupling_head, **offloaded)
    with pytest.raises(ValueError, match="offloaded"):
        there.add_adapter(lora())
    assert torch.equal(coupled(there), coupled(whole))


@pytest.fixture
def stored(tmp_path) -> Path:
    """An adapter that PEFT wrote."""
    torch.manual_seed(0)
    wrapped = trained(get_peft_model(tiny_backbone(), lora(task_type="CAUSAL_LM")))
    wrapped.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def rewrite(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


BACKTRACKING = "(a+)+" * 20 + "$"
HOSTILE = {
    "a module to import": (
        {"megatron_config": {"x": 1}, "megatron_core": "antigravity"},
        "`megatron_c.*cannot be",
    ),
    "another module's name": ({"megatron_core": "antigravity"}, "`megatron_core` .*cannot be"),
    "layer pattern": (
        {"layers_pattern": [BACKTRACKING], "layers_to_transform": [1]},
        "`layers_pattern` of an adapter in a file must be of names",
    ),
    "rank pattern": ({"rank_pattern": {BACKTRACKING: 2}}, "`rank_pattern` .*without patterns"),
    "alpha pattern": ({"alpha_pattern": {BACKTRACKING: 2}}, "`alpha_pattern` .*without patterns"),
    "modules in full": ({"modules_to_save": [BACKTRACKING]}, "`modules_to_save` .*of names"),
    "copied layers": ({"layer_replication": [[0, 2]] * 1000}, "`layer_replication` .*cannot be"),
    "another kind": ({"peft_type": "ADALORA"}, "`peft_type` .*cannot be 'ADALORA': use a `peft"),
    "unknown field": ({"run_this": "code"}, "`run_this` .*cannot be"),
    "random start": ({"init_lora_weights": "pissa_niter_4"}, "`init_lora_weights` .*pissa_niter_4"),
}
NONSENSE = {
    "huge rank": {"r": 2**31},
    "rank above the stored": {"r": 3},
    "huge rank of a layer": {"rank_pattern": {"q_proj": 2**31}},
    "more layers than are stored": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "rank as text": {"r": "2"},
    "flag of a number": {"use_dora": 1},
    "names of numbers": {"target_modules": [1]},
}


def test_file_that_asks_for_more_than_lora_is_refused_before_peft_sees_it(
    stored, base, monkeypatch
):
    monkeypatch.setattr(peft, "LoraConfig", None)
    monkeypatch.setattr(peft, "inject_adapter_in_model", None)
    whole = (stored / "adapter_config.json").read_text()
    for changes, message in HOSTILE.values():
        rewrite(stored, **changes)
        with pytest.raises(ValueError, match=message):
            CoDDModel.from_backbone(base, random_head(), stored)
        (stored / "adapter_config.json").write_text(whole)


@pytest.mark.parametrize("changes", NONSENSE.values(), ids=NONSENSE)
def test_file_whose_settings_are_not_those_of_its_weights_is_refused(changes, stored, base):
    model = CoDDModel.from_backbone(base, random_head())
    plain = coupled(model)
    rewrite(stored, **changes)
    with pytest.raises(ValueError, match="not trained on a backbone like this one"):
        model.load_adapter(stored)
    assert torch.equal(coupled(model), plain)


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_pattern_in_a_file_is_not_run(field, stored, base, monkeypatch):
    expected = coupled(CoDDModel.from_backbone(base, random_head(), stored))
    rewrite(stored, **{field: BACKTRACKING}, base_model_name_or_path="somebody/else")

    def unexpected(pattern, *args, **kwargs):
        assert BACKTRACKING not in pattern
        return fullmatch(pattern, *args, **kwargs)

    fullmatch = re.fullmatch
    monkeypatch.setattr(re, "fullmatch", unexpected)
    loaded = CoDDModel.from_backbone(base, random_head(), stored)
    assert torch.equal(coupled(loaded), expected)


def test_damaged_adapter_is_refused_and_leaves_the_model_as_it_was(stored, base):
    weights = stored / "adapter_model.safetensors"
    tensors = load_file(weights)
    integers = {name: tensor.to(torch.int32) for name, tensor in tensors.items()}
    model = CoDDModel.from_backbone(base, random_head())
    plain = coupled(model)
    for damaged in (integers, dict([*tensors.items()][1:]), dict([*tensors.items()][2:])):
        save_file(damaged, weights)
        with pytest.raises((OSError, ValueError), match=str(stored)):
            model.load_adapter(stored)
        assert torch.equal(coupled(model), plain)
        assert not hasattr(model, "peft_config")


def test_adapter_that_does_not_fit_leaves_the_active_one(stored, base, tmp_path):
    other = get_peft_model(tiny_backbone(hidden_size=32), lora())
    other.save_pretrained(tmp_path / "wide")
    model = CoDDModel.from_backbone(base, random_head(), stored)
    expected = coupled(model)
    for name in ("second", "layers", "weight"):
        with pytest.raises(ValueError, match="not trained on a backbone like this one"):
            model.load_head(random_head(), name, tmp_path / "wide")
        assert active_adapter(model) == "default"
        assert torch.equal(coupled(model), expected)
    model.load_adapter(stored, "layers")
    assert torch.equal(coupled(model), expected)


@pytest.mark.parametrize("part", ["backbone", "model", "head", "pipeline", "judge", "Auto"])
def test_adapter_beside_a_model_does_not_say_where_weights_come_from(part, base, tmp_path):
    from transformers import AutoModelForCausalLM

    model = CoDDModel.from_backbone(base, random_head())
    folder, load = {
        "backbone": (tmp_path / "backbone", CoDDModel.from_backbone),
        "model": (tmp_path / "model", CoDDModel.from_pretrained),
        "head": (tmp_path / "head", CoDDHead.from_pretrained),
        "pipeline": (tmp_path / "pipeline", CoDDPipeline.from_pretrained),
        "judge": (tmp_path / "backbone", lambda name: load_judge(str(name))),
        "Auto": (tmp_path / "model", AutoModelForCausalLM.from_pretrained),
    }[part]
    tiny_backbone().save_pretrained(tmp_path / "backbone")
    model.save_pretrained(tmp_path / "model")
    model.save_head(tmp_path / "head")
    CoDDPipeline(model, CoDDScheduler()).save_pretrained(tmp_path / "pipeline")
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(base)}
    beside = folder / "model" if part == "pipeline" else folder
    (beside / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"holds an adapter .*which names other weights"):
        load(folder)
