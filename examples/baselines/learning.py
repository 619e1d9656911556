"""What the baselines learn from, and how: training tasks, noise, and AdamW by processor seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import torch
from common import Backbone, Canvas, answer_canvas

from codd_hf.data.tasks import KINDS, Task, draw_tasks


def training_tasks(seed: int, size: int, of_one_kind: bool = False) -> Iterator[list[Task]]:
    """Batches of training tasks without end, of all kinds or of one kind each."""
    mixed = draw_tasks("train", f"baselines {seed}")
    streams = {kind: draw_tasks("train", f"baselines {seed}", [kind]) for kind in KINDS}
    while True:
        tasks = list(islice(mixed, size))
        yield list(islice(streams[tasks[0].kind], size)) if of_one_kind else tasks


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
    parameters: Sequence[torch.Tensor],
    loss_of_step: Callable[[], torch.Tensor | None],
    seconds: float,
    learning_rate: float,
) -> list[float]:
    """AdamW for so many processor seconds; returns the losses.

    The rate rises over the first 2 % of the time and falls to 0 over the rest. Where there is no
    loss, there is no step.
    """
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    began, losses = time.process_time(), []
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
        losses.append(loss.item())
    return losses
