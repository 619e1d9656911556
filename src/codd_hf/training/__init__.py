"""Fits of circuits and backbones: `run.train` is the whole way, each stage also stands alone."""

import importlib
from typing import Any

_EXPORTS = {
    "Checkpoints": ".checkpoints",
    "ConditionalConfig": ".settings",
    "DataCollatorForMaskedDiffusion": "..data.collator",
    "GenerativeConfig": ".settings",
    "JointConfig": ".settings",
    "PretrainingConfig": ".settings",
    "TrainConfig": ".settings",
    "add_lora": ".fits.joint",
    "fit_backbone": ".fits.pretraining",
    "fit_conditional": ".fits.conditional",
    "fit_generative": ".fits.generative",
    "fit_joint": ".fits.joint",
    "load_examples": "..data.sources",
    "train": ".run",
    "train_tokenizer": "..data.tokenizers",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name], __name__), name)
