"""The settings of every training stage, and of a whole run."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class PretrainingConfig:
    """How a backbone is trained.

    Attributes:
        max_steps: optimiser steps.
        tokens_per_batch: tokens a step, padding included.
        learning_rate: the peak; hidden matrices use Muon scaled to AdamW's step, the rest AdamW.
        weight_decay: on matrices.
        warmup_steps: linear warm-up.
        decay_fraction: share of the steps, at the end, in which the rate falls linearly to zero.
        window_length: windows of the noise and of the canvases.
        window_probability: share of rows with window noise.
        max_extra_windows: canvases end with up to this many windows of end-of-text.
        mixed_precision: `"no"` or `"bf16"`.
        evaluation_steps: steps between validations.
        checkpointing_steps: steps between checkpoints.
        seed: seed of order, noise and nothing else.
    """

    max_steps: int = 4600
    tokens_per_batch: int = 6144
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    warmup_steps: int = 100
    decay_fraction: float = 0.4
    window_length: int = 32
    window_probability: float = 0.5
    max_extra_windows: int = 1
    mixed_precision: str = "bf16"
    evaluation_steps: int = 200
    checkpointing_steps: int = 100
    seed: int = 0

    def __post_init__(self):
        _check_precision(self.mixed_precision)


@dataclass
class GenerativeConfig:
    """How a circuit is fitted to text.

    Attributes:
        num_epochs: passes over the windows.
        windows_per_batch: windows an EM step, over all processes.
        windows_per_chunk: windows that a process counts at once; counts of chunks are summed in
            float64, so that they are the same whatever the number of processes.
        update: `"stepwise"` (running averages of the counts; Liang and Klein, 2009) or
            `"anemone"` (each batch against the circuit's own counts; arXiv 2505.19982).
        step_decay: the share of a new batch in the counts is `(step + 2) ** -step_decay`.
        emission_prior: pseudo-tokens per state, spread as the text's unigrams.
        transition_prior: pseudo-transitions per state, spread evenly.
        concentration: share of a state's initial emissions that goes to its cluster.
        noise: log-scale of the noise on the initial parameters.
        checkpointing_steps: EM steps between checkpoints; there is one after each epoch as well.
        seed: seed of clustering, noise and order.
    """

    num_epochs: int = 10
    windows_per_batch: int = 512
    windows_per_chunk: int = 128
    update: str = "stepwise"
    step_decay: float = 0.6
    emission_prior: float = 30.0
    transition_prior: float = 30.0
    concentration: float = 0.9
    noise: float = 0.1
    checkpointing_steps: int = 100
    seed: int = 0

    def __post_init__(self):
        _check_one_of("update", self.update, ("stepwise", "anemone"))


@dataclass
class EvidenceConfig:
    """What is kept of a frozen backbone's predictions, and of which noised windows.

    Attributes:
        num_draws: how often each example is drawn, every time with another window and other noise.
        max_extra_windows: canvases end with up to this many windows of end-of-text.
        mean_span_length: mean length of the spans that are masked together; 1: each token alone.
        top_k: likeliest tokens kept of a prediction; all if the vocabulary has no more.
        temperature: the evidence temperature `tau`.
        tokens_per_batch: tokens that the backbone reads at once.
        mixed_precision: `"no"` or `"bf16"`, for the backbone.
        precision: `"half"` keeps log-probabilities in float16 (each is off by at most 1/2048 of
            itself) and hidden states in bfloat16; `"single"` keeps both in float32.
        seed: of windows and noise.
    """

    num_draws: int = 1
    max_extra_windows: int = 1
    mean_span_length: float = 1.0
    top_k: int = 512
    temperature: float = 1.0
    tokens_per_batch: int = 8192
    mixed_precision: str = "no"
    precision: str = "half"
    seed: int = 0

    def __post_init__(self):
        _check_precision(self.mixed_precision)
        _check_one_of("precision", self.precision, ("half", "single"))


@dataclass
class ConditionalConfig:
    """How a head is fitted to a frozen backbone.

    Attributes:
        max_steps: optimiser steps.
        windows_per_batch: windows a step, over all processes.
        windows_per_chunk: windows that a process computes at once; gradients of chunks are summed
            in float64, so that a step is the same whatever the number of processes.
        learning_rate: AdamW's peak on log-potentials (no weight decay); falls to zero as a cosine.
        context_learning_rate: likewise on the conditioning.
        warmup_steps: linear warm-up.
        evidence_temperature: the temperature `tau` of the backbone's predictions.
        loss: `"elbo"`, each window weighted by `1/t`, over its length; or `"token"`, nats summed
            over masked tokens over their number.
        num_draws: how often each example is drawn, with another window and other noise.
        num_validation_draws: likewise for validation examples.
        cached_top_k: likeliest tokens kept of a prediction; all if the vocabulary has no more.
        evidence_precision: `"half"` or `"single"`, of what is kept.
        evidence_dir: where it is kept; `evidence` in the output directory if not given.
        mean_span_length: mean length of the spans that are masked together; 1: each token alone.
        max_extra_windows: canvases end with up to this many windows of end-of-text.
        tokens_per_batch: tokens that the backbone reads at once.
        mixed_precision: `"no"` or `"bf16"`, for the backbone; the circuit stays in float32.
        evaluation_steps: steps between validations.
        checkpointing_steps: steps between checkpoints.
        seed: seed of order, noise and what starts at random.
    """

    max_steps: int = 800
    windows_per_batch: int = 64
    windows_per_chunk: int = 32
    learning_rate: float = 5e-3
    context_learning_rate: float = 2e-3
    warmup_steps: int = 50
    evidence_temperature: float = 1.0
    loss: str = "elbo"
    num_draws: int = 2
    num_validation_draws: int = 4
    cached_top_k: int = 512
    evidence_precision: str = "half"
    evidence_dir: str | None = None
    mean_span_length: float = 1.0
    max_extra_windows: int = 1
    tokens_per_batch: int = 8192
    mixed_precision: str = "no"
    evaluation_steps: int = 200
    checkpointing_steps: int = 100
    seed: int = 0

    def __post_init__(self):
        _check_one_of("loss", self.loss, ("elbo", "token"))
        self.evidence(self.num_draws, self.seed)

    def evidence(self, num_draws: int, seed: int) -> EvidenceConfig:
        """What is kept of the backbone, for so many draws with this seed."""
        return EvidenceConfig(
            num_draws=num_draws,
            max_extra_windows=self.max_extra_windows,
            mean_span_length=self.mean_span_length,
            top_k=self.cached_top_k,
            temperature=self.evidence_temperature,
            tokens_per_batch=self.tokens_per_batch,
            mixed_precision=self.mixed_precision,
            precision=self.evidence_precision,
            seed=seed,
        )


@dataclass
class TrainConfig:
    """What `train` does.

    Attributes:
        dataset: a JSONL, Parquet or text file, or a Hub dataset id.
        output_dir: receives everything; a run that stopped is continued from it.
        backbone: a path or Hub id; without one, a small backbone is trained on the data first.
        prompt_column: column that is given; found by its usual name if not set.
        answer_column: column that is generated; likewise.
        remove_pattern: regular expression whose matches are deleted from the text.
        num_validation: examples held out for choices made while training.
        num_test: examples held out at the very end, for figures only.
        max_length: tokens of an example.
        vocab_size: of the tokenizer trained with a new backbone.
        hidden_size: of a new backbone.
        num_layers: of a new backbone.
        num_latents: states of the circuit.
        window_length: tokens in a window.
        structure: of the transitions, "dense" or "monarch".
        emission: "dense", or "tied" to the backbone's output embedding.
        emission_rank: rank of tied emissions.
        conditioning: how the context steers the circuit, any of latent, gate, low_rank, copy;
            none for a static circuit.
        num_gate_groups: groups of states of the gate.
        transition_rank: rank of the low-rank term.
        noise_conditioning: the share of masked positions is an input of the conditioning too.
        alpha: power of the marginal correction.
        emission_power: emissions are flattened to this power before stage 3 (1: not).
        transition_power: likewise the transitions.
        mask_token_id: of a given backbone, if its tokenizer does not name one.
        dtype: dtype in which the pipeline's weights are stored.
        pretraining: stage 0.
        generative: stage 1.
        conditional: stage 3.
    """

    dataset: str
    output_dir: str
    backbone: str | None = None
    prompt_column: str | None = None
    answer_column: str | None = None
    remove_pattern: str | None = None
    num_validation: int = 100
    num_test: int = 0
    max_length: int = 512
    vocab_size: int = 3072
    hidden_size: int = 256
    num_layers: int = 4
    num_latents: int = 448
    window_length: int = 32
    structure: str = "dense"
    emission: str = "dense"
    emission_rank: int = 128
    conditioning: list[str] = field(default_factory=lambda: ["latent", "copy"])
    num_gate_groups: int = 16
    transition_rank: int = 1
    noise_conditioning: bool = False
    alpha: float = 1.0
    emission_power: float = 0.8
    transition_power: float = 0.9
    mask_token_id: int | None = None
    dtype: str = "bfloat16"
    pretraining: PretrainingConfig = field(default_factory=PretrainingConfig)
    generative: GenerativeConfig = field(default_factory=GenerativeConfig)
    conditional: ConditionalConfig = field(default_factory=ConditionalConfig)


def _check_precision(mixed_precision: str) -> None:
    _check_one_of("mixed_precision", mixed_precision, ("no", "bf16"))


def _check_one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        choices = " or ".join(repr(choice) for choice in known)
        raise ValueError(f"`{name}` must be {choices}, got {value!r}.")
