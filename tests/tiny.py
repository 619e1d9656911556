"""Tiny real components: random backbones, random heads, and enumeration to check them with."""

from __future__ import annotations

import itertools
import random

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from codd_hf import CoDDHead, CoDDHeadConfig, CoDDModel
from codd_hf.checks.settings import settings_of
from codd_hf.data.canvases import TokenizedExample
from codd_hf.schedulers.settings import DrawSettings

SENTENCES = [
    "Tom has 3 boxes of eggs and sells 4 eggs.",
    "Ann buys 12 red apples and eats 5 apples.",
    "How many eggs are left? He has 7 eggs.",
]
SAMPLING = settings_of(DrawSettings)["sampling"].choices
STRATEGIES = settings_of(DrawSettings)["strategy"].choices
BACKBONES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "bert": (BertConfig, BertForMaskedLM),
    "roberta": (RobertaConfig, RobertaForMaskedLM),
}


def tiny_backbone(kind: str = "llama", vocab_size: int = 12, **changes) -> PreTrainedModel:
    """A random backbone whose predictions are far from uniform; token 0 is padding."""
    torch.manual_seed(0)
    config_class, model_class = BACKBONES[kind]
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.4,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    return model_class(config_class(**(sizes | changes))).eval()


def head_config(vocab_size: int = 12, **changes) -> CoDDHeadConfig:
    sizes = {"num_latents": 3, "window_length": 4, "mask_token_id": 2}
    return CoDDHeadConfig(vocab_size=vocab_size, **(sizes | changes))


def random_head(vocab_size: int = 12, seed: int = 1, **changes) -> CoDDHead:
    """A head with random potentials, far from uniform."""
    head = CoDDHead(head_config(vocab_size, **changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(1.5 * torch.randn(parameter.shape, generator=generator))
    return head


def tiny_model(kind: str = "llama", vocab_size: int = 12, **head_changes) -> CoDDModel:
    return CoDDModel.from_backbone(
        tiny_backbone(kind, vocab_size), random_head(vocab_size, **head_changes)
    )


def enumerate_window(
    head: CoDDHead, logits: torch.Tensor, tokens: torch.Tensor, mask_token_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """All completions `[N, L]` of a window `[L]` and their probabilities `[N]`, by definition.

    Sums over all latent paths and all completions in float64; the mask token has no probability.
    """
    vocab_size = logits.shape[-1]
    masked = (tokens == mask_token_id).nonzero()[:, 0].tolist()
    completions = []
    for values in itertools.product(range(vocab_size), repeat=len(masked)):
        completion = tokens.clone()
        completion[masked] = torch.tensor(values, dtype=torch.long)
        completions.append(completion)
    completions = torch.stack(completions)
    phi = logits.detach().double()
    phi = phi.index_fill(-1, torch.tensor([mask_token_id]), -torch.inf).softmax(-1)
    initial, transition, emission = (t.double().exp() for t in head.potentials.tensors())
    weights = torch.zeros(len(completions), dtype=torch.float64)
    for path in itertools.product(range(head.config.num_latents), repeat=len(tokens)):
        weight = initial[path[0]].expand(len(completions)).clone()
        for i, state in enumerate(path):
            if i > 0:
                weight *= transition[min(i - 1, len(transition) - 1), path[i - 1], state]
            weight *= emission[min(i, len(emission) - 1), state, completions[:, i]]
        weights += weight
    for i in masked:
        weights *= phi[i, completions[:, i]]
    return completions, (weights / weights.sum()).detach()


def correlated_examples(number: int, seed: int = 0) -> list[TokenizedExample]:
    """Answers of pairs that only make sense together: (10, 14), (11, 15), (12, 16), (13, 17).

    For `tiny_tokenizer`, whose special tokens are 0 (padding), 1 (mask) and 2 (end-of-text).
    """
    draw = random.Random(seed)
    answers = []
    for _ in range(number):
        firsts = [draw.randrange(10, 14) for _ in range(4)]
        answers.append([token for first in firsts for token in (first, first + 4)])
    return [TokenizedExample([18], [*answer, 2]) for answer in answers]


class Interrupted(list):
    """Examples that interrupt the run after `reads` of them were read."""

    def __init__(self, examples, reads: int):
        super().__init__(examples)
        self.reads = reads

    def __getitem__(self, index):
        self.reads -= 1
        if self.reads < 0:
            raise KeyboardInterrupt
        return super().__getitem__(index)
