"""Promises of the families that decode block by block, or have experts: loaded without their code.

Two kinds of evidence: logits that the original code gave (`fixtures`), and checkpoints made of a
native model, whose logits are found again, with a mask that is built here.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import (
    Gemma3TextConfig,
    Glm4MoeConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from codd_hf import CoDDModel
from codd_hf.backbones import family_of, load_tokenizer
from codd_hf.backbones.family import layout_of
from codd_hf.coupling.adapters import adapter_layers, add_adapter
from families import EXPERTS, FIXTURES, as_llada2, native, saved_as, written
from tiny import random_head

BLOCK = 4
ORACLES = {"sdar": "logits_block_4", "llada2": "logits_block_4", "lladamoe": "logits_full"}
KINDS = pytest.mark.parametrize("kind", ORACLES)
EXPERT = "model.layers.1.mlp.experts."


def load(folder: Path, kind: str, **kwargs) -> CoDDModel:
    blocks = {"block_length": BLOCK} if kind == "llada2" else {}
    return CoDDModel.from_backbone(folder, **blocks, **kwargs)


def oracle(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    found = load_file(FIXTURES / f"{kind}_tiny" / "expected.safetensors")
    return found["input_ids"], found[ORACLES[kind]]


def copied(kind: str, folder: Path, change=lambda weights: None, **config) -> Path:
    """The checkpoint in another folder, changed."""
    source = FIXTURES / f"{kind}_tiny"
    weights = load_file(source / "model.safetensors")
    change(weights)
    content = json.loads((source / "config.json").read_text())
    return written(folder, weights, content | config)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@KINDS
def test_checkpoint_gives_the_logits_of_the_original_code(kind, attention):
    ids, expected = oracle(kind)
    model = load(FIXTURES / f"{kind}_tiny", kind, attn_implementation=attention)
    assert torch.allclose(model(ids).logits, expected, atol=1e-5)
    changed = ids.clone()
    changed[:, BLOCK - 1] = (ids[:, BLOCK - 1] + 1) % 96
    assert (model(changed).logits[:, 0] - expected[:, 0]).abs().max() > 1e-3
    changed[:, -1] = (ids[:, -1] + 1) % 96
    before_last_block = (model(changed).logits - model(ids).logits)[:, 4:8].abs().amax((0, 2))
    assert (before_last_block > 1e-4).all()
    block_length = getattr(model.backbone.config, "block_length", None)
    assert block_length == (None if kind == "lladamoe" else BLOCK)


@pytest.mark.parametrize("side", ["left", "right"])
@KINDS
def test_padded_rows_get_the_logits_of_the_original_code(kind, side):
    ids, expected = oracle(kind)
    model = load(FIXTURES / f"{kind}_tiny", kind)
    padding = torch.full((len(ids), 3), 7)
    parts = (padding, ids) if side == "left" else (ids, padding)
    real = torch.cat([torch.full_like(p, p is ids) for p in parts], 1)
    logits = model(torch.cat(parts, 1), attention_mask=real).logits[real.bool()]
    assert torch.allclose(logits, expected.flatten(0, 1), atol=1e-5)


@KINDS
def test_saved_model_is_native_and_gives_the_same_logits(kind, tmp_path):
    ids, expected = oracle(kind)
    folder = copied(kind, tmp_path / "original", mask_token_id=5)
    model = load(folder, kind)
    model.backbone.save_pretrained(tmp_path / "backbone", max_shard_size="60KB")
    CoDDModel.from_backbone(model.backbone, random_head(96, mask_token_id=5)).save_pretrained(
        tmp_path / "model"
    )
    shutil.rmtree(folder)
    config = json.loads((tmp_path / "backbone" / "config.json").read_text())
    assert config["model_type"] in ("qwen3", "qwen3_moe", "glm4_moe")
    assert config["architectures"] == [type(model.backbone).__name__]
    assert "Layout" not in str(config)
    for again in (
        CoDDModel.from_backbone(tmp_path / "backbone"),
        CoDDModel.from_pretrained(tmp_path / "model"),
    ):
        assert torch.allclose(again(ids).logits, expected, atol=1e-5)
        assert again.config.mask_token_id == 5


@pytest.mark.parametrize("where", ["disk", "cpu"])
@KINDS
def test_shards_dtype_and_device_map_change_nothing(kind, where, tmp_path):
    ids, expected = oracle(kind)
    source = FIXTURES / f"{kind}_tiny"
    weights = load_file(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    folder = written(tmp_path / "shards", weights, config, shards=3)
    offload = {"offload_folder": tmp_path / "offload"} if where == "disk" else {}
    model = load(folder, kind, device_map={"": where}, dtype=torch.float32, **offload)
    assert torch.allclose(model(ids).logits, expected, atol=1e-5)
    if where == "cpu":
        half = load(folder, kind, dtype=torch.bfloat16)
        assert half.backbone.dtype == torch.bfloat16
        found, (best, second) = half(ids).logits.argmax(-1), expected.topk(2).values.unbind(-1)
        clear = best - second > 0.2 * expected.std()
        assert clear.any()
        assert torch.equal(found[clear], expected.argmax(-1)[clear])


def without(name):
    return lambda weights: weights.pop(name)


def with_more(name, *shape):
    return lambda weights: weights.update({name: torch.zeros(shape)})


def cut(name):
    return lambda weights: weights.update({name: weights[name][1:].clone()})


@pytest.mark.parametrize(
    ("kind", "change", "told"),
    [
        ("sdar", without("lm_head.weight"), r"lm_head\.weight missing"),
        ("sdar", with_more("model.more.weight", 3), r"model\.more\.weight in no place"),
        ("sdar", cut("model.norm.weight"), r"model\.norm\.weight \(31,\), not \(32,\)"),
        ("lladamoe", without(EXPERT + "3.gate_proj.weight"), r"experts\.3\.gate.* missing"),
        ("lladamoe", with_more(EXPERT + "8.up_proj.weight", 16, 32), r"experts\.8\.up"),
        ("lladamoe", cut(EXPERT + "2.up_proj.weight"), r"experts\.2\.up.* of another shape"),
        ("llada2", without("model.layers.0.attention.query_key_value.weight"), r"q_proj"),
        ("llada2", with_more("model.layers.0.attention.dense.bias", 32), r"bias in no place"),
        ("llada2", cut("model.layers.0.attention.query_key_value.weight"), r"query_key.*\(127, 32"),
        ("llada2", cut("model.layers.1.mlp.gate.expert_bias"), r"\(7,\), not \(8,\)"),
    ],
)
def test_weight_too_few_too_many_or_of_another_shape_is_an_error_that_names_it(
    kind, change, told, tmp_path
):
    with pytest.raises(ValueError, match=told):
        load(copied(kind, tmp_path / "changed", change), kind)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("sdar", "use_sliding_window", True),
        ("sdar", "layer_norm_eps", 1e-5),
        ("sdar", "attn_logit_softcapping", 30.0),
        ("lladamoe", "sliding_window", 8),
        ("lladamoe", "qk_layernorm", False),
        ("lladamoe", "clip_qkv", 2.0),
        ("llada2", "norm_head", True),
        ("llada2", "score_function", "softmax"),
        ("llada2", "rotary_dim", 4),
        ("llada2", "layernorm_type", "layernorm"),
    ],
)
def test_field_that_changes_the_mathematics_is_an_error_that_names_it(kind, field, value, tmp_path):
    told = "sliding_window" if "window" in field else field
    with pytest.raises(ValueError, match=f"`{told}`"):
        load(copied(kind, tmp_path / "changed", **{field: value}), kind)


def test_fields_about_training_and_kernels_are_passed_over(tmp_path):
    more = {"fuse_cross_entropy": True, "ep_size": 8, "attn_implementation": "flex_attention"}
    ids, expected = oracle("sdar")
    model = load(copied("sdar", tmp_path / "more", **more, block_size=None), "sdar")
    assert model.backbone.config.block_length == 4
    assert torch.allclose(model(ids).logits, expected, atol=1e-5)


IDS = torch.randint(2, 40, (2, 11), generator=torch.Generator().manual_seed(0))


def wanted(model, block_length: int | None, shift: bool = False) -> torch.Tensor:
    """The native model's logits with a mask that is built here, and their shift."""
    number = torch.arange(IDS.shape[1]) // (block_length or IDS.shape[1])
    sees = number[:, None] >= number
    mask = torch.where(sees, 0.0, torch.finfo(torch.float32).min).expand(2, 1, -1, -1)
    with torch.no_grad():
        logits = model(IDS, attention_mask=mask, use_cache=False).logits
    return torch.cat((logits[:, :1], logits[:, :-1]), 1) if shift else logits


@pytest.mark.parametrize(("tied", "key_heads"), [(False, 2), (True, 1), (False, 6)])
def test_llada2_of_other_shapes_gives_the_native_models_logits(tied, key_heads, tmp_path):
    model = native(
        Glm4MoeConfig,
        tie_word_embeddings=tied,
        num_key_value_heads=key_heads,
        n_routed_experts=6,
        n_shared_experts=2,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=3,
        moe_intermediate_size=12,
        first_k_dense_replace=2,
        routed_scaling_factor=1.5,
        partial_rotary_factor=0.5,
        use_qk_norm=True,
        num_mtp_layers=0,
    )
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_()
    found = CoDDModel.from_backbone(as_llada2(model, tmp_path), block_length=3)
    assert torch.allclose(found(IDS).logits, wanted(model, 3), atol=1e-5)
    projection = found.get_output_embeddings().weight
    assert (projection is found.get_input_embeddings().weight) == tied


def test_dreamreasoner_is_told_from_dream_by_its_blocks(tmp_path):
    model = native(Qwen3Config)
    dream = {"model_type": "Dream", "architectures": ["DreamModel"], "mask_token_id": 5}
    found = CoDDModel.from_backbone(saved_as(model, tmp_path / "blocks", **dream, block_size=4))
    assert found.config.mask_token_id == 5
    assert torch.allclose(found(IDS).logits, wanted(model, 4), atol=1e-5)
    with pytest.raises(ValueError, match="are not those that its configuration"):
        CoDDModel.from_backbone(saved_as(model, tmp_path / "dream", **dream))


@pytest.mark.parametrize(
    ("config_class", "block_length", "config"),
    [
        (Qwen3MoeConfig, 4, {"model_type": "sdar", "num_local_experts": None}),
        (Qwen2Config, 5, {"model_type": "Fast_dLLM_Qwen", "bd_size": 5}),
        (LlamaConfig, 4, {"architectures": ["StableDiffcoderForCausalLM"]}),
        (LlamaConfig, None, {"model_type": "illada", "architectures": ["ILLaDAForCausalLM"]}),
        (Qwen3Config, None, {"model_type": "a2d-qwen3"}),
        (Qwen3Config, 3, {"model_type": "a2d-qwen3", "block_length": 3}),
        (LlamaConfig, None, {"model_type": "a2d-llama"}),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_family_of_native_names_gives_the_native_models_logits(
    config_class, block_length, config, tied, tmp_path
):
    experts = EXPERTS if config_class is Qwen3MoeConfig else {}
    width = {"hidden_size": 48} if config_class is Qwen2Config else {}
    model = native(config_class, tie_word_embeddings=tied, **experts | width)
    found = CoDDModel.from_backbone(saved_as(model, tmp_path, **config, **experts))
    shift = config["model_type"] == "Fast_dLLM_Qwen" if "model_type" in config else False
    assert torch.allclose(found(IDS).logits, wanted(model, block_length, shift), atol=1e-5)
    assert getattr(found.backbone.config, "block_length", None) == block_length
    projection = found.get_output_embeddings().weight
    assert (projection is found.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("config_class", [MistralConfig, Gemma3TextConfig])
@pytest.mark.parametrize("block_length", [None, 3])
def test_decoder_of_transformers_sees_both_ways_or_block_by_block(config_class, block_length):
    model = native(config_class, sliding_window=64)
    expected = wanted(model, block_length)
    found = CoDDModel.from_backbone(model, block_length=block_length)
    assert torch.allclose(found(IDS).logits, expected, atol=1e-5)
    found.backbone.config.sliding_window = 4
    if block_length is not None:
        with pytest.raises(ValueError, match=r"`sliding_window` \(4\) cannot be had"):
            found(IDS)


def test_layer_norm_of_illada_is_refused(tmp_path):
    config = {"architectures": ["ILLaDAForCausalLM"], "layer_norm_eps": 1e-5}
    with pytest.raises(ValueError, match="`layer_norm_eps` is 1e-05"):
        CoDDModel.from_backbone(saved_as(native(LlamaConfig), tmp_path, **config))


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({"model_type": "sdar", "vocab_size": 151936}, {"mask_token_id": 151669}),
        ({"model_type": "sdar", "vocab_size": 151936, "mask_token_id": 7}, {"mask_token_id": 7}),
        ({"model_type": "sdar", "vocab_size": 40}, {"mask_token_id": None}),
        (
            {"model_type": "Fast_dLLM_Qwen", "vocab_size": 152064},
            {"mask_token_id": 151665, "eos_token_id": [151645, 151643]},
        ),
        (
            {"architectures": ["ILLaDAForCausalLM"], "vocab_size": 155136},
            {"mask_token_id": 5, "tie_word_embeddings": True},
        ),
        (
            {"model_type": "llada2_moe", "vocab_size": 157184},
            {"mask_token_id": 156895, "eos_token_id": 156892, "pad_token_id": 156892},
        ),
    ],
)
def test_special_tokens_that_no_file_says_are_known_by_vocabulary(config, tokens):
    sizes = {"num_attention_heads": 2, "hidden_size": 8, "num_experts": 2, "num_shared_experts": 1}
    config = config | (sizes if config.get("model_type") == "llada2_moe" else {})
    found = layout_of(config).translate(config)
    assert {name: getattr(found, name) for name in tokens} == tokens


@KINDS
def test_new_lora_leaves_experts_router_and_projection_alone(kind):
    backbone = load(FIXTURES / f"{kind}_tiny", kind).backbone
    layers = family_of(backbone.config).lora_targets(backbone)
    add_adapter(backbone, LoraConfig(r=2, target_modules=layers), "default")
    found = {name.rpartition(".")[2] for name in adapter_layers(backbone)}
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    dense = set() if kind != "sdar" else {"gate_proj", "up_proj", "down_proj"}
    assert found == attention | dense


@KINDS
def test_tokenizer_beside_a_checkpoint_loads_with_its_mask_token_and_chat_template(
    kind, tmp_path, tiny_tokenizer
):
    tiny_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((FIXTURES / f"{kind}_tiny/config.json").read_text())
    assert_same_tokenizer(load_tokenizer(tmp_path), tiny_tokenizer)


def test_tokenizer_beside_a_native_model_cuts_text_as_it_says_itself(tmp_path, tiny_tokenizer):
    tiny_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    assert_same_tokenizer(load_tokenizer(tmp_path), tiny_tokenizer)


def assert_same_tokenizer(found, tiny_tokenizer) -> None:
    text = "Tom has 3456 boxes of eggs."
    assert len(found) == len(tiny_tokenizer)
    assert found(text)["input_ids"] == tiny_tokenizer(text)["input_ids"]
    assert found.mask_token_id == tiny_tokenizer.mask_token_id
    assert found.chat_template == tiny_tokenizer.chat_template
