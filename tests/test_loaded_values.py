"""Promises that what is loaded is what was stored, wherever and in whichever dtype it is put."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM
from transformers.initialization import guard_torch_init_functions

from codd_hf import CoDDHead, CoDDModel, CoDDPipeline, CoDDScheduler
from tiny import head_config, random_head, tiny_backbone, tiny_model

CONDITIONING = ["latent", "copy"]


def conditioned_head(**changes) -> CoDDHead:
    given = {"conditioning": CONDITIONING, "context_size": 16}
    head = random_head(**given, **changes)
    with torch.no_grad():
        head.token_marginal.copy_(torch.arange(1.0, 13).div(78))
        maps = head.context_maps
        maps.suggested.copy_(torch.arange(maps.suggested.numel()).view_as(maps.suggested) * 7 % 3)
        maps.log_suggested.normal_()
        maps.log_occupancy.normal_()
    return head


def stored(head: CoDDHead) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in head.state_dict().items()}


def differing(head: CoDDHead, expected: dict[str, torch.Tensor]) -> list[str]:
    """Names of what is not as stored; what is offloaded to disk has no value to compare."""
    found = head.state_dict()
    assert found.keys() == expected.keys()
    return [
        name
        for name, tensor in found.items()
        if tensor.device.type != "meta" and not torch.equal(tensor, expected[name])
    ]


@pytest.fixture
def model_folder(tmp_path):
    model = CoDDModel.from_backbone(tiny_backbone(), conditioned_head())
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model", stored(model.coupling_head)


@pytest.mark.parametrize(
    "placement",
    [
        {"backbone": "cpu", "coupling_head": "disk"},
        {"backbone": "disk", "coupling_head": "cpu"},
        "cpu",
        None,
    ],
)
def test_head_has_the_stored_values_wherever_its_parts_are_put(placement, model_folder, tmp_path):
    folder, expected = model_folder
    placed = {"device_map": placement, "offload_folder": tmp_path / "offload"}
    model = CoDDModel.from_pretrained(folder, **(placed if placement else {}))
    assert not differing(model.coupling_head, expected)
    ids = torch.tensor([[3, 4, 5, 2, 2, 2, 2]])
    here = CoDDModel.from_pretrained(folder)
    assert torch.equal(
        model(ids, coupling="marginal").logits, here(ids, coupling="marginal").logits
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "auto"])
def test_head_has_the_stored_values_whatever_dtype_is_asked_for(dtype, model_folder):
    folder, expected = model_folder
    for loaded in (
        CoDDModel.from_pretrained(folder, dtype=dtype).coupling_head,
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).coupling_head,
        CoDDHead.from_pretrained(folder, dtype=dtype),
    ):
        assert not differing(loaded, expected)


def test_head_has_the_stored_values_while_other_threads_make_models(tmp_path):
    head = conditioned_head()
    head.save_pretrained(tmp_path)
    expected, stop, wrong = stored(head), threading.Event(), []

    def make_models() -> None:
        while not stop.is_set():
            with guard_torch_init_functions():
                pass
            CoDDHead(head_config())

    def load() -> None:
        for _ in range(8):
            wrong.extend(differing(CoDDHead.from_pretrained(tmp_path), expected))

    maker = threading.Thread(target=make_models)
    loaders = [threading.Thread(target=load) for _ in range(3)]
    for thread in (maker, *loaders):
        thread.start()
    for thread in loaders:
        thread.join()
    stop.set()
    maker.join()
    assert not wrong


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_new_head_is_float32_whatever_dtype_is_asked_for(dtype):
    config = head_config(conditioning=CONDITIONING, context_size=16)
    model = CoDDModel._from_config(tiny_model().config, dtype=dtype)
    assert model.backbone.dtype == dtype
    heads = [
        CoDDHead._from_config(config, dtype=dtype),
        AutoModel.from_config(config, dtype=dtype),
        CoDDHead(config).to(dtype),
        model.coupling_head,
    ]
    torch.set_default_dtype(dtype)
    try:
        heads.append(CoDDHead(config))
    finally:
        torch.set_default_dtype(torch.float32)
    for head in heads:
        floating = {t.dtype for t in head.state_dict().values() if t.is_floating_point()}
        assert floating == {torch.float32}


def test_pipeline_is_saved_and_loaded_as_a_variant(tmp_path):
    pipe = CoDDPipeline(tiny_model(), CoDDScheduler())
    pipe.save_pretrained(tmp_path, variant="fp16")
    names = {path.name for path in (tmp_path / "model").glob("*.safetensors")}
    assert names == {"model.fp16.safetensors"}
    loaded = CoDDPipeline.from_pretrained(tmp_path, variant="fp16")
    assert not differing(loaded.model.coupling_head, stored(pipe.model.coupling_head))
    with pytest.raises(OSError, match=r"model\.safetensors"):
        CoDDPipeline.from_pretrained(tmp_path)
