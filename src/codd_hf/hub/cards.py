"""Model cards: the known facts about a head, a model or a pipeline, and nothing else."""

from __future__ import annotations

import re
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .repositories import is_local

TAGS = ("codd", "coupled-discrete-diffusion", "diffusion-language-model", "probabilistic-circuit")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
FIELDS = ("num_latents", "window_length", "vocab_size", "emission", "conditioning", "alpha")
"""Of a head's configuration, in the card."""
REWRITTEN = (
    "<!-- `codd-hf train` wrote this card, and writes it anew when it has trained again: delete "
    "this line to keep your own text. -->"
)
TEMPLATE = """\
---
{{ card_data }}
---

# {{ title }}

{% if parts -%}
{{ kind }} with a small tractable circuit. As in
[Coupled Discrete Diffusion](https://arxiv.org/abs/2603.00045), the circuit multiplies the
predictions of the language model; the product is an exact joint distribution over a window of
tokens, so that tokens decoded in the same step agree with one another.

| | |
| --- | --- |
{%- for name, value in parts %}
| {{ name }} | {{ value }} |
{%- endfor %}
{%- else -%}
A diffusion language model in the format of codd-hf, without a circuit: tokens that are decoded in
the same step are drawn independently.
{%- endif %}

## Use

With the package codd-hf:

```python
{{ usage }}
```

## Where it comes from

- Backbone: {{ origin or unknown }}.
{%- if source %}
- The circuit was converted from {{ source }}.
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


def make_card(
    part: Any,
    repo_id: str,
    *,
    license: str | None = None,
    datasets: str | list[str] | None = None,
    eval_results: list[EvalResult] | None = None,
    tags: list[str] | None = None,
    training: str | None = None,
) -> ModelCard:
    """The card of a repository; the facts are those of `push_to_hub`.

    Args:
        part: a [`CoDDHead`], a [`CoDDModel`] or a [`CoDDPipeline`].
        repo_id: id or folder of the repository, for the title and the lines of code.
        license: an identifier of the Hub.
        datasets: ids of the data sets that it was trained on.
        eval_results: measured results.
        tags: further tags.
        training: a text on the training, in Markdown; the next training may replace the card.
    """
    model, title = getattr(part, "model", part), repo_id.split("/")[-1]
    head, backbone = getattr(model, "coupling_head", model), getattr(model, "backbone", None)
    names = [] if backbone is None else [backbone.config._name_or_path]
    parts, revision = {}, None
    if head is not None:
        names.insert(0, head.config.base_model_name_or_path)
        revision = head.config.base_model_revision
        parts["circuit"] = f"hidden Markov model of {head.num_parameters():,} parameters"
        parts |= {f"`{name}`": getattr(head.config, name) for name in FIELDS}
    ids = (name for name in names if name and HUB_ID.fullmatch(name) and not is_local(name))
    base = next(ids, None)
    origin = f"[{base}](https://huggingface.co/{base})" if base else None
    if origin and revision:
        origin += f", revision `{revision}`"
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
    if head is model and base is not None:
        data["base_model_relation"] = "adapter"
    results = (
        f"- {r.dataset_name}: {r.metric_name or r.metric_type} {r.metric_value}"
        for r in eval_results or ()
    )
    return ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        title=title,
        kind="A head" if head is model else "A diffusion language model",
        parts=parts.items(),
        usage=_usage(part, repo_id, has_base=base is not None or head is not model),
        origin=origin,
        source=source_of(part),
        data_sets=[datasets] if isinstance(datasets, str) else datasets or [],
        results="\n".join(results),
        training=training,
        unknown="not recorded" if training is None else "see below",
        rewritten=REWRITTEN,
    )


def source_of(part: Any) -> str | None:
    """The circuit that the head of a part was converted from, if it was."""
    model = getattr(part, "model", part)
    head = getattr(model, "coupling_head", model)
    return None if head is None else head.config.converted_from


def complete_card(card: ModelCard, new: ModelCard) -> ModelCard:
    """A card that somebody wrote, with its text kept and its metadata completed.

    Licence, data sets and results of `new` replace those that were there. `new` itself replaces a
    placeholder of transformers or diffusers, and the card of an earlier training that of a later.
    """
    # A placeholder has one line beyond huggingface_hub's template.
    blank = set(ModelCard.from_template(ModelCardData()).text.splitlines())
    own = [line for line in card.text.splitlines() if line not in blank]
    is_placeholder = len(own) == 1 and "model card has been automatically generated" in own[0]
    if is_placeholder or (REWRITTEN in card.text and REWRITTEN in new.text):
        return new
    for name in ("license", "datasets", "eval_results", "model_name"):
        card.data[name] = new.data.get(name, card.data.get(name))
    for name in ("library_name", "pipeline_tag", "base_model"):
        card.data[name] = card.data.get(name, new.data.get(name))
    tags = [*(card.data.get("tags") or []), *new.data["tags"]]
    card.data["tags"] = list(dict.fromkeys(tags))
    return card


def _usage(part: Any, repo_id: str, has_base: bool) -> str:
    """Lines of code that load the part."""
    if getattr(part, "tokenizer", None) is not None:
        return (
            "from codd_hf import CoDDPipeline\n\n"
            f'pipe = CoDDPipeline.from_pretrained("{repo_id}")\n'
            'output = pipe("Once upon a time", gen_length=32, num_inference_steps=8)\n'
            "print(output.texts[0])"
        )
    load = f'from_pretrained("{repo_id}")'
    if not has_base:
        load = f'from_backbone("id/of-the-backbone", head="{repo_id}")'
    return f"from codd_hf import CoDDModel\n\nmodel = CoDDModel.{load}"
