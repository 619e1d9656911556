"""From a folder or an id on the Hub to the components of a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from ..modeling_codd import CoDDModel
from ..schedulers import CoDDScheduler

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision")
COMPONENTS = ("model", "scheduler", "tokenizer")


def load_components(
    name_or_path: str, kwargs: dict[str, Any]
) -> tuple[Path | None, dict[str, Any]]:
    """Loads the components of anything but a pipeline repository, and finds the folder of that.

    diffusers cannot download a pipeline whose components live in another package, so that it is
    given a folder.

    Args:
        name_or_path: a folder, or an id on the Hub.
        kwargs: the arguments of `from_pretrained`.

    Returns:
        The folder of a pipeline and no components, or no folder and `model`, `scheduler` and
        `tokenizer`.

    Raises:
        OSError: nothing is found, or nothing that a pipeline can be made of.
    """
    hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
    folder = Path(name_or_path)
    if folder.is_dir():
        if (folder / "model_index.json").is_file():
            return folder, {}
        if not (folder / "config.json").is_file():
            raise OSError(
                f"{name_or_path!r} holds neither `model_index.json` (a pipeline) nor `config.json` "
                "(a model, a head or a backbone): give the folder of one of these."
            )
    else:
        try:
            hf_hub_download(name_or_path, "model_index.json", **hub)
            patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
            return Path(snapshot_download(name_or_path, allow_patterns=patterns, **hub)), {}
        except (EntryNotFoundError, RepositoryNotFoundError):
            pass
        except HFValidationError:
            raise OSError(
                f"{name_or_path!r} is neither a folder nor an id on the Hub: check the path."
            ) from None

    kwargs = dict(kwargs)
    given = {name: kwargs.pop(name) for name in COMPONENTS if name in kwargs}
    try:
        config = PreTrainedConfig.get_config_dict(name_or_path, **hub)[0]
    except OSError as error:
        raise OSError(
            f"{name_or_path!r} is not a folder and could not be read from the Hub: check the name "
            "and the connection."
        ) from error
    model_type = config.get("model_type")

    with_tokenizer = "tokenizer" not in given
    if with_tokenizer:
        given["tokenizer"] = _load_tokenizer(name_or_path, hub)
    if "model" not in given:
        if model_type in ("codd", "codd-head"):
            given["model"] = CoDDModel.from_pretrained(name_or_path, **kwargs).eval()
        else:
            tokens = _tokens_of_backbone(config, given["tokenizer"])
            given["model"] = CoDDModel.from_backbone(name_or_path, **{**tokens, **kwargs})
    if with_tokenizer and given["tokenizer"] is None and model_type == "codd-head":
        # After the model, which refuses a downloaded head that names a local path; and without the
        # user's token and revision, which are for the repository that the user named.
        of_base = {name: hub[name] for name in ("cache_dir", "local_files_only") if name in hub}
        of_base["revision"] = config.get("base_model_revision")
        given["tokenizer"] = _load_tokenizer(config["base_model_name_or_path"], of_base)
    return None, {"scheduler": CoDDScheduler(), **given}


def _load_tokenizer(name_or_path: str, hub: dict[str, Any]) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside the weights, or None where there is none."""
    folder = Path(name_or_path)
    if folder.is_dir() and not (folder / "tokenizer_config.json").is_file():
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **hub)
    except (OSError, ValueError):
        return None
    # Without files that it understands, transformers makes one of special tokens alone.
    return tokenizer if len(tokenizer) > len(set(tokenizer.all_special_ids)) else None


def _tokens_of_backbone(
    config: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, Any]:
    """The mask token and the forbidden tokens of a bare backbone, as its tokenizer has them."""
    if tokenizer is None:
        return {}
    mask_token_id = config.get("mask_token_id")
    forbidden = list(range(len(tokenizer), config["vocab_size"]))
    if tokenizer.pad_token_id not in (None, tokenizer.eos_token_id):
        forbidden = [tokenizer.pad_token_id, *forbidden]
    return {
        "mask_token_id": tokenizer.mask_token_id if mask_token_id is None else mask_token_id,
        "forbidden_token_ids": forbidden or None,
    }
