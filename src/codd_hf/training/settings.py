"""The settings of every training stage, and of a whole run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ..checks.arguments import LARGEST_FACTOR, check_numbers, choice
from .joint_settings import LOSSES, PRECISIONS, JointConfig

STAGES = ("pretraining", "generative", "conditional", "joint")
DTYPES = ("bfloat16", "float16", "float32")
TRACKERS = ("tensorboard", "wandb", "trackio")


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
        mean_span_length: mean length of the spans that are masked together; 1: each token alone.
        max_extra_windows: canvases end with up to this many windows of end-of-text.
        mixed_precision: `"bf16"`, `"no"`, or `"auto"`: bf16 where the device has its arithmetic.
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
    mean_span_length: float = 1.0
    max_extra_windows: int = 1
    mixed_precision: str = "auto"
    evaluation_steps: int = 200
    checkpointing_steps: int = 100
    seed: int = 0

    def __post_init__(self):
        check_numbers(
            self,
            most={"decay_fraction": 1, "window_probability": 1},
            window_length=2,  # of one token, nothing is seen beside the mask
            warmup_steps=0,
            max_extra_windows=0,
            mean_span_length=1,
            seed=0,
        )
        choice("mixed_precision", self.mixed_precision, PRECISIONS)


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
        check_numbers(self, seed=0)
        choice("update", self.update, ("stepwise", "anemone"))


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
        mixed_precision: `"no"`, `"bf16"` or `"auto"` (bf16 where the device has its arithmetic),
            for the backbone.
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
        check_numbers(
            self,
            most={"temperature": LARGEST_FACTOR},
            temperature=1 / LARGEST_FACTOR,
            max_extra_windows=0,
            mean_span_length=1,
            seed=0,
        )
        choice("mixed_precision", self.mixed_precision, PRECISIONS)
        choice("precision", self.precision, ("half", "single"))


@dataclass
class ConditionalConfig:
    """How a head is fitted to a frozen backbone.

    Attributes:
        max_steps: optimiser steps; default, so many that each window is read 3.2 times, but 200
            at least and 2,000 at most.
        windows_per_batch: windows a step, over all processes.
        windows_per_chunk: windows that a process computes at once; gradients of a step's chunks are
            accumulated in float64, so that a step is the same whatever the number of processes
            and the memory is that of one chunk.
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
        mixed_precision: `"no"`, `"bf16"` or `"auto"` (bf16 where the device has its arithmetic),
            for the backbone; the circuit stays in float32.
        evaluation_steps: steps between validations.
        checkpointing_steps: steps between checkpoints.
        keep: `"last"`, the head of the last step; or `"best"`, that of the validation with the
            largest gain, whose checkpoint is then kept as well.
        seed: seed of order, noise and what starts at random.
    """

    max_steps: int | None = None
    windows_per_batch: int = 64
    windows_per_chunk: int = 32
    learning_rate: float = 3e-3
    context_learning_rate: float = 6e-4
    warmup_steps: int = 50
    evidence_temperature: float = 1.0
    loss: str = "elbo"
    num_draws: int = 4
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
    keep: str = "last"
    seed: int = 0

    def __post_init__(self):
        check_numbers(
            self,
            most={"evidence_temperature": LARGEST_FACTOR},
            evidence_temperature=1 / LARGEST_FACTOR,
            warmup_steps=0,
            max_extra_windows=0,
            mean_span_length=1,
            seed=0,
        )
        choice("keep", self.keep, ("last", "best"))
        choice("loss", self.loss, LOSSES)
        self.evidence(self.num_draws, self.seed)

    def with_steps(self, num_windows: int) -> ConditionalConfig:
        """These settings with the number of steps for so many windows, if it is not set."""
        if self.max_steps is not None:
            return self
        steps = round(3.2 * num_windows / self.windows_per_batch)
        return replace(self, max_steps=min(max(steps, 200), 2000))

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
        dataset: a JSONL, Parquet or text file, a Hub dataset id, or tasks: the package's own, which
            pretraining reads without end and the other stages in a sample (split train[:50000]).
        output_dir: receives everything; a run that stopped is continued from it.
        dataset_config: configuration of a Hub dataset, such as main; or the kinds of tasks, such as
            records,sums.
        split: split of the dataset, or a part of one, such as train[:1000].
        sample_by: what is one text of a text file: line, paragraph or document.
        backbone: a path or Hub id of a backbone, or of a CoDD model or pipeline, whose own head is
            left out; without one, a small backbone is trained on the data first.
        stages: what to run, any of pretraining (of a small backbone, or of the given one further,
            then with lower rates and fewer steps by default), generative (EM and the marginal
            correction), conditional, and joint (a LoRA, or all of the backbone, with the head). A
            stage that is left out is taken from the output folder. By default generative and
            conditional, and pretraining without a backbone.
        resume_from_checkpoint: `"latest"`: each stage goes on from its newest checkpoint in the
            output folder, if there is one, and a complete one is not run again. `"none"`: the
            stages to run begin anew, and their earlier results are deleted. Or a checkpoint's
            folder, such as OUTPUT/conditional/checkpoint-200: its stage goes on from there (later
            checkpoints are deleted), and the stages after it begin anew.
        checkpoints_total_limit: checkpoints that a stage keeps, the newest ones; all if None.
        report_to: trackers, any of tensorboard (in OUTPUT/logs), wandb, trackio; or none.
        shard_backbone: share the backbone's layers among the processes (FSDP2) while it runs over
            the data; always so under an FSDP configuration of Accelerate.
        push_to_hub: push the pipeline when it is done, without the held-out examples.
        hub_model_id: the repository; default, one of your own with the output folder's name.
        hub_private: let the repository be private.
        prompt_column: column that is given; found by its usual name if not set.
        answer_column: column that is generated, or of conversations (messages); likewise.
        remove_pattern: regular expression whose matches are deleted from the text.
        skip_bad_rows: leave rows out that do not hold what they should, and list them; otherwise
            the first one ends the run.
        num_validation: examples held out for choices made while training.
        num_test: examples held out at the very end, for figures only.
        num_gap_problems: held-out examples on which the gap is measured at the end, for the model
            card; 0: not measured.
        max_length: tokens of an example.
        packing: join plain texts, end-of-text after each, and cut them into pieces of `max_length`
            tokens; `max_extra_windows` is then 0.
        vocab_size: of the tokenizer trained with a new backbone.
        hidden_size: of a new backbone.
        num_layers: of a new backbone.
        num_latents: states of the circuit.
        window_length: tokens in a window.
        emission: "dense", or "tied" to the backbone's output embedding.
        emission_rank: rank of tied emissions.
        conditioning: how the context steers the circuit, any of latent, copy; none for
            a static circuit.
        noise_conditioning: the share of masked positions is an input of the conditioning too.
        alpha: power of the marginal correction.
        emission_power: emissions are flattened to this power before stage 3 (1: not).
        transition_power: likewise the transitions.
        mask_token_id: of a given backbone, if its tokenizer does not name one.
        dtype: dtype in which the pipeline's weights are stored.
        pretraining: stage 0.
        generative: stage 1.
        conditional: stage 3.
        joint: stage 4.
    """

    dataset: str
    output_dir: str
    dataset_config: str | None = None
    split: str = "train"
    sample_by: str = "line"
    backbone: str | None = None
    stages: list[str] | None = None
    resume_from_checkpoint: str = "latest"
    checkpoints_total_limit: int | None = 2
    report_to: list[str] = field(default_factory=list)
    shard_backbone: bool = False
    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_private: bool = False
    prompt_column: str | None = None
    answer_column: str | None = None
    remove_pattern: str | None = None
    skip_bad_rows: bool = False
    num_validation: int = 100
    num_test: int = 0
    num_gap_problems: int = 32
    max_length: int = 512
    packing: bool = False
    vocab_size: int = 3072
    hidden_size: int = 256
    num_layers: int = 4
    num_latents: int = 448
    window_length: int = 32
    emission: str = "dense"
    emission_rank: int = 128
    conditioning: list[str] = field(default_factory=lambda: ["latent", "copy"])
    noise_conditioning: bool = False
    alpha: float = 1.0
    emission_power: float = 0.8
    transition_power: float = 0.9
    mask_token_id: int | None = None
    dtype: str = "bfloat16"
    pretraining: PretrainingConfig = field(default_factory=PretrainingConfig)
    generative: GenerativeConfig = field(default_factory=GenerativeConfig)
    conditional: ConditionalConfig = field(default_factory=ConditionalConfig)
    joint: JointConfig = field(default_factory=JointConfig)

    def __post_init__(self):
        none = {"num_test": 0, "num_gap_problems": 0, "mask_token_id": 0}
        check_numbers(self, window_length=2, **none)  # a window of one token couples nothing
        for stage in self.stages or []:
            choice("stages", stage, STAGES)
        choice("dtype", self.dtype, DTYPES)
        for tracker in self.report_to:
            choice("report_to", tracker, (*TRACKERS, "none"))
        if self.stages is not None and not self.stages:
            raise ValueError(f"`stages` must name one of {', '.join(STAGES)} at least.")
        if self.packing and self.max_length % self.window_length:
            raise ValueError(
                f"With `packing`, `max_length` ({self.max_length}) must be a multiple of "
                f"`window_length` ({self.window_length})."
            )
        if self.packing:  # a piece may end within a text, and no end-of-text follows there
            for name in ("pretraining", "conditional", "joint"):
                setattr(self, name, replace(getattr(self, name), max_extra_windows=0))

    @property
    def trains_backbone(self) -> bool:
        """Whether the backbone is that of the output folder, and not the given one."""
        return self.backbone is None or "pretraining" in self.chosen_stages

    @property
    def chosen_stages(self) -> list[str]:
        """The stages to run, in order."""
        chosen = self.stages
        if chosen is None:
            chosen = ["generative", "conditional"]
            chosen += ["pretraining"] if self.backbone is None else []
        return [stage for stage in STAGES if stage in chosen]
