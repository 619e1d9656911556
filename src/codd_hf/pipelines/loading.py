"""From a folder or an id on the Hub to the components of a pipeline."""

from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..backbones import load_backbone, load_tokenizer, noise_of
from ..coupling.loading import OWN_ARGUMENTS
from ..decoding.choices import entries, settings_of
from ..hub.repositories import Repository, explain_load_errors, shared_arguments
from ..modeling_codd import CoDDModel
from ..schedulers.scheduling_codd import CoDDScheduler

COMPONENTS = ("model", "scheduler", "tokenizer")
OF_THE_MODEL = ("head", "adapter", "block_length", "logit_shift", *OWN_ARGUMENTS)


def load_components(name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The components of a pipeline, a CoDD model, a head or a bare backbone.

    Each is loaded by its own class. diffusers would import the modules that `model_index.json`
    names and run their code, and cannot download a pipeline whose classes are not its own.

    Raises:
        OSError: nothing is found, or nothing that a pipeline can be made of.
        ValueError: `model_index.json` names other classes than these.
    """
    kwargs = dict(kwargs)
    given = {part: kwargs.pop(part) for part in COMPONENTS if part in kwargs}
    repository = Repository(name, kwargs)
    with explain_load_errors(repository):
        is_pipeline = repository.find("model_index.json") is not None
        model_type = "codd" if is_pipeline else repository.config.get("model_type")
    if is_pipeline:
        given = _beside_model(repository, given)
    has_tokenizer = "tokenizer" in given
    if not has_tokenizer:
        given["tokenizer"] = _tokenizer_beside(repository)
    if "model" not in given and model_type in ("codd", "codd-head"):
        given["model"] = CoDDModel.from_pretrained(name, **kwargs).eval()
    elif "model" not in given:
        parts = {key: kwargs.pop(key) for key in OF_THE_MODEL if key in kwargs}
        backbone = load_backbone(name, **kwargs)
        tokens = _tokens_of_backbone(backbone.config, given["tokenizer"])
        parts = {**tokens, **shared_arguments(kwargs), **parts}
        given["model"] = CoDDModel.from_backbone(backbone, **parts)
    if not has_tokenizer and given["tokenizer"] is None and model_type == "codd-head":
        # After the model, which refuses a head that names what only the user may name; and without
        # the token of the repository that the user named.
        config = repository.config
        of_base = {**shared_arguments(kwargs), "revision": config.get("base_model_revision")}
        of_base.pop("token", None)
        base = Repository(config["base_model_name_or_path"], of_base)
        given["tokenizer"] = _tokenizer_beside(base)
    if "scheduler" not in given:
        own = entries(given["model"].generation_config)
        given["scheduler"] = CoDDScheduler(**settings_of(own))
    return given


def _beside_model(repository: Repository, given: dict[str, Any]) -> dict[str, Any]:
    """Scheduler and tokenizer of a pipeline whose `model_index.json` names our classes.

    Those that the user has `given` are not read.
    """
    path = repository.folder / "model_index.json"
    index = repository.read(path)
    for part, kind in (("model", CoDDModel), ("scheduler", CoDDScheduler)):
        wanted = [kind.__module__, kind.__name__]
        if index.get(part) != wanted:
            raise ValueError(
                f"`{part}` in {str(path)!r} must be {wanted}, got {index.get(part)!r:.100}: give "
                "the folder of a CoDD pipeline."
            )
    load: dict[str, Any] = {"scheduler": CoDDScheduler.from_pretrained}
    if index.get("tokenizer", [None, None]) != [None, None]:
        load["tokenizer"] = load_tokenizer
    found = {"tokenizer": None} | given
    for part in load.keys() - given.keys():
        stored = repository.inside(part)
        with explain_load_errors(stored):
            found[part] = load[part](stored.folder)
    return found


def _tokenizer_beside(repository: Repository) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside the weights, or None where there is none."""
    try:
        if repository.find("tokenizer_config.json") is None:
            return None
        tokenizer = load_tokenizer(repository.folder)
    except (OSError, ValueError):
        return None
    # Without files that it understands, transformers makes one of special tokens alone.
    return tokenizer if len(tokenizer) > len(set(tokenizer.all_special_ids)) else None


def _tokens_of_backbone(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, Any]:
    """The mask token and the forbidden tokens of a bare backbone, as its tokenizer has them."""
    if tokenizer is None:
        return {}
    mask_token_id = getattr(config, "mask_token_id", None)
    if mask_token_id is None and noise_of(config) == "mask":
        mask_token_id = tokenizer.mask_token_id
    forbidden = list(range(len(tokenizer), config.get_text_config().vocab_size))
    if tokenizer.pad_token_id not in (None, tokenizer.eos_token_id):
        forbidden = [tokenizer.pad_token_id, *forbidden]
    return {"mask_token_id": mask_token_id, "forbidden_token_ids": forbidden or None}
