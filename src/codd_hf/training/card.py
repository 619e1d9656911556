"""The model card of a run: its settings, curves and measured gap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState
from huggingface_hub import HfApi
from transformers import PreTrainedTokenizerBase

from ..hub.cards import REWRITTEN, Artifact, make_card
from ..hub.publishing import CARD
from ..hub.repositories import is_local, reaching_hub
from ..modeling_codd import CoDDModel
from ..runtime.files import read_json
from ..runtime.report import as_json, environment, table
from .loop.steps import History
from .settings import STAGES, TrainConfig

HISTORY = "history.json"
"""The history of a stage, in its folder."""

OF_THIS_RUN = ("output_dir", "resume_from_checkpoint", "report_to", "push_to_hub", "hub_private")
CURVE_ROWS = 12
GAINS = (
    "Gains are nats per masked token over factorized prediction on the validation examples, which "
    "choices were made on; `gain 0.25-0.50` is of windows whose tokens were masked with a "
    "probability in that range."
)


@reaching_hub()
def open_repository(config: TrainConfig) -> str | None:
    """Creates the repository that a run will be pushed to: a refusal comes before the training.

    Returns:
        Its id; None if nothing is to be pushed.

    Raises:
        OSError: the Hub refuses, or cannot be reached.
        ValueError: the repository should be private, and is public.
    """
    if not config.push_to_hub:
        return None
    api = HfApi(library_name="codd-hf")
    name = config.hub_model_id or Path(config.output_dir).resolve().name
    repo_id = api.create_repo(name, private=config.hub_private or None, exist_ok=True).repo_id
    if config.hub_private and not api.model_info(repo_id).private:
        raise ValueError(
            f"`hub_private` is set, but the repository {repo_id!r} is public: make it private, or "
            "choose another `hub_model_id`."
        )
    return repo_id


def write_card(
    config: TrainConfig,
    folder: Path,
    model: CoDDModel,
    tokenizer: PreTrainedTokenizerBase,
    repo_id: str | None,
    sizes: dict[str, int],
    gap: list[dict[str, Any]] | None,
) -> None:
    """Writes `README.md` and `training/` (settings, histories, gap) into a pipeline folder.

    A card that somebody wrote, which lacks the mark of `hub.cards.REWRITTEN`, stays as it is.
    `sizes` are the numbers of training, validation and test examples.
    """
    settings = {k: v for k, v in asdict(config).items() if k not in OF_THIS_RUN}
    del settings["conditional"]["evidence_dir"]
    for name in ("dataset", "backbone"):
        if settings[name] is not None and is_local(settings[name]):
            settings[name] = Path(settings[name]).name
    facts = environment() | {"processes": PartialState().num_processes}
    run = {"environment": facts, "examples": sizes, "settings": settings}
    run["gap"] = gap
    paths = {stage: Path(config.output_dir, stage, HISTORY) for stage in STAGES}
    histories = {name: read_json(path, list) for name, path in paths.items() if path.exists()}
    (folder / "training").mkdir(parents=True, exist_ok=True)
    files = {f"{stage}_history": history for stage, history in histories.items()} | {"run": run}
    for name, content in files.items():
        (folder / "training" / f"{name}.json").write_text(as_json(content))
    path = folder / CARD
    if path.exists() and REWRITTEN not in path.read_text(encoding="utf-8"):
        return
    parts = [
        "Trained with `codd-hf train`; all settings, histories and figures are in `training/`.",
        _facts(config, settings, sizes, facts),
    ]
    for stage, history in histories.items():
        line = "Run earlier, with settings that are not recorded here."
        if stage in config.chosen_stages:
            line = f"Settings: {_listed('`{}` {}', settings[stage])}."
        parts += [f"### Stage: {stage}\n\n{line}", _curve(history)]
    if gap is not None:
        caution = "test" if sizes["test"] else "validation (which choices were made on)"
        parts.append(
            f"### Measured gap\n\nOne full window in each of at most {config.num_gap_problems} "
            f"{caution} examples, as `codd-hf evaluate gap` measures it: nats per masked token ± "
            "standard error in one parallel step, and of the backbone that reveals one token at a "
            f"time (sequential).\n\n{table(gap)}"
        )
    make_card(
        Artifact("pipeline", model.coupling_head, model.backbone, tokenizer, model.config),
        repo_id or folder.resolve().name,
        datasets=None if is_local(config.dataset) else config.dataset,
        training="\n\n".join(parts),
    ).save(path)


def _listed(form: str, values: dict[str, Any]) -> str:
    return ", ".join(form.format(name, value) for name, value in values.items())


def _facts(
    config: TrainConfig, settings: dict[str, Any], sizes: dict[str, int], facts: dict[str, Any]
) -> str:
    kind = "the local file" if is_local(config.dataset) else "the dataset"
    of = f"configuration `{config.dataset_config}`, " if config.dataset_config else ""
    numbers = ", ".join(f"{number:,} for {name}" for name, number in sizes.items() if number)
    packed = ", packed" if config.packing else ""
    backbone = "trained on the same data, from random weights"
    if config.backbone is not None:
        local = " (a local model)" if is_local(config.backbone) else ""
        further = ", trained further" if config.trains_backbone else ""
        backbone = f"`{settings['backbone']}`{local}{further}"
    return (
        f"- Data: {kind} `{settings['dataset']}`, {of}split `{config.split}`; {numbers}; at most "
        f"{config.max_length} tokens each{packed}.\n- Backbone: {backbone}.\n"
        f"- Machine and versions: {_listed('{} {}', facts)}."
    )


def _curve(history: History) -> str:
    """A history as a table in Markdown, of evenly spread rows if it is long."""
    names = [name for name in history[-1] if name not in ("seconds", "tokens")]
    last, number = len(history) - 1, min(len(history), CURVE_ROWS)
    rows = [history[round(i * last / max(number - 1, 1))] for i in range(number)]

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    def cell(value: float | None) -> str:
        return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"

    lines = [line([name.replace("_", " ") for name in names]), line(["---"] * len(names))]
    lines += [line([cell(row.get(name)) for name in names]) for row in rows]
    took = f"It took {history[-1].get('seconds', 0) / 60:.1f} minutes."
    return "\n\n".join(["\n".join(lines), *([GAINS] if "gain" in names else []), took])
