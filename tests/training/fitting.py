"""A model to fit, and histories to compare."""

from __future__ import annotations

import torch

from codd_hf import CoDDModel
from tiny import random_head, tiny_backbone

CONTEXT = {"context_size": 16, "copy_length": 6, "copy_size": 8}


def new_model(tokenizer, conditioning=(), backbone=None, **head) -> CoDDModel:
    """A tiny backbone that says something, with a head that is not yet good."""
    vocab = len(tokenizer)
    sizes = {"vocab_size": vocab, "pad_token_id": 0, "eos_token_id": 2, "initializer_range": 0.1}
    context = CONTEXT | {"conditioning": list(conditioning)} if conditioning else {}
    made = random_head(vocab, **({"mask_token_id": 1, "num_latents": 6} | context | head))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(0.3)
    return CoDDModel.from_backbone(tiny_backbone(**(sizes | (backbone or {}))), made)


def untimed(history) -> list[dict]:
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in history]


def equal_states(one, other) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][name], states[1][name]) for name in states[0]
    )
