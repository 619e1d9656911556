"""What a run begins with: examples, and a backbone with its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..coupling.adapters import active_adapter
from ..data.canvases import Example, TokenizedExample, load_examples, tokenize_examples
from ..data.rows import RowReport
from ..data.tasks import TASKS
from ..data.tokenizers import train_tokenizer
from ..hub.repositories import locate
from ..modeling_codd import CoDDModel
from ..pipelines.pipeline_codd import CoDDPipeline
from .fits.pretraining import small_backbone_config
from .settings import TrainConfig

OF_THE_DATA = (
    "prompt_column",
    "answer_column",
    "remove_pattern",
    "dataset_config",
    "sample_by",
    "skip_bad_rows",
)
Parts = tuple[Sequence[Example], Sequence[Example], Sequence[Example]]
"""Training, validation and test examples."""


def load_parts(config: TrainConfig) -> Parts:
    """The examples of a run.

    Raises:
        FileNotFoundError: the dataset is not there.
        ValueError: it cannot be used.
    """
    options = {name: getattr(config, name) for name in OF_THE_DATA}
    if config.dataset == TASKS and not config.split.startswith("train"):
        raise ValueError(f"`split` of {TASKS!r} must be a part of 'train', got {config.split!r}.")
    examples = load_examples(config.dataset, split=config.split, **options)
    if config.dataset != TASKS:
        return split_examples(examples, config.num_validation, config.num_test)
    sizes = {"validation": config.num_validation, "test": config.num_test}
    held_out = [
        load_examples(TASKS, split=f"{name}[:{size}]", **options) if size else []
        for name, size in sizes.items()
    ]
    return examples, *held_out


def split_examples(examples: Sequence[Example], num_validation: int, num_test: int) -> Parts:
    """Parts of examples; the last ones are held out.

    Raises:
        ValueError: nothing is left to train on, or nothing to validate on.
    """
    first, last = len(examples) - num_validation - num_test, len(examples) - num_test
    if not 0 < first < last <= len(examples):
        raise ValueError(
            f"`num_validation` ({num_validation}) and `num_test` ({num_test}) must hold out at "
            f"least one and fewer than all of the {len(examples)} examples."
        )
    return examples[:first], examples[first:last], examples[last:]


def load_start(name: str) -> tuple[CoDDModel, PreTrainedTokenizerBase]:
    """A backbone without a head, in float32, and its tokenizer.

    Args:
        name: a folder or Hub id of a backbone, or of a CoDD model, pipeline or head, of which the
            backbone is taken.

    Raises:
        OSError: nothing is found.
        ValueError: the backbone carries a LoRA, or there is no tokenizer.
    """
    if locate(name).config.get("model_type") not in ("codd", "codd-head"):
        model = CoDDModel.from_backbone(name, dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(name)
    pipe = CoDDPipeline.from_pretrained(name, dtype=torch.float32)
    if active_adapter(pipe.model) is not None:
        raise ValueError(
            f"`backbone` {name!r} carries a LoRA: merge it (`model.backbone.merge_adapter`) and "
            "save the backbone, or name the backbone that it was made for."
        )
    if pipe.tokenizer is None:
        raise ValueError(f"`backbone` {name!r} has no tokenizer: save one beside the model.")
    mask_token_id = pipe.model.config.mask_token_id
    return CoDDModel.from_backbone(pipe.model.backbone, mask_token_id=mask_token_id), pipe.tokenizer


def new_backbone(
    config: TrainConfig, examples: Sequence[Example]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A small backbone with random weights, and a tokenizer of the examples."""
    texts = [message["content"] for e in examples for message in e.messages]
    tokenizer = train_tokenizer(texts + [e.answer for e in examples], config.vocab_size)
    shape = small_backbone_config(tokenizer, config.hidden_size, config.num_layers)
    torch.manual_seed(config.pretraining.seed)
    # The eager path's backward pass is the faster one in bf16 on CPUs.
    attention = "eager" if not torch.cuda.is_available() else None
    return AutoModelForCausalLM.from_config(shape, attn_implementation=attention), tokenizer


def mask_token_of(config: TrainConfig, model: CoDDModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The mask token: the settings', the model's or the tokenizer's.

    Raises:
        ValueError: none of them names one.
    """
    named = (config.mask_token_id, model.config.mask_token_id, tokenizer.mask_token_id)
    found = next((token for token in named if token is not None), None)
    if found is None:
        raise ValueError("`mask_token_id` must be given: the tokenizer has no mask token.")
    if found >= model.config.vocab_size:
        raise ValueError(
            f"`mask_token_id` must be one of the backbone's {model.config.vocab_size} tokens, got "
            f"{found}."
        )
    return found


def never_generated(tokenizer: PreTrainedTokenizerBase, mask_token_id: int) -> set[int]:
    """Padding, mask and all special tokens but end-of-text, and the token of unknown characters."""
    never = {mask_token_id, tokenizer.pad_token_id, *tokenizer.all_special_ids}
    return never - {tokenizer.eos_token_id, None}


def tokenize_parts(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, mask_token_id: int, parts: Parts
) -> list[list[TokenizedExample]]:
    """Each part of the examples, tokenized as the run's settings say."""
    return [
        tokenize_examples(
            part,
            tokenizer,
            config.max_length,
            packing=config.packing,
            mask_token_id=mask_token_id,
            never=never_generated(tokenizer, mask_token_id),
            report=RowReport(repr(config.dataset), config.skip_bad_rows),
        )
        for part in parts
    ]
