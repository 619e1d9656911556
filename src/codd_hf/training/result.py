"""The pipeline folder that a run ends with, its model card, and its place on the Hub."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from huggingface_hub import HfApi
from tqdm.auto import tqdm

from ..backbones import noise_of
from ..decoding.choices import entries, settings_of
from ..evaluation import GapSettings
from ..evaluation.gap import measure_gap
from ..hub.cards import REWRITTEN, make_card
from ..hub.publishing import CARD, push_folder
from ..hub.repositories import is_local, reaching_hub
from ..modeling_head import CoDDHead
from ..pipelines.pipeline_codd import CoDDPipeline
from ..runtime.files import read_json
from ..runtime.report import as_json, environment, listed, table
from ..schedulers.scheduling_codd import CoDDScheduler
from .inputs import Parts
from .settings import STAGES, TrainConfig

if TYPE_CHECKING:
    from .run import Run

HISTORY = "history.json"
"""The history of a stage, in its folder."""
OF_THIS_RUN = ("output_dir", "resume_from_checkpoint", "report_to", "push_to_hub", "hub_private")
CURVE_ROWS = 12
TRAINED = (
    "Trained with `codd-hf train`; all settings, histories and figures are in `training/`. A gain "
    "is of coupled over factorized prediction, in nats per masked token of the validation "
    "examples, which choices were made on; `gain_0.25-0.50` is of windows that were masked at a "
    "probability in that range."
)


@reaching_hub()
def open_repository(config: TrainConfig) -> str | None:
    """The repository that a run is pushed to, created before the training, which may be refused."""
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


def write_pipeline(run: Run, circuit: Path, folder: Path, repo_id: str | None) -> None:
    """Writes the pipeline, measures its gap for the card, and pushes it if it has a repository.

    The head of the generative fit, in the folder `circuit`, becomes `generative/`. Weights are
    stored in bfloat16, for models in float32.
    """
    config, model, tokenizer = run.config, run.model, run.start.tokenizer
    held_out = run.parts[2] or run.parts[1]
    problems, gap = held_out[: config.num_gap_problems], None
    if problems and model.coupling_head is not None:
        heads, ratios = {"coupled": model.coupling_head}, GapSettings(ratios=[0.25, 0.5, 0.75, 1])
        gap = measure_gap(model, heads, tokenizer, problems, ratios)
    noise: Any = {"noise": noise_of(model.config.text_config)}
    settings = noise | settings_of(entries(model.generation_config))
    pipeline = CoDDPipeline(model, CoDDScheduler(**settings), tokenizer)
    write_card(run, pipeline, folder, repo_id, gap)
    head = CoDDHead.from_pretrained(circuit)
    head.save_pretrained(folder / "generative", state_dict=in_bfloat16(head))
    (folder / "generative" / CARD).unlink()  # a pipeline has one card
    model.save_pretrained = partial(  # type: ignore[method-assign]  # which the pipeline calls
        model.save_pretrained, state_dict=in_bfloat16(model)
    )
    pipeline.save_pretrained(folder)
    save_held_out(folder, run.examples)
    if repo_id is not None:
        # The held-out examples are somebody's data, and stay on this machine.
        pushed = push_folder(
            folder, repo_id, ignore_patterns="*.jsonl", commit_message="Trained with codd-hf"
        )
        tqdm.write(f"The pipeline is on the Hub: {pushed.repo_url}")


def in_bfloat16(part: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A model's weights as they are stored; those that share memory are stored once."""
    weights = part.state_dict()
    copies = {t.data_ptr(): t.bfloat16() if t.is_floating_point() else t for t in weights.values()}
    return {name: copies[tensor.data_ptr()] for name, tensor in weights.items()}


def save_held_out(folder: Path, examples: Parts) -> None:
    """Writes `validation.jsonl` and, if there are any of it, `test.jsonl`."""
    for name, part in zip(("validation", "test"), examples[1:], strict=True):
        if not part:
            continue
        chat = any(example.history for example in part)
        rows = [
            {"messages": [*e.messages, {"role": "assistant", "content": e.answer}]}
            if chat
            else {"question": e.prompt, "answer": e.answer}
            for e in part
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_card(
    run: Run,
    pipeline: CoDDPipeline,
    folder: Path,
    repo_id: str | None,
    gap: list[dict[str, Any]] | None,
) -> None:
    """Writes `README.md` and `training/` (settings, histories, gap) into a pipeline folder.

    A card that somebody wrote, which lacks the mark of `hub.cards.REWRITTEN`, stays as it is.
    """
    config = run.config
    settings = {k: v for k, v in asdict(config).items() if k not in OF_THIS_RUN}
    for name in ("dataset", "backbone"):
        if settings[name] is not None and is_local(settings[name]):
            settings[name] = f"{Path(settings[name]).name} (local)"
    sizes = dict(zip(("training", "validation", "test"), map(len, run.examples), strict=True))
    machine = environment() | {"processes": PartialState().num_processes}
    general = listed({k: v for k, v in settings.items() if k not in STAGES})
    lines = [
        f"- Examples: {listed(sizes)}.",
        f"- Settings: {general}.",
        f"- Machine and versions: {listed(machine)}.",
    ]
    parts = [TRAINED, "\n".join(lines)]
    files = {"run": {"environment": machine, "examples": sizes, "settings": settings, "gap": gap}}
    for stage in config.chosen_stages:
        history = read_json(Path(config.output_dir, stage, HISTORY), list)
        files[f"{stage}_history"] = history
        picked = torch.linspace(0, len(history) - 1, min(len(history), CURVE_ROWS)).round().int()
        curve = table([{k: v for k, v in history[i].items() if k != "tokens"} for i in picked])
        parts += [f"### Stage: {stage}\n\nSettings: {listed(settings[stage])}.", curve]
    (folder / "training").mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / "training" / f"{name}.json").write_text(as_json(content))
    if gap is not None:
        caution = "test" if sizes["test"] else "validation (which choices were made on)"
        parts.append(
            f"### Measured gap\n\nOne full window in each of at most {config.num_gap_problems} "
            f"{caution} examples, as `codd-hf evaluate gap` measures it: nats per masked token ± "
            "standard error in one parallel step, and of the backbone that reveals one token at a "
            f"time (sequential).\n\n{table(gap)}"
        )
    path = folder / CARD
    if not path.exists() or REWRITTEN in path.read_text(encoding="utf-8"):
        make_card(
            pipeline,
            repo_id or folder.resolve().name,
            datasets=None if is_local(config.dataset) else config.dataset,
            training="\n\n".join(parts),
        ).save(path)
