"""Model cards: the known facts about a head, a model or a pipeline, and nothing else."""

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

{% if head is not none -%}
{{ "A head" if alone else "A diffusion language model" }} with a small tractable circuit. As in
[Coupled Discrete Diffusion](https://arxiv.org/abs/2603.00045), the circuit multiplies the
predictions of the language model; the product is an exact joint distribution over a window of
tokens, so that tokens decoded in the same step agree with one another.

| | |
| --- | --- |
| circuit | hidden Markov model of {{ "{:,}".format(head.num_parameters()) }} parameters |
{%- for name in fields %}
| `{{ name }}` | {{ head.config[name] }} |
{%- endfor %}
{%- else -%}
A diffusion language model in the format of codd-hf, without a circuit: tokens that are decoded in
the same step are drawn independently.
{%- endif %}

## Use

With the package codd-hf:

```python
{% if tokenizer is not none -%}
from codd_hf import CoDDPipeline

pipe = CoDDPipeline.from_pretrained("{{ repo_id }}")
output = pipe("Once upon a time")
print(output.texts[0])
{%- else -%}
from codd_hf import CoDDModel

{% if alone and not base_model -%}
model = CoDDModel.from_backbone("id/of-the-backbone", head="{{ repo_id }}")
{%- else -%}
model = CoDDModel.from_pretrained("{{ repo_id }}")
{%- endif %}
{%- endif %}
```

## Where it comes from

{% set unknown = "see below" if training else "not recorded" -%}
- Backbone: {% if base_model -%}
[{{ base_model }}](https://huggingface.co/{{ base_model }})
{%- if revision %}, revision `{{ revision }}`{% endif %}
{%- else %}{{ unknown }}{% endif %}.
{%- if source %}
- The circuit was converted from {{ source }}.
{%- endif %}
- Training data: {{ ([datasets] if datasets is string else datasets) | join(", ") or unknown }}.
- Licence: {{ license or "not stated" }}.
{%- if results %}

## Results
{% for r in results %}
- {{ r.dataset_name }}: {{ r.metric_name or r.metric_type }} {{ r.metric_value }}
{%- endfor %}
{%- endif %}
{%- if training %}

## Training

{{ training }}

{{ rewritten }}
{%- endif %}
"""


def model_of(part: Any) -> Any:
    """The model of a pipeline; a model's or a head's is itself."""
    return part if hasattr(part, "coupling_head") else getattr(part, "model", part)


def head_of(part: Any) -> Any:
    """The head of a pipeline or a model, None if it has none; a head's is itself."""
    model = model_of(part)
    return getattr(model, "coupling_head", model)


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
    head, title = head_of(part), repo_id.split("/")[-1]
    alone, backbone = head is part, getattr(model_of(part), "backbone", None)
    names = [] if head is None else [head.config.base_model_name_or_path]
    names += [] if backbone is None else [backbone.config._name_or_path]
    ids = (name for name in names if name and HUB_ID.fullmatch(name) and not is_local(name))
    base = next(ids, None)
    data = ModelCardData(
        license=license,
        base_model=base,
        base_model_relation="adapter" if alone and base else None,
        datasets=datasets,
        eval_results=eval_results,
        model_name=title if eval_results else None,
        library_name="codd-hf",
        pipeline_tag="text-generation",
        tags=[*TAGS, *(tags or [])],
    )
    return ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        title=title,
        repo_id=repo_id,
        head=head,
        alone=alone,
        fields=FIELDS,
        tokenizer=getattr(part, "tokenizer", None),
        revision=None if head is None else head.config.base_model_revision,
        source=None if head is None else head.config.converted_from,
        results=eval_results,
        training=training,
        rewritten=REWRITTEN,
    )


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
