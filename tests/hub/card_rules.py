"""The Hub's rules for the metadata of a model card, as its documentation states them.

Source: https://huggingface.co/docs/hub/model-cards and the annotated specification
`modelcard.md` of huggingface/hub-docs. The lists of licences and tasks are excerpts.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

LICENSES = {
    "apache-2.0",
    "mit",
    "bsd-3-clause",
    "cc-by-4.0",
    "cc-by-sa-4.0",
    "cc-by-nc-4.0",
    "openrail",
    "gpl-3.0",
    "llama3",
    "unknown",
    "other",
}
TASKS = {"text-generation", "fill-mask", "text-classification"}
RELATIONS = {"adapter", "merge", "quantized", "finetune"}
ID = re.compile(r"(?:[\w.-]+/)?[\w.-]+")
STRINGS_OR_LISTS = ("base_model", "datasets", "tags", "metrics", "language")


def errors_in_card(content: str) -> list[str]:
    """What is wrong with the metadata of a card; an empty list if nothing is."""
    match = re.match(r"---\n(.*?)\n---(\n|$)", content, re.DOTALL)
    data = yaml.safe_load(match[1]) if match else None
    if not isinstance(data, dict):
        return ["the card must begin with a YAML block of metadata"]
    errors = []
    for name in STRINGS_OR_LISTS:
        values = data.get(name, [])
        values = [values] if isinstance(values, str) else values
        if not isinstance(values, list) or not all(isinstance(v, str) and v for v in values):
            errors.append(f'"{name}" must be a string or an array of strings')
        elif name in ("base_model", "datasets"):
            errors += [f'"{name}" {v!r} is not an id' for v in values if not ID.fullmatch(v)]
    for name, known in (
        ("license", LICENSES),
        ("pipeline_tag", TASKS),
        ("base_model_relation", RELATIONS),
    ):
        if name in data and data[name] not in known:
            errors.append(f'"{name}" must be one of {sorted(known)}, got {data[name]!r}')
    if data.get("license") == "other" and "license_name" not in data:
        errors.append('"license_name" is needed with license "other"')
    if "library_name" in data and not isinstance(data["library_name"], str):
        errors.append('"library_name" must be a string')
    return errors + _errors_in_results(data.get("model-index", []))


def _errors_in_results(index: Any) -> list[str]:
    errors = []
    for model in index:
        if not model.get("name"):
            errors.append('"model-index[].name" is missing')
        for result in model.get("results") or [{}]:
            for part, keys in (("task", ["type"]), ("dataset", ["type", "name"])):
                for key in keys:
                    if not result.get(part, {}).get(key):
                        errors.append(f'"model-index[].results[].{part}.{key}" is missing')
            for metric in result.get("metrics") or [{}]:
                if not metric.get("type") or metric.get("value") is None:
                    errors.append('"model-index[].results[].metrics[]" needs type and value')
    return errors
