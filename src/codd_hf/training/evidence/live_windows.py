"""Noised windows with the backbone at hand: drawn, scored, compared between models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from ...data.canvases import CanvasBatch, TokenizedExample
from ...data.noise import draw_windows
from ...modeling_codd import CoDDModel
from ...runtime.precision import autocast
from ..fits.counting import summing_dtype
from ..fits.gains import gains_by_level
from ..joint_settings import JointConfig

EVALUATION_CHUNK = 32


@dataclass
class LiveWindows:
    """Canvases with one noised window a row, which the backbone has not seen yet.

    Attributes:
        canvas: the clean text, `[B, T]`.
        masked: `[B, T]` bool, what the backbone does not see.
        level: `[B]`, the probability with which the window's tokens were masked.
        starts: `[B]`, where each row's window begins.
    """

    canvas: CanvasBatch
    masked: torch.Tensor
    level: torch.Tensor
    starts: torch.Tensor

    @classmethod
    def drawn(
        cls,
        examples: Sequence[TokenizedExample],
        tokenizer: PreTrainedTokenizerBase,
        window_length: int,
        config: JointConfig,
        seed: int,
    ) -> LiveWindows:
        """A window of each example, as a function of the seed alone."""
        generator = torch.Generator().manual_seed(seed)
        canvas, noise, starts = draw_windows(
            examples,
            tokenizer,
            window_length,
            config.max_extra_windows,
            generator,
            config.mean_span_length,
        )
        return cls(canvas, noise.masked, noise.level, starts)

    def row(self, number: int) -> LiveWindows:
        """One of them."""
        one = slice(number, number + 1)
        canvas = CanvasBatch(*(getattr(self.canvas, f)[one] for f in vars(self.canvas)))
        return LiveWindows(canvas, self.masked[one], self.level[one], self.starts[one])

    def log_probs(
        self, model: CoDDModel, config: JointConfig
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the model gives to the masked tokens of each window.

        Returns:
            The factorized log-likelihoods, the gains `log p_w(x) - log Z` and the numbers of masked
            tokens, `[B]` each.
        """
        device = model.device
        truth, real = self.canvas.input_ids.to(device), self.canvas.attention_mask.to(device)
        ids = truth.masked_fill(self.masked.to(device), model.config.mask_token_id)
        starts = self.starts.to(device)
        with autocast(config.mixed_precision, device):
            states = model.backbone_states(ids, real)
            distribution = model.window_distribution(
                states, ids, starts, real, temperature=config.evidence_temperature
            )
        columns = starts[:, None] + torch.arange(model.window_length, device=device)
        target = truth.gather(1, columns)
        gain = distribution.coupling_gain(target)
        token = distribution.factorized_logits.gather(-1, target[..., None])[..., 0]
        masked = distribution.masked
        return token.masked_fill(~masked, 0).sum(1), gain, masked.sum(1)


@dataclass
class WindowScores:
    """What a model gives to noised windows of text.

    Attributes:
        example: `[N]`, which example each window is of.
        level: `[N]`, the probability with which its tokens were masked.
        masked: `[N]`, how many were.
        factorized: `[N]`, log-likelihood of the masked tokens without the circuit, in nats.
        gain: `[N]`, what the circuit adds: `log p_w(x) - log Z`.
    """

    example: torch.Tensor
    level: torch.Tensor
    masked: torch.Tensor
    factorized: torch.Tensor
    gain: torch.Tensor

    def summary(self) -> dict[str, float]:
        """Nats per masked token, factorized and coupled; their difference, all and by level."""
        total = self.masked.sum()
        nats = {
            "factorized_nats": -(self.factorized.sum() / total).item(),
            "coupled_nats": -((self.factorized + self.gain).sum() / total).item(),
        }
        return nats | gains_by_level(self.gain, self.masked, self.level)

    def better_than(self, other: WindowScores) -> tuple[float, float]:
        """By how many nats per masked token the coupled likelihood is better than another model's.

        Args:
            other: of the same windows.

        Returns:
            The mean, and its standard error over examples (of a ratio of sums, paired).
        """
        ours, theirs = (s.factorized + s.gain for s in (self, other))
        size = int(self.example.max()) + 1
        surplus = torch.zeros(size, dtype=ours.dtype).index_add(0, self.example, ours - theirs)
        count = torch.zeros(size, dtype=ours.dtype).index_add(0, self.example, self.masked)
        mean = surplus.sum() / count.sum()
        spread = (surplus - mean * count).square().sum() * size / (size - 1)
        return mean.item(), (spread.sqrt() / count.sum()).item()


@torch.no_grad()
def window_scores(
    model: CoDDModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[TokenizedExample],
    config: JointConfig,
    num_draws: int = 4,
    seed: int = 1234,
) -> WindowScores:
    """Scores one noised window of each example a draw.

    Several processes share the windows, and all get the result. Windows and noise depend on the
    examples, `seed`, `max_extra_windows` and `mean_span_length` alone, so that models are compared
    on the same ones.

    Args:
        model: a backbone with a head; it is in evaluation mode after the call.
        tokenizer: its tokenizer.
        examples: the text.
        config: which noise, temperature and precision.
        num_draws: how often each example is drawn.
        seed: of windows and noise.
    """
    model.eval()
    accelerator = Accelerator()
    lengths = torch.tensor([len(e.prompt_ids) + len(e.answer_ids) for e in examples])
    order = lengths.argsort(stable=True)
    device = accelerator.device
    scores = torch.zeros(4, num_draws * len(examples), device=device, dtype=summing_dtype(device))
    place = 0
    for number, chunk in enumerate(order.split(EVALUATION_CHUNK) * num_draws):
        here, place = slice(place, place + len(chunk)), place + len(chunk)
        if number % accelerator.num_processes == accelerator.process_index:
            part = [examples[i] for i in chunk.tolist()]
            windows = LiveWindows.drawn(
                part, tokenizer, model.window_length, config, seed * 100_003 + number
            )
            found = windows.log_probs(model, config)
            scores[:, here] = torch.stack((windows.level.to(device), *found)).to(scores.dtype)
    level, factorized, gain, masked = accelerator.reduce(scores, "sum").cpu()
    return WindowScores(order.repeat(num_draws), level, masked, factorized, gain)
