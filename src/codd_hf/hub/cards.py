"""Model cards: the known facts about a head, a model or a pipeline, and nothing else."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .repositories import is_local

TAGS = ("codd", "coupled-discrete-diffusion", "diffusion-language-model", "probabilistic-circuit")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
REWRITTEN = (
    "<!-- `codd-hf train` wrote this card, and writes it anew when it has trained again: delete "
    "this line to keep your own text. -->"
)
TEMPLATE = """\
---
{{ card_data }}
---

# {{ title }}

{% if config is none -%}
A diffusion language model in the format of codd-hf, without a circuit: tokens that are decoded in
the same step are drawn independently.
{%- else -%}
{{ kind }}. As in [Coupled Discrete Diffusion](https://arxiv.org/abs/2603.00045), the circuit
multiplies the predictions of the language model; the product is an exact joint distribution over a
window of tokens, so that tokens decoded in the same step agree with one another.
{%- endif %}

## Use

With the package codd-hf:

```python
{{ usage }}
```

## What it holds

| | |
| --- | --- |
{%- for name, value in parts %}
| {{ name }} | {{ value }} |
{%- endfor %}

## Where it comes from

- Backbone: {{ origin or unknown }}.
{%- if config is not none and config.converted_from %}
- The circuit was converted from {{ config.converted_from }}.
{%- endif %}
- Training data: {{ data_sets | join(", ") or unknown }}.
- Licence: {{ license or "not stated" }}.
{%- if results %}

## Results

{{ results }}
{%- endif %}
{%- if training %}

## Training

{{ training }}

{{ rewritten }}
{%- endif %}
"""
FIELDS = (
    "num_latents",
    "window_length",
    "vocab_size",
    "tie_transitions",
    "tie_emissions",
    "emission",
    "conditioning",
    "alpha",
)
"""Of a head's configuration, in the card."""


@dataclass
class Artifact:
    """The subject of a card.

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

    @classmethod
    def of(cls, part: Any) -> Artifact:
        """Of a [`CoDDHead`], a [`CoDDModel`] or a [`CoDDPipeline`]."""
        model = getattr(part, "model", part)
        if not hasattr(model, "coupling_head"):
            return cls("head", part)
        kind = "model" if model is part else "pipeline"
        tokenizer = getattr(part, "tokenizer", None)
        return cls(kind, model.coupling_head, model.backbone, tokenizer, model.config)

    @property
    def base_model(self) -> str | None:
        """The id of the backbone on the Hub, if it is known; a local path is none."""
        names = [] if self.head is None else [self.head.config.base_model_name_or_path]
        names += [] if self.backbone is None else [self.backbone.config._name_or_path]
        ids = (n for n in names if n and HUB_ID.fullmatch(n) and not is_local(n))
        return next(ids, None)

    @property
    def source(self) -> str | None:
        """The circuit that the head was converted from, if it was."""
        return None if self.head is None else self.head.config.converted_from


def make_card(
    artifact: Artifact,
    repo_id: str,
    *,
    license: str | None = None,
    datasets: str | list[str] | None = None,
    eval_results: list[EvalResult] | None = None,
    tags: list[str] | None = None,
    training: str | None = None,
) -> ModelCard:
    """The card of a repository.

    Args:
        artifact: its subject.
        repo_id: id or folder of the repository, for the title and the lines of code.
        license: an identifier of the Hub.
        datasets: ids of the data sets that it was trained on.
        eval_results: measured results.
        tags: further tags.
        training: a text on the training, in Markdown; the next training may replace the card.
    """
    title, base = repo_id.split("/")[-1], artifact.base_model
    data = ModelCardData(
        license=license,
        base_model=base,
        datasets=datasets,
        eval_results=eval_results,
        model_name=title if eval_results else None,
        library_name="codd-hf",
        pipeline_tag="text-generation",
        tags=[*TAGS, *(tags or [])],
    )
    if artifact.kind == "head" and base is not None:
        data["base_model_relation"] = "adapter"
    config = None if artifact.head is None else artifact.head.config
    parts: list[tuple[str, Any]] = []
    if artifact.backbone is not None:
        parts.append(("backbone", f"`{artifact.backbone.config.model_type}`"))
        parts.append(("backbone's parameters", f"{artifact.backbone.num_parameters():,}"))
    if artifact.head is not None:
        parts.append(("circuit", "hidden Markov model"))
        parts.append(("circuit's parameters", f"{artifact.head.num_parameters():,}"))
        parts += [(f"`{name}`", getattr(config, name)) for name in FIELDS]
    kind = "A diffusion language model with a small tractable circuit"
    if artifact.kind == "head":
        kind = "A small tractable circuit, for the diffusion language model that it was fitted to"
    origin = None if base is None else f"[{base}](https://huggingface.co/{base})"
    if origin is not None and config is not None and config.base_model_revision:
        origin += f", revision `{config.base_model_revision}`"
    return ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        title=title,
        kind=kind,
        usage=_usage(artifact, repo_id),
        parts=parts,
        config=config,
        origin=origin,
        data_sets=[datasets] if isinstance(datasets, str) else datasets or [],
        results="\n".join(
            f"- {r.dataset_name}: {r.metric_name or r.metric_type} {r.metric_value}"
            for r in eval_results or ()
        ),
        training=training,
        unknown="not recorded" if training is None else "see below",
        rewritten=REWRITTEN,
    )


def complete_card(card: ModelCard, new: ModelCard) -> ModelCard:
    """A card that somebody wrote, with its text kept and its metadata completed.

    Licence, data sets and results of `new` replace those that were there. `new` itself replaces a
    placeholder of transformers or diffusers, and the card of an earlier training that of a later.
    """
    if _is_placeholder(card) or (REWRITTEN in card.text and REWRITTEN in new.text):
        return new
    for name in ("license", "datasets", "eval_results", "model_name"):
        if getattr(new.data, name) is not None:
            setattr(card.data, name, getattr(new.data, name))
    for name in ("library_name", "pipeline_tag", "base_model"):
        if getattr(card.data, name) is None:
            setattr(card.data, name, getattr(new.data, name))
    tags = [*(card.data.get("tags") or []), *new.data["tags"]]
    card.data["tags"] = list(dict.fromkeys(tags))
    return card


def _is_placeholder(card: ModelCard) -> bool:
    """Whether a card has no line beyond huggingface_hub's template and its one description."""
    blank = set(ModelCard.from_template(ModelCardData()).text.splitlines())
    own = [line for line in card.text.splitlines() if line not in blank]
    return len(own) == 1 and "model card has been automatically generated" in own[0]


def _usage(artifact: Artifact, repo_id: str) -> str:
    """Lines of code that load the artifact and run it."""
    if artifact.kind == "pipeline" and artifact.tokenizer is not None:
        return (
            "from codd_hf import CoDDPipeline\n\n"
            f'pipe = CoDDPipeline.from_pretrained("{repo_id}")\n'
            'output = pipe("Once upon a time", gen_length=32, num_inference_steps=8)\n'
            "print(output.texts[0])"
        )
    load = f'CoDDModel.from_pretrained("{repo_id}")'
    if artifact.kind == "head" and artifact.base_model is None:
        load = f'CoDDModel.from_backbone("id/of-the-backbone", head="{repo_id}")'
    config: Any = artifact.config
    if artifact.config is None and artifact.head is not None:
        config = artifact.head.config
    hidden = [config.mask_token_id, *(config.forbidden_token_ids or [])]
    prompt = [token for token in range(config.vocab_size) if token not in hidden][:3]
    return (
        f"import torch\nfrom codd_hf import CoDDModel\n\nmodel = {load}\n"
        f"prompt = torch.tensor([{prompt}])  # token ids, [batch, length]\n"
        "tokens = model.generate(prompt, gen_length=32, num_inference_steps=8)"
    )
