"""Promises of speed on processors without bf16 arithmetic: nothing computes in it unasked."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from codd_hf.runtime import precision
from codd_hf.training import JointConfig, PretrainingConfig, fit_joint, train
from codd_hf.training.fits.pretraining import FloatMuon
from tiny import correlated_examples, tiny_model

CPU = torch.device("cpu")


class HalfProducts(TorchDispatchMode):
    """Records the products in half precision."""

    def __init__(self):
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        if "mm" in func.__name__ or "dot_product" in func.__name__ or "linear" in func.__name__:
            halves = (torch.bfloat16, torch.float16)
            self.found |= {func.__name__ for t in tensors if t.dtype in halves}
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=[True, False], ids=["with bf16", "without bf16"])
def has_bf16(request, monkeypatch):
    monkeypatch.setattr(precision, "computes_bf16", lambda device: request.param)
    return request.param


@pytest.mark.parametrize(
    ("capabilities", "has"),
    [
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False}, False),
        ({"avx512_bf16": True}, True),
        ({"amx_tile": True, "amx_int8": True}, False),
        ({"amx_bf16": True}, True),
        ({"neon": True, "bf16": True}, True),
        ({}, False),
    ],
)
def test_processor_is_asked_what_it_has(capabilities, has, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(precision, "onednn_has_bf16", lambda: True)
    assert precision.computes_bf16("cpu") is has
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not precision.computes_bf16(CPU)


def test_processor_whose_products_are_limited_to_older_instructions_has_none():
    asked = "from codd_hf.runtime.precision import computes_bf16; print(computes_bf16('cpu'))"
    limit = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    told = subprocess.run([sys.executable, "-c", asked], env=limit, capture_output=True, text=True)
    if platform.machine() in ("x86_64", "AMD64"):
        assert told.stdout.split() == ["False"]


def test_gpu_is_asked_without_its_emulation_and_what_cannot_be_asked_has_none(monkeypatch):
    asked = []

    def is_bf16_supported(including_emulation: bool = True) -> bool:
        asked.append(including_emulation)
        return including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert not precision.computes_bf16("cuda:0")
    assert asked == [False]
    assert not precision.computes_bf16("mps")


def test_choice_is_the_devices_unless_it_is_made_and_is_said(has_bf16):
    assert precision.chosen_precision("auto", CPU) == ("bf16" if has_bf16 else "no")
    for asked in ("no", "bf16"):
        assert precision.chosen_precision(asked, CPU) == asked
    note = precision.precision_note(precision.chosen_precision("auto", CPU), CPU)
    insisted = precision.precision_note("bf16", CPU)
    if has_bf16:
        assert note == insisted == "Mixed precision is bf16: this cpu has it."
    else:
        assert note.startswith("Mixed precision is off, as this cpu has no bf16 arithmetic")
        assert insisted == "Mixed precision is bf16: this cpu only emulates it, which is slow."


def test_default_training_computes_in_bf16_only_where_the_processor_does(
    has_bf16, trained_config, tmp_path, capsys
):
    config = replace(
        trained_config,
        output_dir=str(tmp_path),
        pretraining=replace(
            trained_config.pretraining,
            max_steps=2,
            mixed_precision=PretrainingConfig().mixed_precision,
        ),
        generative=replace(trained_config.generative, num_epochs=1),
        conditional=replace(trained_config.conditional, max_steps=2),
        num_gap_problems=2,
    )
    with HalfProducts() as products:
        train(config)
    assert bool(products.found) is has_bf16, products.found
    assert capsys.readouterr().out.count("Mixed precision is") == 1


def test_every_stage_takes_auto(has_bf16, tiny_tokenizer, trained_config):
    model = tiny_model("llama", len(tiny_tokenizer), mask_token_id=1)
    config = JointConfig(
        mixed_precision="auto", max_steps=1, windows_per_batch=4, num_validation_draws=1
    )
    with HalfProducts() as products:
        fit_joint(model, tiny_tokenizer, correlated_examples(8), correlated_examples(4), config)
    assert bool(products.found) is has_bf16


@pytest.mark.parametrize("shape", [(6, 4), (1, 3)])
def test_muon_in_float32_makes_the_steps_of_pytorchs_but_for_rounding(shape):
    torch.manual_seed(0)
    start = torch.randn(shape)
    gradients = [torch.randn(shape) for _ in range(3)]
    ends, states = [], []
    for kind in (torch.optim.Muon, FloatMuon):
        matrix = torch.nn.Parameter(start.clone())
        options = {"lr": 0.1, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
        optimizer = kind([matrix], **options)
        for gradient in gradients:
            matrix.grad = gradient.clone()
            optimizer.step()
        ends.append(matrix.detach())
        states.append(optimizer.state_dict()["state"][0]["momentum_buffer"])
    assert torch.allclose(*ends, atol=5e-3)
    assert (ends[1] - start).abs().max() > 0.05
    assert torch.equal(*states)
