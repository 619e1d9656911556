"""Everything that shapes what a denoising step draws, defined in one place."""

from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal, Self

from ..checks.arguments import LARGEST_INTEGER, check_known, list_of_ids
from ..checks.settings import Range, Settings, Share

LOWEST, HIGHEST = 1e-6, 1e6  # by what float32 can divide logits
LEFT = {"activation_scope": "window", "confidence": "marginal", "remask_threshold": None}
"""Settings of version 0.1 that left, each with the value that is the only one now."""
Factor = Annotated[float, Range(LOWEST, HIGHEST)]
Strategy = Literal[
    "low_confidence", "margin", "entropy", "random", "left_to_right", "threshold", "joint"
]


@dataclass(frozen=True)
class DrawSettings(Settings):
    """The settings of a draw.

    The fields are [`CoDDScheduler`]'s configuration, entries of a generation configuration,
    arguments of the pipeline and of `generate`, and flags of the command line. The call counts
    first, then the generation configuration or the scheduler.

    Raises:
        ValueError: a value is out of its range, or two of them do not go together.
    """

    strategy: Strategy = "low_confidence"
    """which positions a step commits first: the most probable candidates (low_confidence), those
    furthest ahead of the second (margin), of least entropy (entropy), at random (random), or
    left_to_right; threshold and joint commit all that are sure enough"""
    sampling: Literal["factorized", "latent", "any_order", "marginal", "viterbi"] = "latent"
    """what a token is drawn from: the backbone's prediction (factorized), the prediction given a
    latent path (latent), its exact conditional, one token after the other (any_order), its coupled
    marginal (marginal); viterbi takes the best latents and tokens"""
    temperature: Annotated[float, Range(0, HIGHEST)] = 0.0
    """of the final draw; 0 takes the most probable token and draws nothing in any mode"""
    evidence_temperature: Factor | None = None
    """divides the backbone's logits before the circuit sees them (the paper's tau); default: the
    temperature that the head was fitted for"""
    top_k: Annotated[int, Range(0)] | None = None
    """draw from so many of the most probable tokens; 0: from all"""
    top_p: Annotated[float, Range(LOWEST, 1)] | None = None
    """draw from the fewest tokens whose probabilities reach it; 1: from all"""
    threshold: Share = 0.9
    """least probability of a token (strategy threshold), or of all tokens of a step together
    (strategy joint)"""
    activation_ratio: Share = 1.0
    """largest share of masks in a window under which the circuit is applied (the paper's gamma);
    1: always"""
    repetition_penalty: Factor = 1.0
    """above 1: tokens of the prompt and of the text so far become less probable"""
    forbidden_token_ids: list[int] | None = None
    """tokens that are never drawn, beside those that the model forbids"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 < self.temperature < LOWEST:
            raise ValueError(
                f"`temperature` must be 0 or at least {LOWEST:g}, got {self.temperature}."
            )
        self.check_vocabulary(LARGEST_INTEGER)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises a ValueError if a forbidden token is not in a vocabulary of this size."""
        list_of_ids("forbidden_token_ids", self.forbidden_token_ids, vocab_size)

    def updated(self, **overrides: Any) -> Self:
        """The settings with those of a call in place of some; None keeps the value here.

        Raises:
            TypeError: a name is not a setting.
        """
        check_known(overrides, [field.name for field in fields(self)], "a setting of the scheduler")
        return replace(self, **{k: v for k, v in overrides.items() if v is not None})
