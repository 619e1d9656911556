"""The backbone that all baselines share, and the canvases that it reads."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from codd_hf import CoDDPipeline
from codd_hf.backbones import BackboneStates
from codd_hf.data.tasks import Task


class Backbone:
    """A frozen masked diffusion model with its tokenizer.

    Args:
        pipeline: holds both; its head is left out.

    Attributes:
        window: tokens of a window.
        num_windows: of an answer, as many as the pipeline generates by default.
        never: `[n]`, tokens that are never generated; the mask token is one.
    """

    def __init__(self, pipeline: CoDDPipeline) -> None:
        self.pipeline, self.model, self.tokenizer = pipeline, pipeline.model, pipeline.tokenizer
        self.model.eval().requires_grad_(False)
        self.window, self.mask_id = self.model.window_length, self.model.mask_token_id
        self.num_windows = -(-pipeline.generation_config.max_new_tokens // self.window)
        self.end_id, self.pad_id = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        special = {*self.tokenizer.all_special_ids, self.mask_id} - {self.end_id}
        self.never = torch.tensor(sorted(special))
        self.hidden_size = self.model.config.text_config.hidden_size

    def with_model(self, model: nn.Module) -> Backbone:
        """The same with another model's predictions."""
        other = copy.copy(self)
        other.model = model
        return other

    def read(self, canvas: Canvas) -> BackboneStates:
        """One pass over a canvas."""
        return self.model.backbone_states(canvas.tokens, canvas.real.long())

    def log_probs(self, logits: torch.Tensor) -> torch.Tensor:
        """Log-probabilities `[..., vocab]` in which no special token but the end has any."""
        return logits.float().index_fill(-1, self.never, -torch.inf).log_softmax(-1)

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits `[..., vocab]` of last hidden states `[..., hidden]`."""
        return self.model.get_output_embeddings()(hidden)

    def prompt(self, question: str) -> list[int]:
        """The tokens of a question in the chat template."""
        chat = [{"role": "user", "content": question}]
        encoded = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True)
        return encoded["input_ids"]

    def text(self, tokens: torch.Tensor) -> str:
        """The text of generated tokens `[n]` up to the first end token."""
        ended = (tokens == self.end_id).nonzero()
        return self.tokenizer.decode(tokens[: int(ended[0])] if len(ended) else tokens)


def load_backbone(name: str) -> Backbone:
    """The backbone in the folder of a pipeline, of a model or of a bare backbone."""
    pipeline = CoDDPipeline.from_pretrained(name)
    pipeline.set_progress_bar_config(disable=True)
    return Backbone(pipeline)


@dataclass
class Canvas:
    """Rows `[prompt][answer][padding]`.

    Attributes:
        tokens: `[batch, length]`.
        real: `[batch, length]` bool, False at padding.
        start: `[batch]`, where the answers begin.
    """

    tokens: torch.Tensor
    real: torch.Tensor
    start: torch.Tensor

    def rows(self, index: torch.Tensor) -> Canvas:
        """Some of the rows."""
        return Canvas(self.tokens[index], self.real[index], self.start[index])

    def with_tokens(self, tokens: torch.Tensor) -> Canvas:
        """The same rows with other tokens."""
        return Canvas(tokens, self.real, self.start)


def lay_out(
    backbone: Backbone, prompts: Sequence[list[int]], answers: Sequence[list[int]]
) -> Canvas:
    """Canvases of prompts and answers."""
    rows = [torch.tensor([*p, *a]) for p, a in zip(prompts, answers, strict=True)]
    tokens = pad_sequence(rows, batch_first=True, padding_value=backbone.pad_id)
    real = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).bool()
    return Canvas(tokens, real, torch.tensor([len(p) for p in prompts]))


def to_fill(backbone: Backbone, prompts: Sequence[list[int]]) -> Canvas:
    """Canvases whose answers are mask tokens."""
    masks = [backbone.mask_id] * backbone.num_windows * backbone.window
    return lay_out(backbone, prompts, [masks] * len(prompts))


def answer_canvas(backbone: Backbone, tasks: Sequence[Task]) -> Canvas:
    """Canvases of right answers; end tokens fill the windows, one at least."""
    size = backbone.num_windows * backbone.window
    texts = [task.answer for task in tasks]
    answers = backbone.tokenizer(texts, add_special_tokens=False)["input_ids"]
    filled = [(answer[: size - 1] + [backbone.end_id] * size)[:size] for answer in answers]
    return lay_out(backbone, [backbone.prompt(task.question) for task in tasks], filled)
