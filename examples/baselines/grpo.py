"""Reinforcement fine-tuning of the backbone: diffu-GRPO, as in d1 (arXiv 2504.12216).

For a question a group of answers is decoded, and the checker rewards the right ones. An answer's
advantage is its reward less the group's mean. Its likelihood is that of independent tokens in a
single pass that sees no token of the answer, and only a part of the prompt: each of the updates
that follow hides another random part. The loss is the clipped surrogate of PPO on each token,
averaged over the answer, with a penalty for leaving the backbone as it was.

Differs from the paper in that all weights are trained instead of a LoRA, with a rate that falls; in
that the likelihood is taken window by window, earlier windows visible, as the backbone decodes; and
in that there is no supervised fine-tuning before, since the backbone was trained on these tasks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from common import Backbone, Canvas, to_fill
from learning import fit, training_tasks
from loop import Factorized, decode

from codd_hf import CoDDModel
from codd_hf.data.tasks import Task, is_right


@dataclass
class GRPOConfig:
    """Settings of the fine-tuning.

    Attributes:
        learning_rate: at the start.
        passes: passes a window when answers are decoded.
        temperature: when answers are decoded.
        questions: of a batch of answers.
        group: answers to each question.
        updates: steps on each batch of answers.
        prompt_masking: share of the prompt that an update hides.
        clip: bound of the change of a token's likelihood that is rewarded.
        penalty: weight of the divergence from the backbone as it was.
    """

    learning_rate: float = 3e-4
    passes: int = 8
    temperature: float = 0.9
    questions: int = 8
    group: int = 8
    updates: int = 4
    prompt_masking: float = 0.15
    clip: float = 0.5
    penalty: float = 0.04


@dataclass
class Batch:
    """Answers, and a view of them with its likelihoods before the updates.

    Attributes:
        canvas: prompts and decoded answers.
        seen: `[batch, length]`, the prompts, some of whose tokens are masked.
        advantage: `[batch]`.
        before: `[batch, n]`, log-probabilities of the answers' tokens.
        reference: `[batch, n]`, the same under the backbone as it was.
    """

    canvas: Canvas
    seen: torch.Tensor
    advantage: torch.Tensor
    before: torch.Tensor
    reference: torch.Tensor


def trainable_copy(backbone: Backbone) -> CoDDModel:
    """The same backbone with weights of its own, to be trained, and no head."""
    network = copy.deepcopy(backbone.model.backbone)
    return CoDDModel.from_backbone(network, mask_token_id=backbone.mask_id)


def answer_log_probs(
    backbone: Backbone, canvas: Canvas, seen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One-pass log-probabilities of answers, window by window.

    Args:
        backbone: whose likelihood it is.
        canvas: prompts and answers.
        seen: `[batch, length]`, what stands in place of the prompts.

    Returns:
        `[batch, n]` log-probabilities, and `[batch, n]` bool, the tokens up to the first end.
    """
    size = int((canvas.real.sum(-1) - canvas.start)[0])
    columns = canvas.start[:, None] + torch.arange(size)
    truth, place = canvas.tokens.gather(1, columns), torch.arange(seen.shape[1])
    row, parts = torch.arange(len(truth))[:, None], []
    for offset in range(0, size, backbone.window):
        hidden = (place >= (canvas.start + offset)[:, None]) & canvas.real
        tokens = torch.where(place < canvas.start[:, None], seen, canvas.tokens)
        states = backbone.read(canvas.with_tokens(tokens.masked_fill(hidden, backbone.mask_id)))
        some = slice(offset, offset + backbone.window)
        log_probs = backbone.log_probs(states.logits((row, columns[:, some])))
        parts.append(log_probs.gather(-1, truth[:, some, None])[..., 0])
    ended = (truth == backbone.end_id).long().cumsum(-1)
    text = (ended - (truth == backbone.end_id).long() == 0) & (truth != backbone.mask_id)
    return torch.cat(parts, 1).masked_fill(~text, 0.0), text


class GRPO:
    """Draws batches of answers, and gives the loss of each update.

    Args:
        backbone: as it was; it stays.
        model: a copy of it, whose weights are trained.
        config: the settings.
        seed: of tasks and draws.
        reward: of an answer to a task.
    """

    def __init__(
        self,
        backbone: Backbone,
        model: CoDDModel,
        config: GRPOConfig,
        seed: int = 0,
        reward: Callable[[Task, str], float] = is_right,
    ) -> None:
        self.reference, self.policy = backbone, backbone.with_model(model)
        self.config, self.reward = config, reward
        self.tasks = training_tasks(seed, config.questions)
        self.generator = torch.Generator().manual_seed(seed)
        self.views: list[Batch] = []
        self.rewards: list[float] = []

    def loss(self) -> torch.Tensor | None:
        """Of the next update; answers are drawn when those drawn before are used up.

        None if no question has both right and wrong answers.
        """
        self.views = self.views or self.draw()
        if not self.views:
            return None
        view, clip = self.views.pop(), self.config.clip
        now, text = answer_log_probs(self.policy, view.canvas, view.seen)
        ratio, advantage = (now - view.before).exp(), view.advantage[:, None]
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
        gap = view.reference - now
        divergence = gap.exp() - gap - 1
        each = (self.config.penalty * divergence - surrogate) * text
        return (each.sum(-1) / text.sum(-1).clamp(min=1)).mean()

    @torch.no_grad()
    def draw(self) -> list[Batch]:
        """Decodes answers to tasks; gives a view for each update."""
        config, policy = self.config, self.policy
        asked = [task for task in next(self.tasks) for _ in range(config.group)]
        canvas = to_fill(policy, [policy.prompt(task.question) for task in asked])
        answers = decode(
            policy, Factorized(), canvas, config.passes, config.temperature, self.generator
        )
        texts = [policy.text(answer) for answer in answers]
        marks = [float(self.reward(task, text)) for task, text in zip(asked, texts, strict=True)]
        rewards = torch.tensor(marks).view(-1, config.group)
        self.rewards.append(rewards.mean().item())
        advantage = (rewards - rewards.mean(1, keepdim=True)).flatten()
        rows = advantage.nonzero()[:, 0]
        if not len(rows):
            return []
        canvas, advantage = canvas.rows(rows), advantage[rows]
        views = []
        for _ in range(config.updates):
            drawn = torch.rand(canvas.tokens.shape, generator=self.generator)
            seen = canvas.tokens.masked_fill(drawn < config.prompt_masking, policy.mask_id)
            before, _ = answer_log_probs(policy, canvas, seen)
            reference, _ = answer_log_probs(self.reference, canvas, seen)
            views.append(Batch(canvas, seen, advantage, before, reference))
        return views


def fit_grpo(
    backbone: Backbone,
    model: CoDDModel,
    seconds: float,
    seed: int = 0,
    config: GRPOConfig | None = None,
) -> None:
    """Fine-tunes a copy of the backbone for so many processor seconds, decoding included."""
    config = config or GRPOConfig()
    fit(model, GRPO(backbone, model, config, seed).loss, seconds, config.learning_rate)
