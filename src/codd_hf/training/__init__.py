"""Fits of circuits and backbones: `run.train` is the whole way, each stage also stands alone."""

from __future__ import annotations

import importlib

_EXPORTS = {
    "ConditionalConfig": ".stage_settings",
    "DataCollatorForMaskedDiffusion": "..data.collator",
    "GenerativeConfig": ".stage_settings",
    "JointConfig": ".stage_settings",
    "PretrainingConfig": ".stage_settings",
    "TrainConfig": ".settings",
    "add_lora": ".fits.lora",
    "Checkpoints": ".loop.checkpoints",
    "fit_backbone": ".fits.pretraining",
    "fit_conditional": ".fits.conditional",
    "fit_generative": ".fits.generative",
    "fit_joint": ".fits.joint",
    "fit_head": ".fits.conditional",
    "load_examples": "..data.sources",
    "train": ".run",
    "train_tokenizer": "..data.tokenizers",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name], __name__), name)
