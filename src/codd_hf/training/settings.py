"""The settings of a run and of its stages, also by dotted names (`joint.seed`) and as YAML."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml

from ..checks.settings import (
    Count,
    Natural,
    Positive,
    Range,
    Seed,
    Setting,
    Settings,
    Share,
    settings_of,
)

StageName = Literal["pretraining", "generative", "conditional", "joint"]
STAGES: tuple[str, ...] = get_args(StageName)
MAY_CHANGE = {
    "max_steps",
    "num_epochs",
    "evaluation_steps",
    "checkpointing_steps",
    "num_validation_draws",
}
"""Settings that a run may be continued with other values of."""
Precision = Literal["auto", "no", "bf16"]


@dataclass
class FitConfig(Settings):
    """The settings of every fit."""

    checkpointing_steps: Count = 100
    """Steps between checkpoints; there is one at the end as well."""
    seed: Seed = 0
    """The seed of order, noise and all that starts at random."""

    def identity(self) -> dict[str, Any]:
        """The settings that a run must be continued with."""
        auto = {"mixed_precision"} if getattr(self, "mixed_precision", "") == "auto" else set()
        return {k: v for k, v in asdict(self).items() if k not in MAY_CHANGE | auto}


@dataclass
class GenerativeConfig(FitConfig):
    """How a circuit is fitted to text, by stepwise EM (Liang and Klein, 2009)."""

    num_epochs: Count = 10
    """Passes over the windows."""
    windows_per_batch: Count = 512
    """Windows an EM step, over all processes."""
    windows_per_chunk: Count = 128
    """Windows that a process counts at once."""
    emission_prior: Positive = 30.0
    """Pseudo-tokens per state, spread as the text's unigrams."""
    transition_prior: Positive = 30.0
    """Pseudo-transitions per state, spread evenly."""


@dataclass
class GradientConfig(FitConfig):
    """The settings of every fit by gradient steps."""

    max_steps: Count | None = None
    """Optimiser steps."""
    learning_rate: Positive | None = None
    """The peak of the optimiser's rate."""
    warmup_steps: Natural | None = None
    """Steps in which the rate rises to its peak."""
    evaluation_steps: Count = 200
    """Steps between validations."""
    mixed_precision: Precision = "no"
    """The backbone's: no, bf16, or auto (bf16 where the device has its arithmetic); the circuit is
    computed in float32."""
    mean_span_length: Annotated[float, Range(1)] = 1.0
    """Mean length of the spans that are masked together; 1: each token alone."""
    max_extra_windows: Natural = 1
    """Canvases end with up to this many windows of end-of-text."""


@dataclass
class PretrainingConfig(GradientConfig):
    """How a backbone is trained.

    What is None has a default for new backbones and one for given ones.
    """

    optimizer: Literal["muon", "adamw"] | None = None
    """muon (of hidden matrices, scaled to AdamW's step) or adamw. Default: muon for a new one."""
    weight_decay: Positive | None = None
    """On matrices."""
    decay_fraction: Share = 0.4
    """Share of the steps, at the end, in which the rate falls linearly to zero."""
    tokens_per_batch: Count = 6144
    """Tokens a step, padding included."""
    window_probability: Share = 0.5
    """Share of rows with window noise."""
    noise: Literal["mask", "uniform"] | None = None
    """What the backbone learns to find the text behind, and says in its configuration: mask tokens,
    or uniform ones, which can be any. Default: mask for a new one, its own for a given one."""
    mixed_precision: Precision = "auto"

    def completed(self, backbone: Literal["new", "given"]) -> PretrainingConfig:
        """These settings with the defaults for a kind of backbone."""
        defaults: dict[str, Any] = {
            "optimizer": "muon" if backbone == "new" else "adamw",
            "max_steps": 4600 if backbone == "new" else 1000,
            "learning_rate": 2e-3 if backbone == "new" else 5e-5,
            "weight_decay": 0.1 if backbone == "new" else 0.0,
            "warmup_steps": 100 if backbone == "new" else 50,
        }
        return replace(self, **{k: v for k, v in defaults.items() if getattr(self, k) is None})


@dataclass
class CoupledConfig(GradientConfig):
    """The settings of every fit to the coupled likelihood of noised windows."""

    learning_rate: Positive = 3e-3
    warmup_steps: Natural = 50
    context_learning_rate: Positive = 6e-4
    """The peak rate of the conditioning; `learning_rate` is that of log-potentials."""
    windows_per_batch: Count = 64
    """Windows of a batch, over all processes."""
    windows_per_chunk: Count = 32
    """Windows that a process computes at once."""
    evidence_temperature: Annotated[float, Range(1e-6, 1e6)] | None = None
    """Divides the backbone's logits; becomes the head's. Default: the head's."""
    infill: bool = False
    """Windows as infilling meets them: anywhere in an answer, with all around them visible."""
    num_validation_draws: Count = 4
    """How often each validation example is drawn, each time with another window and other noise."""


@dataclass
class ConditionalConfig(CoupledConfig):
    """How a head is fitted to a frozen backbone."""

    max_steps: Count | None = None
    """Optimiser steps. Default: each window is read 3.2 times, in 200 to 2,000 steps."""
    emission_power: Positive = 0.8
    """Emissions of the generative fit are flattened to this power at the start; 1: not."""
    transition_power: Positive = 0.9
    """Likewise the transitions."""
    num_draws: Count = 4
    """How often each example is drawn, each time with another window and other noise."""
    cache_size: Count = 512
    """Likeliest tokens kept of a prediction; all if the vocabulary has no more."""
    tokens_per_batch: Count = 8192
    """Tokens that the backbone reads at once."""

    def with_steps(self, num_examples: int) -> ConditionalConfig:
        """These settings with the number of steps for so many examples, if it is not set."""
        steps = round(3.2 * num_examples * self.num_draws / self.windows_per_batch)
        return replace(self, max_steps=self.max_steps or min(max(steps, 200), 2000))


@dataclass
class JointConfig(CoupledConfig):
    """How a backbone and its head are trained together."""

    max_steps: Count = 300
    learning_rate: Positive = 5e-4
    context_learning_rate: Positive = 2e-4
    backbone_learning_rate: Positive | None = None
    """The peak rate of the backbone. Default: 5e-4 with LoRA, 5e-5 in full."""
    warmup_steps: Natural = 30
    windows_per_batch: Count = 32
    windows_per_chunk: Count = 16
    backbone: Literal["lora", "full", "frozen"] = "lora"
    """What of it is trained: lora (a low-rank adapter, by PEFT), full, or frozen (nothing)."""
    lora_rank: Count = 16
    """The rank of a new adapter, on all linear layers but the output's and with an alpha of twice
    the rank; one that the backbone has already is trained further."""
    gradient_checkpointing: bool = False
    """Less memory for a third more time: layers of the backbone run again in the backward pass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.backbone_learning_rate is None:
            self.backbone_learning_rate = 5e-4 if self.backbone == "lora" else 5e-5


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
    """What is one text of a text file: line or paragraph."""
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
    conditioning: list[Literal["latent", "copy"]] = field(
        default_factory=lambda: ["latent", "copy"]  # type: ignore[arg-type]
    )
    """How the context steers the circuit: latent, copy; none for a static circuit."""
    emission: Literal["dense", "tied"] | None = None
    """dense, or tied to the backbone's output embedding. Default: tied where the vocabulary is
    so large that decoding reads lists."""
    emission_rank: Count = 128
    """Rank of tied emissions."""
    vocab_size: Count = 3072
    """The size of the tokenizer that is trained with a new backbone."""
    hidden_size: Count = 256
    """The width of a new backbone."""
    num_layers: Count = 4
    """The depth of a new backbone."""
    mask_token_id: Natural | None = None
    """The mask token of a given backbone, if its tokenizer does not name one."""
    resume_from_checkpoint: Literal["latest", "none"] = "latest"
    """latest: each stage goes on from its newest checkpoint, and a complete one is not run again.
    none: the stages to run begin anew, and their earlier results are deleted."""
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)
    """Trackers: tensorboard (in OUTPUT/logs), wandb, trackio."""
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


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes `3e-3` for a text; here it is a number, as in YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def named_settings(kind: type = TrainConfig, prefix: str = "") -> Iterator[tuple[str, Setting]]:
    """All settings of a settings class, those of its parts with dotted names."""
    for name, setting in settings_of(kind).items():
        if is_dataclass(setting.kind):
            yield from named_settings(setting.kind, f"{prefix}{name}.")
        else:
            yield prefix + name, setting


def from_text(name: str, text: str) -> Any:
    """The value of a setting that the command line gives as text."""
    if _named(name).kind is str and text != "null":
        return text
    return _parsed(text, f"`{name}`")


def read_config(path: str | Path) -> dict[str, Any]:
    """The settings in a YAML file, by dotted names; None where a required one is left open."""
    content = _parsed(Path(path).read_text(encoding="utf-8"), repr(str(path)))
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} must hold settings, as `--print-config` writes.")
    parts = {name: value for name, value in content.items() if isinstance(value, dict)}
    values = {str(name): value for name, value in content.items() if name not in parts}
    return values | {f"{name}.{k}": v for name, part in parts.items() for k, v in part.items()}


def build_config(values: Mapping[str, Any]) -> TrainConfig:
    """The settings with these values by dotted names, and defaults for the others.

    Raises:
        ValueError: there is no such setting, a required one is missing, or a value is not possible.
    """
    parts: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        _named(name)
        part, _, own = name.rpartition(".")
        parts.setdefault(part, {})[own] = value
    top, settings = parts.pop("", {}), settings_of(TrainConfig)
    missing = [n for n, s in settings.items() if s.default is MISSING and top.get(n) is None]
    if missing:
        raise ValueError(f"`{'` and `'.join(missing)}` must be given.")
    for stage, fields in parts.items():
        try:
            top[stage] = settings[stage].kind(**fields)
        except ValueError as error:
            raise ValueError(f"In `{stage}`: {error}") from error
    return TrainConfig(**top)


def config_text(values: Mapping[str, Any]) -> str:
    """All settings as YAML, with these values by dotted names."""
    left_open = {name: None for name in ("dataset", "output_dir") if values.get(name) is None}
    config = build_config({**values, **dict.fromkeys(left_open, "")})
    return yaml.safe_dump(asdict(config) | left_open, sort_keys=False)


def _named(name: str) -> Setting:
    known = dict(named_settings())
    if name not in known:
        close = get_close_matches(name, known, cutoff=0.5)
        hint = f": did you mean {' or '.join(close)}?" if close else "."
        raise ValueError(f"There is no setting {name!r}{hint}")
    return known[name]


def _parsed(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is no YAML: {' '.join(str(error).split())}.") from error
