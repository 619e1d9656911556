"""Promises of LLaDA's and Dream's checkpoints: the original logits, without the original code."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from codd_hf import CoDDModel, CoDDPipeline
from codd_hf.backbones import LLaDALayout, load_tokenizer
from tiny import random_head

FIXTURES = Path(__file__).parent / "fixtures"
KINDS = ("llada", "dream")
MASK = 126
MODELING_BOMB = "raise AssertionError('the code of the checkpoint ran')"


def checkpoint(kind: str) -> Path:
    return FIXTURES / f"{kind}_tiny"


def expected(kind: str) -> dict[str, torch.Tensor]:
    return load_file(checkpoint(kind) / "expected.safetensors")


def copied(kind: str, folder: Path, tensors=lambda tensors: tensors, **config) -> Path:
    """The checkpoint in another folder, changed."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = tensors(load_file(checkpoint(kind) / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    found = json.loads((checkpoint(kind) / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(found | config))
    return folder


def expected_padded(kind: str) -> torch.Tensor:
    """Logits of the padded batch; Dream's shifted, a row's first real token keeping its own."""
    oracle = expected(kind)
    if kind == "llada":
        return oracle["logits_padded"]
    unshifted = oracle["logits_padded_unshifted"]
    shifted = torch.cat((unshifted[:, :1], unshifted[:, :-1]), 1)
    first = oracle["attention_mask"].argmax(1)
    rows = torch.arange(len(first))
    return shifted.index_put((rows, first), unshifted[rows, first])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_gives_the_logits_of_the_original_code(kind, attention):
    model = CoDDModel.from_backbone(checkpoint(kind), attn_implementation=attention)
    assert model.backbone.config._attn_implementation == attention
    assert model.config.mask_token_id == MASK
    logits = model(expected(kind)["input_ids"]).logits
    assert torch.allclose(logits, expected(kind)["logits"], atol=1e-5)
    model.backbone.config.is_causal = True
    causal = model(expected(kind)["input_ids"]).logits
    assert (causal - expected(kind)["logits"]).abs().max() > 0.1


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_padded_rows_get_the_logits_of_the_original_code(kind, side):
    oracle = expected(kind)
    model = CoDDModel.from_backbone(checkpoint(kind))
    ids, mask, logits = oracle["input_ids"], oracle["attention_mask"], expected_padded(kind)
    assert not mask.all()
    if side == "right":
        padding = (1 - mask).sum(1)
        turn = (torch.arange(mask.shape[1]) + padding[:, None]) % mask.shape[1]
        ids, mask = ids.gather(1, turn), mask.gather(1, turn)
        logits = logits[torch.arange(len(ids))[:, None], turn]
    found = model(ids, attention_mask=mask).logits
    assert torch.allclose(found[mask.bool()], logits[mask.bool()], atol=1e-5)


def test_dream_given_positions_and_padding_lines_up_as_with_its_own():
    oracle = expected("dream")
    model = CoDDModel.from_backbone(checkpoint("dream"))
    mask = oracle["attention_mask"]
    found = model(
        oracle["input_ids"], attention_mask=mask, position_ids=oracle["position_ids"]
    ).logits
    assert torch.allclose(found[mask.bool()], expected_padded("dream")[mask.bool()], atol=1e-5)


@pytest.mark.parametrize(("kind", "padded"), [("llada", False), ("dream", True)])
def test_hidden_state_and_single_logits_are_those_of_the_position(kind, padded):
    oracle = expected(kind)
    mask = oracle["attention_mask"] if padded else None
    model = CoDDModel.from_backbone(checkpoint(kind))
    states = model.backbone_states(oracle["input_ids"], mask)
    at = (torch.tensor([0, 1, 1, 0]), torch.tensor([5, 0, 13, 9]))
    assert torch.allclose(states.logits(at), states.logits()[at], atol=1e-5)
    projected = model.get_output_embeddings()(states.last_hidden_state)
    assert torch.allclose(projected, states.logits(), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_code_beside_the_checkpoint_never_runs(kind, tmp_path):
    classes = {
        "AutoConfig": "configuration_original.OriginalConfig",
        "AutoModel": "modeling_original.OriginalModel",
        "AutoModelForCausalLM": "modeling_original.OriginalModel",
    }
    folder = copied(kind, tmp_path / "original", auto_map=classes)
    for name in ("configuration_original.py", "modeling_original.py"):
        (folder / name).write_text(MODELING_BOMB)
    model = CoDDModel.from_backbone(folder, trust_remote_code=True)
    logits = model(expected(kind)["input_ids"]).logits
    assert torch.allclose(logits, expected(kind)["logits"], atol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("*.py"))
    assert "auto_map" not in (tmp_path / "saved" / "config.json").read_text()


@pytest.mark.parametrize(("kind", "whole"), [("llada", True), ("dream", True), ("llada", False)])
def test_saved_model_needs_nothing_of_the_original(kind, whole, tmp_path):
    original = copied(kind, tmp_path / "original")
    model = CoDDModel.from_backbone(original, random_head(128, mask_token_id=MASK))
    ids = expected(kind)["input_ids"]
    logits = model(ids).logits
    (model if whole else model.backbone).save_pretrained(tmp_path / "saved")
    shutil.rmtree(original)
    load = CoDDModel.from_pretrained if whole else CoDDModel.from_backbone
    assert torch.equal(load(tmp_path / "saved")(ids).logits, logits)
    prefix = "backbone." if whole else ""
    assert f"{prefix}model.layers.0.mlp.down_proj.weight" in load_file(
        tmp_path / "saved" / "model.safetensors"
    )
    half = load(tmp_path / "saved", dtype=torch.bfloat16, attn_implementation="eager").backbone
    assert (half.dtype, half.config._attn_implementation) == (torch.bfloat16, "eager")


def test_sharded_bfloat16_checkpoint_in_a_subfolder_loads(tmp_path):
    kind = "llada"
    folder = copied(kind, tmp_path / "part", torch_dtype="bfloat16")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, shards = sorted(weights), {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        tensors = {name: weights[name].bfloat16() for name in part}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        shards |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": shards}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    model = CoDDModel.from_backbone(tmp_path, subfolder="part")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    logits = model(expected(kind)["input_ids"]).logits
    assert torch.allclose(logits.float(), expected(kind)["logits"], atol=0.1)
    exact = CoDDModel.from_backbone(tmp_path, subfolder="part", dtype=torch.float32)
    assert exact.backbone.dtype == torch.float32
    assert (exact(expected(kind)["input_ids"]).logits - expected(kind)["logits"]).abs().max() < 0.1


def test_checkpoint_is_found_in_a_cache_by_id_and_revision(tmp_path, monkeypatch):
    asked, kind = [], "dream"

    def no_network(host, *args, **kwargs):
        asked.append(host)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", True)
    repository = tmp_path / "models--someone--tiny"
    copied(kind, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "first").write_text("0" * 40)
    where = {"cache_dir": tmp_path, "local_files_only": True}
    model = CoDDModel.from_backbone("someone/tiny", revision="first", **where)
    logits = model(expected(kind)["input_ids"]).logits
    assert torch.allclose(logits, expected(kind)["logits"], atol=1e-5)
    with pytest.raises(OSError, match="cache"):
        CoDDModel.from_backbone("someone/tiny", revision="second", **where)
    assert not asked


def test_llada_with_tied_weights_projects_with_its_embedding(tmp_path):
    def tie(weights):
        return {k: v for k, v in weights.items() if k != "model.transformer.ff_out.weight"}

    def repeat(weights):
        embedding = weights["model.transformer.wte.weight"].clone()
        return weights | {"model.transformer.ff_out.weight": embedding}

    tied = CoDDModel.from_backbone(copied("llada", tmp_path / "tied", tie, weight_tying=True))
    twice = CoDDModel.from_backbone(copied("llada", tmp_path / "twice", repeat))
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    ids = expected("llada")["input_ids"]
    assert torch.equal(tied(ids).logits, twice(ids).logits)


def test_llada_has_as_many_tokens_as_its_embedding_has_rows(tmp_path):
    folder = copied("llada", tmp_path / "padded", vocab_size=120, embedding_size=128)
    assert CoDDModel.from_backbone(folder).config.vocab_size == 128


@pytest.mark.parametrize(("vocab_size", "mask"), [(126464, 126336), (128, None)])
def test_only_the_vocabulary_of_llada_8b_implies_a_mask_token(vocab_size, mask):
    config = json.loads((checkpoint("llada") / "config.json").read_text())
    del config["mask_token_id"], config["embedding_size"]
    assert LLaDALayout().translate(config | {"vocab_size": vocab_size}).mask_token_id == mask


def test_llada_option_that_llama_lacks_is_an_error_that_names_it(tmp_path):
    folder = copied("llada", tmp_path / "alibi", alibi=True)
    with pytest.raises(
        ValueError, match="`alibi` is True in the configuration of this 'llada' checkpoint"
    ):
        CoDDModel.from_backbone(folder)


def test_other_layout_under_the_name_of_llada_is_refused_and_its_code_does_not_run(tmp_path):
    classes = {"AutoConfig": "configuration_moe.Config"}
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llada", "hidden_size": 8, "auto_map": classes})
    )
    (tmp_path / "configuration_moe.py").write_text(MODELING_BOMB)
    with pytest.raises(ValueError, match=r"'llada'.*brings its own code"):
        CoDDModel.from_backbone(tmp_path)


def test_tokenizer_of_dream_loads_without_its_code(tmp_path, tiny_tokenizer):
    state = json.loads(tiny_tokenizer.backend_tokenizer.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(state["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in state["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    end = len(state["vocab"])
    special = {
        str(end + i): {"content": token, "special": True, "normalized": False}
        for i, token in enumerate(("<|endoftext|>", "<|mdm|>"))
    }
    fields = {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "added_tokens_decoder": special,
        "pad_token": "<|endoftext|>",
        "mask_token": "<|mdm|>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(fields))
    (tmp_path / "tokenization_dream.py").write_text(MODELING_BOMB)
    (tmp_path / "config.json").write_text((checkpoint("dream") / "config.json").read_text())
    tokenizer = load_tokenizer(str(tmp_path))
    text = "Tom has 3 boxes<|mdm|>"
    assert tokenizer.mask_token_id == end + 1
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_decodes_what_its_logits_say(kind):
    pipe = CoDDPipeline.from_pretrained(str(checkpoint(kind)))
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5]]
    settings = {"gen_length": 4, "block_length": 4, "num_inference_steps": 1, "temperature": 0.0}
    found = pipe(input_ids=prompts, output_type="seq", eos_token_id=[], **settings).sequences
    for prompt, answer in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt + 4 * [MASK]])
        logits = pipe.model(ids).logits[0, -4:]
        assert torch.equal(
            logits.index_fill(-1, torch.tensor([MASK]), -torch.inf).argmax(-1), answer
        )
        generated = pipe.model.generate(ids[:, :-4], eos_token_id=[], **settings)
        assert torch.equal(generated[0, -4:], answer)
