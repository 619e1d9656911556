"""What a run begins with: examples, tasks without end, and a backbone with its tokenizer."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerBase

from ..backbones import noise_of
from ..coupling.adapters import active_adapter
from ..data.canvases import TokenizedExample, tokenize_examples
from ..data.sources import Example, RowReport, load_examples
from ..data.tasks import TASKS, draw_tasks, kind_names
from ..data.tokenizers import train_tokenizer
from ..modeling_codd import CoDDModel
from ..pipelines.pipeline_codd import CoDDPipeline
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
STRETCH = 16
"""Batches of tasks that are drawn together, so that tasks of like length share one."""
DRAWN = 256
"""Tasks that are tokenized at once."""


class Start(NamedTuple):
    """A backbone without a head, which knows its mask token, if it has any, and its tokenizer."""

    model: CoDDModel
    tokenizer: PreTrainedTokenizerBase


def load_parts(config: TrainConfig) -> Parts:
    """The examples of a run."""
    options = {name: getattr(config, name) for name in OF_THE_DATA}
    if config.dataset != TASKS:
        examples = load_examples(config.dataset, split=config.split, **options)
        return split_examples(examples, config.num_validation, config.num_test)
    if not config.split.startswith("train"):
        raise ValueError(f"`split` of {TASKS!r} must be a part of 'train', got {config.split!r}.")
    train = load_examples(TASKS, split=config.split, **options)
    validation = load_examples(TASKS, split=f"validation[:{config.num_validation}]", **options)
    split = f"test[:{config.num_test}]"
    test = load_examples(TASKS, split=split, **options) if config.num_test else []
    return train, validation, test


def split_examples(examples: Sequence[Example], num_validation: int, num_test: int) -> Parts:
    """Parts of examples; the last ones are held out."""
    first, last = len(examples) - num_validation - num_test, len(examples) - num_test
    if not 0 < first < last <= len(examples):
        raise ValueError(
            f"`num_validation` ({num_validation}) and `num_test` ({num_test}) must hold out at "
            f"least one and fewer than all of the {len(examples)} examples."
        )
    return examples[:first], examples[first:last], examples[last:]


@dataclass(frozen=True)
class TaskStream:
    """Training tasks without end; a batch is a pure function of the arguments and its number.

    Args:
        tokenizer: of the tasks.
        kinds: names with commas between; default, all.
        max_length: longer examples are passed over.
    """

    tokenizer: PreTrainedTokenizerBase
    kinds: str | None = None
    max_length: int = sys.maxsize

    def beginning(self) -> list[TokenizedExample]:
        """A few of the tasks, which tell this stream from another one."""
        return list(islice(self._drawn("beginning"), DRAWN))

    def batches(
        self, tokens_per_batch: int, window_length: int, seed: int, first_batch: int = 0
    ) -> Iterator[list[TokenizedExample]]:
        """Batches of about `tokens_per_batch` tokens, answers counted in whole windows."""
        stretch, skipped = divmod(first_batch, STRETCH)
        while True:
            yield from self._stretch(tokens_per_batch, window_length, f"{seed} {stretch}")[skipped:]
            stretch, skipped = stretch + 1, 0

    def _stretch(self, size: int, window_length: int, seed: str) -> list[list[TokenizedExample]]:
        """`STRETCH` batches of equally many tokens, in random order."""
        examples: list[TokenizedExample] = []
        total, longest = 0, 1
        for example in self._drawn(seed):
            examples.append(example)
            length = example.length(window_length)
            total, longest = total + length, max(longest, length)
            if total >= STRETCH * max(size, longest):  # so that no batch is empty
                break
        batches: list[list[TokenizedExample]] = [[] for _ in range(STRETCH)]
        before = 0
        for example in sorted(examples, key=lambda e: e.length(window_length)):
            batches[before * STRETCH // total].append(example)
            before += example.length(window_length)
        Random(f"{seed} order").shuffle(batches)
        return batches

    def _drawn(self, seed: str) -> Iterator[TokenizedExample]:
        tasks = draw_tasks("train", f"stream {seed}", kind_names(self.kinds))
        while True:
            some = [Example(t.question, t.answer) for t in islice(tasks, DRAWN)]
            tokenized = tokenize_examples(some, self.tokenizer, None)
            yield from (e for e in tokenized if e.length() <= self.max_length)


def load_start(name: str, mask_token_id: int | None = None, noise: str | None = None) -> Start:
    """Loads a backbone, or that of a CoDD model, pipeline or head, in float32.

    The mask token is by default the model's or the tokenizer's, the noise the backbone's.
    """
    pipe: Any = CoDDPipeline.from_pretrained(name, dtype=torch.float32, forbidden_token_ids=[])
    model, tokenizer = pipe.model, pipe.tokenizer
    if active_adapter(model) is not None:
        raise ValueError(
            f"`backbone` {name!r} carries a LoRA: merge it (`model.backbone.merge_adapter`) and "
            "save the backbone, or name the backbone that it was made for."
        )
    if tokenizer is None:
        raise ValueError(f"`backbone` {name!r} has no tokenizer: save one beside the model.")
    if noise is not None:
        model.backbone.config.noise = noise
    named = [mask_token_id]
    if is_masked := noise_of(model.backbone.config) == "mask":
        named += [model.config.mask_token_id, tokenizer.mask_token_id]
    mask = next((token for token in named if token is not None), None)
    if mask is None and is_masked:
        raise ValueError(
            f"`mask_token_id` must be given (`--set mask_token_id=ID`), since `backbone` {name!r} "
            "has a tokenizer without one."
        )
    bare = CoDDModel.from_backbone(model.backbone, mask_token_id=mask)
    if model.config.canvas_length is None:  # else it has a configuration of its own
        vars(bare.generation_config).update(max_new_tokens=pipe.task()["gen_length"])
    return Start(bare, tokenizer)


def new_start(config: TrainConfig, examples: Sequence[Example]) -> Start:
    """A small backbone with random weights, and a tokenizer of the examples."""
    texts = [message["content"] for e in examples for message in e.messages]
    tokenizer = train_tokenizer(texts + [e.answer for e in examples], config.vocab_size)
    shape = small_backbone_config(tokenizer, config.hidden_size, config.num_layers)
    mask = tokenizer.mask_token_id
    if config.pretraining.noise == "uniform":
        shape.noise, mask = "uniform", None
    torch.manual_seed(config.pretraining.seed)
    # The eager path's backward pass is the faster one in bf16 on CPUs.
    attention = "eager" if not torch.cuda.is_available() else None
    backbone = AutoModelForCausalLM.from_config(shape, attn_implementation=attention)
    model = CoDDModel.from_backbone(backbone, mask_token_id=mask)
    return Start(model, tokenizer)


def small_backbone_config(
    tokenizer: PreTrainedTokenizerBase, hidden_size: int = 256, num_layers: int = 4
) -> LlamaConfig:
    """A bidirectional Llama of a few million parameters (the embedded default's shape).

    Its attention heads have 64 features, those of narrow models 32: few heads copy badly.
    """
    num_heads = max(hidden_size // (64 if hidden_size >= 256 else 32), 1)
    if hidden_size % (2 * num_heads):
        raise ValueError(
            f"`hidden_size` must give each of {num_heads} attention heads an even number of "
            f"features, got {hidden_size}: take a multiple of 32 below 256, of 64 above."
        )
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 11 // 4,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["LlamaForCausalLM"],
        is_causal=False,  # type: ignore[call-arg]  # what decoders without a causal mask are told by
    )


def never_generated(tokenizer: PreTrainedTokenizerBase, mask_token_id: int | None) -> set[int]:
    """Padding, mask and all special tokens but end-of-text, and the token of unknown characters."""
    never = {mask_token_id, tokenizer.pad_token_id, *tokenizer.all_special_ids}
    return never - {tokenizer.eos_token_id, None}


def tokenize_parts(config: TrainConfig, start: Start, parts: Parts) -> list[list[TokenizedExample]]:
    """Each part of the examples; test data too, so that bad rows are found before the training."""
    never = never_generated(start.tokenizer, start.model.config.mask_token_id)
    return [
        tokenize_examples(
            part,
            start.tokenizer,
            config.max_length,
            packing=config.packing,
            never=never,
            report=RowReport(repr(config.dataset), config.skip_bad_rows),
        )
        for part in parts
    ]
