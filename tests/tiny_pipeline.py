"""A pipeline of random weights on disk, for tests that start commands."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from codd_hf import CoDDModel, CoDDPipeline, CoDDScheduler
from codd_hf.data.tasks import draw_tasks
from codd_hf.data.tokenizers import train_tokenizer
from tiny import SENTENCES, random_head, tiny_backbone


def tiny_pipeline(**scheduler) -> CoDDPipeline:
    """A chat template, a window of 4 tokens, 128 positions; any byte comes out, but no end."""
    tokenizer = train_tokenizer(SENTENCES, vocab_size=300)
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    forbidden = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    head = random_head(
        len(tokenizer),
        num_latents=5,
        mask_token_id=tokenizer.mask_token_id,
        forbidden_token_ids=sorted(forbidden),
    )
    model = CoDDModel.from_backbone(tiny_backbone("llama", len(tokenizer), **special), head)
    pipe = CoDDPipeline(model=model, scheduler=CoDDScheduler(**scheduler), tokenizer=tokenizer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_task_pipeline(network: dict | None = None, **head) -> CoDDPipeline:
    """A tokenizer of the package's tasks, answers of a window of 32; weights far from uniform."""
    tasks = list(islice(draw_tasks("train", 0), 300))
    tokenizer = train_tokenizer([f"{task.question} {task.answer}" for task in tasks], 400)
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = {"max_position_embeddings": 256} | (network or {})
    circuit = random_head(
        len(tokenizer),
        window_length=32,
        mask_token_id=tokenizer.mask_token_id,
        forbidden_token_ids=sorted({*tokenizer.all_special_ids} - {tokenizer.eos_token_id}),
        **head,
    )
    backbone = tiny_backbone("llama", len(tokenizer), **sizes, **special)
    pipe = CoDDPipeline(CoDDModel.from_backbone(backbone, circuit), CoDDScheduler(), tokenizer)
    pipe.model.generation_config.max_new_tokens = 32
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_tiny_pipeline(folder: Path) -> Path:
    """Saved with settings under which the seed decides the text."""
    tiny_pipeline(sampling="latent", temperature=1.0).save_pretrained(folder)
    return folder
