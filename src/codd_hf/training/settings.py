"""The settings of a run; each stage's own are in `stage_settings`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, get_args

from ..checks.settings import Count, Natural, Range, Settings
from .stage_settings import (
    ConditionalConfig,
    GenerativeConfig,
    JointConfig,
    PretrainingConfig,
)

StageName = Literal["pretraining", "generative", "conditional", "joint"]
STAGES: tuple[str, ...] = get_args(StageName)


@dataclass
class TrainConfig(Settings):
    """All that `train` is told."""

    dataset: str
    """A JSONL, Parquet or text file, a Hub dataset id, or tasks: the package's own, which
    pretraining reads without end and the other stages in a sample (split train[:50000])."""
    output_dir: str
    """Receives everything; a run that stopped is continued from it."""
    backbone: str | None = None
    """A path or Hub id of a backbone, or of a CoDD model or pipeline, whose own head is left out;
    without one, a small backbone is trained on the data first."""
    stages: list[StageName] | None = None
    """The stages to run: pretraining (of a small backbone, or of the given one further, then with
    lower rates and fewer steps), generative (EM and the marginal correction), conditional, joint (a
    LoRA, or all of the backbone, with the head). A stage that is left out is taken from the output
    folder. Default: generative and conditional, and pretraining without a backbone."""
    dataset_config: str | None = None
    """Configuration of a Hub dataset, such as main; or the kinds of tasks, such as records,sums."""
    split: str = "train"
    """Split of the dataset, or a part of one, such as train[:1000]."""
    sample_by: str = "line"
    """What is one text of a text file: line, paragraph or document."""
    prompt_column: str | None = None
    """Column of the prompt; found by its usual name if not set."""
    answer_column: str | None = None
    """Column that is generated, or of conversations (messages); likewise."""
    remove_pattern: str | None = None
    """Regular expression whose matches are deleted from the text."""
    packing: bool = False
    """Join plain texts, end-of-text after each, and cut them into pieces of `max_length` tokens;
    `max_extra_windows` is then 0."""
    skip_bad_rows: bool = False
    """Leave out and list bad rows; otherwise the first one ends the run."""
    max_length: Count = 512
    """Tokens of an example."""
    num_validation: Count = 100
    """Examples held out for choices made while training."""
    num_test: Natural = 0
    """Examples held out at the very end, for figures only."""
    num_gap_problems: Natural = 32
    """Held-out examples on which the gap is measured at the end, for the model card; 0: none."""
    num_latents: Count = 448
    """States of the circuit."""
    window_length: Annotated[int, Range(2)] = 32  # a window of one token couples nothing
    """Tokens in a window."""
    conditioning: list[str] = field(default_factory=lambda: ["latent", "copy"])
    """How the context steers the circuit: latent, copy; none for a static circuit."""
    noise_conditioning: bool = False
    """The share of masked positions is an input of the conditioning too."""
    emission: str = "dense"
    """dense, or tied to the backbone's output embedding."""
    emission_rank: Count = 128
    """Rank of tied emissions."""
    evidence_size: Count | None = None
    """Likeliest tokens of a prediction that the circuit reads, in the head's configuration."""
    vocab_size: Count = 3072
    """Of the tokenizer trained with a new backbone."""
    hidden_size: Count = 256
    """Of a new backbone."""
    num_layers: Count = 4
    """Of a new backbone."""
    mask_token_id: Natural | None = None
    """Of a given backbone, if its tokenizer does not name one."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """In which the pipeline's weights are stored."""
    resume_from_checkpoint: str = "latest"
    """latest: each stage goes on from its newest checkpoint, and a complete one is not run again.
    none: the stages to run begin anew, and their earlier results are deleted. Or a checkpoint's
    folder, such as OUTPUT/conditional/checkpoint-200: its stage goes on from there, and those after
    it begin anew."""
    checkpoints_total_limit: Count | None = 2
    """Checkpoints that a stage keeps, the newest ones; all if null."""
    report_to: list[Literal["tensorboard", "wandb", "trackio", "none"]] = field(
        default_factory=list
    )
    """Trackers: tensorboard (in OUTPUT/logs), wandb, trackio."""
    shard_backbone: bool = False
    """Share the backbone's layers among the processes (FSDP2) while it runs over the data; always
    so under an FSDP configuration of Accelerate."""
    push_to_hub: bool = False
    """Push the pipeline when it is done, without the held-out examples."""
    hub_model_id: str | None = None
    """The repository; default, one of your own with the output folder's name."""
    hub_private: bool = False
    """Let the repository be private."""
    pretraining: PretrainingConfig = field(default_factory=PretrainingConfig)
    generative: GenerativeConfig = field(default_factory=GenerativeConfig)
    conditional: ConditionalConfig = field(default_factory=ConditionalConfig)
    joint: JointConfig = field(default_factory=JointConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
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
    def chosen_stages(self) -> list[str]:
        """The stages to run, in order."""
        default = STAGES[1:3] if self.backbone is not None else STAGES[:3]
        return [stage for stage in STAGES if stage in (self.stages or default)]

    @property
    def trains_backbone(self) -> bool:
        """Whether the backbone is that of the output folder, and not the given one."""
        return self.backbone is None or "pretraining" in self.chosen_stages
