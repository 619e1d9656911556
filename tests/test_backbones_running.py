"""Promises of backbones in use: resized, trained, offloaded, quantized, with a LoRA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from codd_hf import CoDDModel, CoDDPipeline, CoDDScheduler
from codd_hf.coupling.adapters import add_adapter
from tiny import random_head

FIXTURES = Path(__file__).parent / "fixtures"
KINDS = ("llada", "dream")
MASK = 126

# Both names of it work, and the older one is deprecated.
OLDER_NAME = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is:FutureWarning")


@pytest.fixture(params=KINDS)
def folder(request):
    return FIXTURES / f"{request.param}_tiny"


@pytest.fixture
def oracle(folder):
    return load_file(folder / "expected.safetensors")


def masked_pair(oracle) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of which two are masked, and labels for these."""
    ids = oracle["input_ids"].clone()
    labels = torch.full_like(ids, -100)
    labels[:, 5:7] = ids[:, 5:7]
    ids[:, 5:7] = MASK
    return ids, labels


def coupled_model(folder) -> CoDDModel:
    return CoDDModel.from_backbone(folder, random_head(128, mask_token_id=MASK))


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_resized_embeddings_keep_the_logits_of_the_old_tokens(folder, oracle):
    model = CoDDModel.from_backbone(folder)
    model.resize_token_embeddings(140)
    logits = model(oracle["input_ids"]).logits
    assert logits.shape[-1] == model.config.vocab_size == 140
    assert torch.allclose(logits[..., :128], oracle["logits"], atol=1e-5)


@OLDER_NAME
def test_gradient_checkpointing_recomputes_layers_and_changes_no_number(folder, oracle):
    ids, labels = masked_pair(oracle)
    plain = coupled_model(folder).train()
    plain(ids, labels=labels).loss.backward()
    model = coupled_model(folder).train()
    model.gradient_checkpointing_enable()
    passes = []
    projection = model.backbone.model.layers[0].self_attn.q_proj
    projection.register_forward_hook(lambda *_: passes.append(1))
    output = model(ids, labels=labels)
    assert len(passes) == 1
    output.loss.backward()
    assert len(passes) == 2
    found, wanted = gradients(model), gradients(plain)
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[name], wanted[name], atol=1e-6) for name in found)
    logits = model(oracle["input_ids"]).logits
    assert torch.allclose(logits, oracle["logits"], atol=1e-5)


@pytest.mark.parametrize(
    ("folder", "where"),
    [("llada", "some layers on disk"), ("dream", "all on disk"), ("llada", "hooks")],
    indirect=["folder"],
)
def test_offloaded_backbone_gives_the_same_logits_and_decodes(where, folder, oracle, tmp_path):
    head = random_head(128, mask_token_id=MASK)
    if where == "hooks":
        backbone = CoDDModel.from_backbone(folder).backbone
        cpu_offload(backbone, execution_device="cpu")
        model = CoDDModel.from_backbone(backbone, head)
    else:
        names = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.layers.2")
        names = (*names, "model.norm", "model.rotary_emb", "lm_head")
        device_map = {
            "all on disk": {"": "disk"},
            "some layers on disk": {n: "disk" if n[-1] in "02d" else "cpu" for n in names},
        }[where]
        model = CoDDModel.from_backbone(
            folder, head, device_map=device_map, offload_folder=tmp_path / "offload"
        )
    assert any(p.is_meta for p in model.backbone.parameters())
    assert not any(p.is_meta for p in model.coupling_head.parameters())
    assert torch.allclose(model(oracle["input_ids"]).logits, oracle["logits"], atol=1e-5)
    ids, _ = masked_pair(oracle)
    coupled = model(ids, coupling="marginal").logits
    assert torch.allclose(coupled, coupled_model(folder)(ids, coupling="marginal").logits)
    pipe = CoDDPipeline(model, CoDDScheduler())
    settings = {"gen_length": 4, "block_length": 4, "num_inference_steps": 2}
    found = pipe(input_ids=[[5, 6, 7]], output_type="seq", temperature=0.0, **settings)
    assert not (found.sequences == MASK).any()
    if where == "hooks":
        return
    coupled_model(folder).save_pretrained(tmp_path / "saved")
    device_map = {"backbone": "disk", "coupling_head": "cpu"}
    model = CoDDModel.from_pretrained(
        tmp_path / "saved", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert torch.allclose(model(oracle["input_ids"]).logits, oracle["logits"], atol=1e-5)


@pytest.mark.parametrize(
    ("folder", "library"),
    [("llada", "optimum.quanto"), ("dream", "torchao")],
    indirect=["folder"],
)
def test_quantized_backbone_stays_close_to_the_exact_one(library, folder, oracle):
    pytest.importorskip(library)
    if library == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        config = TorchAoConfig(Int8WeightOnlyConfig())
    else:
        from transformers import QuantoConfig

        config = QuantoConfig(weights="int8")
    model = CoDDModel.from_backbone(
        folder, random_head(128, mask_token_id=MASK), quantization_config=config
    )
    weight = model.backbone.model.layers[0].self_attn.q_proj.weight
    assert type(weight) is not torch.nn.Parameter
    difference = (model(oracle["input_ids"]).logits - oracle["logits"]).abs()
    assert 0 < difference.mean() < 0.02
    ids, _ = masked_pair(oracle)
    coupled = model(ids, coupling="marginal").logits
    exact = coupled_model(folder)(ids, coupling="marginal").logits
    likely = exact > -10
    assert (coupled - exact)[likely].abs().max() < 0.2


@OLDER_NAME
@pytest.mark.parametrize(
    ("folder", "on"),
    [("llada", "model"), ("dream", "language model"), ("llada", "backbone")],
    indirect=["folder"],
)
def test_lora_trains_and_starts_from_the_same_logits(on, folder, oracle):
    ids, labels = masked_pair(oracle)
    model = coupled_model(folder)
    task = {"task_type": "CAUSAL_LM"} if on == "language model" else {}
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], r=2, **task)
    if on == "backbone":
        model.coupling_head.requires_grad_(False)
        model.backbone.requires_grad_(False)
        add_adapter(model.backbone, lora, "default")
        trained = model
    else:
        trained = get_peft_model(model, lora)
    logits = trained(input_ids=oracle["input_ids"]).logits
    assert torch.allclose(logits, oracle["logits"], atol=1e-5)
    trained.train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    trained(input_ids=ids, labels=labels).loss.backward()
    found = gradients(trained)
    assert len(found) == 12  # two matrices, two projections, three layers
    assert all("lora_" in name for name in found)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if name in found:
                parameter.add_(0.1 * torch.ones_like(parameter))
    trained.eval()
    assert (trained(input_ids=ids).logits - coupled_model(folder)(ids).logits).abs().max() > 1e-3
