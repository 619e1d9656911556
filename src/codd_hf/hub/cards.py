"""Model cards that state what is known about a head, a model or a pipeline, and nothing else."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..checks.names import is_local

TAGS = ("codd", "coupled-discrete-diffusion", "diffusion-language-model", "probabilistic-circuit")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PAPER = "[Coupled Discrete Diffusion](https://arxiv.org/abs/2603.00045)"
WHAT = {
    "head": "A CoDD head: a small tractable circuit, for the diffusion language model that it was "
    "fitted to.",
    "model": "A diffusion language model with a small tractable circuit.",
    "pipeline": "A text-generation pipeline: a diffusion language model with a small tractable "
    "circuit, its scheduler and its tokenizer.",
}
FACTORIZED = (
    "A diffusion language model in the format of codd-hf, without a circuit: tokens that are "
    "decoded in the same step are drawn independently."
)
COUPLED = (
    f"As in {PAPER}, the circuit multiplies the predictions of the language model; the product is "
    "an exact joint distribution over a window of tokens, so that tokens decoded in the same step "
    "agree with one another."
)
REWRITTEN = (
    "<!-- `codd-hf train` wrote this card, and writes it anew when it has trained again: delete "
    "this line to keep your own text. -->"
)


@dataclass
class Artifact:
    """What a card is about.

    Attributes:
        kind: `"head"`, `"model"` or `"pipeline"`.
        head: the circuit; None for a model without one.
        backbone: None for a head.
        tokenizer: a pipeline's.
        config: a model's, which knows the tokens that no prompt may hold; default the head's.
    """

    kind: str
    head: PreTrainedModel | None
    backbone: PreTrainedModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    config: PreTrainedConfig | None = None

    @property
    def base_model(self) -> str | None:
        """The id of the backbone on the Hub, if it is known; a local path is none."""
        names = [] if self.head is None else [self.head.config.base_model_name_or_path]
        names += [] if self.backbone is None else [self.backbone.config._name_or_path]
        ids = (n for n in names if n and HUB_ID.fullmatch(n) and not is_local(n))
        return next(ids, None)

    @property
    def source(self) -> str | None:
        """What the head was converted from, if it was."""
        return None if self.head is None else self.head.config.converted_from


def make_card(
    artifact: Artifact,
    repo_id: str,
    *,
    license: str | None = None,
    datasets: str | list[str] | None = None,
    eval_results: list[EvalResult] | None = None,
    tags: list[str] | None = None,
    comes_with_code: bool = False,
    training: str | None = None,
) -> ModelCard:
    """The card of a repository.

    Args:
        artifact: what it holds.
        repo_id: its id or folder, for the title and the lines of code.
        license: an identifier of the Hub; without it the card states none.
        datasets: ids of the data sets that it was trained on, if they are to be named.
        eval_results: measured results, if there are any.
        tags: further tags.
        comes_with_code: whether the repository holds its own code.
        training: what is to be said of the training, in Markdown; the card is then marked as one
            that the next training may replace.
    """
    data = ModelCardData(
        license=license,
        base_model=artifact.base_model,
        datasets=datasets,
        eval_results=eval_results,
        model_name=repo_id.split("/")[-1] if eval_results else None,
        library_name="codd-hf",
        pipeline_tag="text-generation",
        tags=[*TAGS, *(tags or [])],
    )
    if artifact.kind == "head" and artifact.base_model is not None:
        data.base_model_relation = "adapter"
    parts = [f"# {repo_id.split('/')[-1]}"]
    parts.append(FACTORIZED if artifact.head is None else f"{WHAT[artifact.kind]} {COUPLED}")
    parts.append(
        f"## Use\n\nWith the package codd-hf:\n\n```python\n{_usage(artifact, repo_id)}```"
    )
    if comes_with_code:
        auto_class = "AutoModel" if artifact.kind == "head" else "AutoModelForCausalLM"
        parts.append(
            "Without it, by the code in this repository (which transformers runs only if asked "
            f"to):\n\n```python\nfrom transformers import {auto_class}\n\n"
            f'model = {auto_class}.from_pretrained("{repo_id}", trust_remote_code=True)\n```'
        )
    parts.append(f"## What it holds\n\n{_table(artifact)}")
    unknown = "not recorded" if training is None else "see below"
    parts.append(f"## Where it comes from\n\n{_origin(artifact, license, datasets, unknown)}")
    if eval_results:
        lines = [
            f"- {result.dataset_name}: {result.metric_name or result.metric_type} "
            f"{result.metric_value}"
            for result in eval_results
        ]
        parts.append("## Results\n\n" + "\n".join(lines))
    if training is not None:
        parts.append(f"## Training\n\n{training}\n\n{REWRITTEN}")
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def complete_card(card: ModelCard, new: ModelCard) -> ModelCard:
    """A card that somebody wrote, with its text kept and missing metadata filled in.

    What `new` says of licence, data sets and results was given by the user now, and replaces what
    was there. A placeholder that transformers or diffusers made is given up for `new`, and so is
    what a training wrote for what a later one says.
    """
    if _is_placeholder(card) or (REWRITTEN in card.text and REWRITTEN in new.text):
        return new
    for name in ("license", "datasets", "eval_results", "model_name"):
        if getattr(new.data, name) is not None:
            setattr(card.data, name, getattr(new.data, name))
    for name in ("library_name", "pipeline_tag", "base_model"):
        if getattr(card.data, name) is None:
            setattr(card.data, name, getattr(new.data, name))
    card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *new.data.tags]))
    return card


def _is_placeholder(card: ModelCard) -> bool:
    """Whether a card has no line beyond huggingface_hub's template and its one description."""
    blank = set(ModelCard.from_template(ModelCardData()).text.splitlines())
    own = [line for line in card.text.splitlines() if line not in blank]
    return len(own) == 1 and "model card has been automatically generated" in own[0]


def _usage(artifact: Artifact, repo_id: str) -> str:
    if artifact.kind == "pipeline" and artifact.tokenizer is not None:
        return (
            "from codd_hf import CoDDPipeline\n\n"
            f'pipe = CoDDPipeline.from_pretrained("{repo_id}")\n'
            'output = pipe("Once upon a time", gen_length=32, num_inference_steps=8)\n'
            "print(output.texts[0])\n"
        )
    if artifact.kind == "pipeline":
        load = f'pipe = CoDDPipeline.from_pretrained("{repo_id}")\nmodel = pipe.model\n'
        name = "CoDDPipeline"
    elif artifact.kind == "head" and artifact.base_model is None:
        load = f'model = CoDDModel.from_backbone("id/of-the-backbone", head="{repo_id}")\n'
        name = "CoDDModel"
    else:
        load = f'model = CoDDModel.from_pretrained("{repo_id}")\n'
        name = "CoDDModel"
    return (
        f"import torch\nfrom codd_hf import {name}\n\n{load}"
        f"prompt = torch.tensor([{_prompt(artifact)}])  # token ids, [batch, length]\n"
        "tokens = model.generate(prompt, gen_length=32, num_inference_steps=8)\n"
    )


def _prompt(artifact: Artifact) -> list[int]:
    """Three tokens that every prompt may hold."""
    config = artifact.config or artifact.head.config
    hidden = [config.mask_token_id, *(config.forbidden_token_ids or [])]
    return [token for token in range(config.vocab_size) if token not in hidden][:3]


def _table(artifact: Artifact) -> str:
    rows: list[tuple[str, Any]] = []
    if artifact.backbone is not None:
        rows.append(("backbone", f"`{artifact.backbone.config.model_type}`"))
        rows.append(("backbone's parameters", f"{_parameters(artifact.backbone):,}"))
    if artifact.head is not None:
        config = artifact.head.config
        emissions = "dense" if config.emission == "dense" else f"tied, rank {config.emission_rank}"
        rows += [
            ("circuit", "hidden Markov model"),
            ("latent states", f"{config.num_latents:,}"),
            ("window", f"{config.window_length} tokens"),
            ("vocabulary", f"{config.vocab_size:,} tokens"),
            ("transitions", _shared(config.tie_transitions)),
            ("emissions", f"{emissions}, {_shared(config.tie_emissions)}"),
            ("conditioning on the backbone", ", ".join(config.conditioning) or "none"),
            ("marginal correction (`alpha`)", f"{config.alpha:g}"),
            ("circuit's parameters", f"{_parameters(artifact.head):,}"),
        ]
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])


def _shared(tied: bool) -> str:
    return "the same at all positions" if tied else "one for each position"


def _parameters(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _origin(
    artifact: Artifact, license: str | None, datasets: str | list[str] | None, unknown: str
) -> str:
    lines = []
    if artifact.base_model is not None:
        link = f"[{artifact.base_model}](https://huggingface.co/{artifact.base_model})"
        revision = None if artifact.head is None else artifact.head.config.base_model_revision
        lines.append(f"- Backbone: {link}" + (f", revision `{revision}`." if revision else "."))
    else:
        lines.append(f"- Backbone: {unknown}.")
    if artifact.source is not None:
        lines.append(f"- The circuit was converted from {artifact.source}.")
    named = [datasets] if isinstance(datasets, str) else datasets
    lines.append(f"- Training data: {', '.join(named) if named else unknown}.")
    lines.append(f"- Licence: {license or 'not stated'}.")
    return "\n".join(lines)
