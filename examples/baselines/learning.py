"""What the baselines learn from, and how: training tasks, noise, and AdamW by processor seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import torch
from common import Backbone, Canvas, answer_canvas
from torch import nn

from codd_hf.data.tasks import Task, draw_tasks


def training_tasks(seed: int, size: int) -> Iterator[list[Task]]:
    """Batches of training tasks without end."""
    tasks = draw_tasks("train", f"baselines {seed}")
    while True:
        yield list(islice(tasks, size))


def masked_window(
    backbone: Backbone, tasks: Sequence[Task], generator: torch.Generator
) -> tuple[Canvas, Canvas, torch.Tensor]:
    """What decoding meets: a window with some tokens in place, text before it, masks behind it.

    Returns:
        The right answers; the same with masks; `[batch]`, where the windows begin.
    """
    truth = answer_canvas(backbone, tasks)
    place, number = torch.arange(truth.tokens.shape[1]), len(tasks)
    ends = (truth.tokens == backbone.end_id) & (place >= truth.start[:, None])
    windows = (ends.long().argmax(-1) - truth.start) // backbone.window + 1
    index = (torch.rand(number, generator=generator) * windows).long()
    first = truth.start + index * backbone.window
    open_ = torch.randint(1, backbone.window + 1, (number, 1), generator=generator)
    rank = torch.rand(number, backbone.window, generator=generator).argsort(-1).argsort(-1)
    masked = (place >= first[:, None]) & truth.real
    masked.scatter_(1, first[:, None] + torch.arange(backbone.window), rank < open_)
    return truth, truth.with_tokens(truth.tokens.masked_fill(masked, backbone.mask_id)), first


def fit(
    module: nn.Module,
    loss_of_step: Callable[[], torch.Tensor | None],
    seconds: float,
    learning_rate: float,
) -> None:
    """AdamW on a module's parameters for so many processor seconds.

    The rate rises over the first 2 % of the time and falls to 0 over the rest. Where there is no
    loss, there is no step.
    """
    parameters = list(module.train().requires_grad_(True).parameters())
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    began = time.process_time()
    while (done := (time.process_time() - began) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(done / 0.02, (1 - done) / 0.98)
        loss = loss_of_step()
        if loss is None:
            continue
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    module.eval().requires_grad_(False)
