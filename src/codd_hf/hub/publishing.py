"""`save_pretrained` with a model card, and `push_to_hub`, for heads, models and pipelines.

The mixins of transformers and diffusers write a placeholder over the card, and that of diffusers
does not know revisions.
"""

import itertools
import json
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError

from .cards import complete_card, head_of, make_card
from .repositories import is_local, reaching_hub

CARD = "README.md"
FACTS = ("license", "datasets", "eval_results", "tags")
ACCESS = ("private", "token", "revision", "create_pr")
PUSHED = (*FACTS, *ACCESS, "commit_message", "commit_description")
PATHS = ("_name_or_path", "base_model_name_or_path")


class Publishing:
    """`save_pretrained` and `push_to_hub`; comes before the class of transformers or diffusers."""

    def save_pretrained(
        self, save_directory: str | Path, *args: Any, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Saves as transformers or diffusers does, and a model card (`README.md`) if there is none.

        Args:
            save_directory: a folder, created if it does not exist.
            *args: as in transformers or diffusers.
            push_to_hub: also push to `repo_id`, or else to a repository of the folder's name.
            **kwargs: as in transformers or diffusers, and the keyword arguments of `push_to_hub`.
        """
        folder = Path(save_directory)
        repo_id = kwargs.pop("repo_id", folder.resolve().name)
        given = {key: kwargs.pop(key) for key in PUSHED if key in kwargs}
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if not kwargs.get("is_main_process", args[0] if args else True):
            return
        if not (folder / CARD).exists():
            facts = {key: given[key] for key in FACTS if key in given}
            make_card(self, repo_id, **facts).save(folder / CARD)
        if push_to_hub:
            self.push_to_hub(repo_id, **given, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> CommitInfo:
        """Uploads to a repository, which is created if there is none, with a model card.

        A card that is there already keeps its text, and its metadata are completed. Paths of this
        machine, from which parts were loaded, are left out.

        Args:
            repo_id: the repository; without a namespace, one of the user's.
            **kwargs: for the card `license` (an identifier of the Hub), `datasets` (ids of those
                that it was trained on), `eval_results` (of huggingface_hub) and `tags`; `private`
                for a new repository, and `token`; `revision` (a branch, created if there is none),
                `create_pr`, `commit_message` and `commit_description`; and the arguments of
                `save_pretrained`.

        Raises:
            ValueError: the Hub would refuse the card, or a converted circuit would become public
                without a licence.
            OSError: the Hub cannot be reached.
        """
        given = {key: kwargs.pop(key) for key in PUSHED if key in kwargs}
        given.setdefault("commit_message", f"Upload {type(self).__name__}")
        return push(self, partial(self.save_pretrained, **kwargs), repo_id, **given)


@reaching_hub()
def push(part: Any, save: Callable[[Path], None], repo_id: str, **given: Any) -> CommitInfo:
    """Uploads what `save` writes of a part into a folder; `given` as for `push_to_hub`."""
    facts = {key: given.pop(key) for key in FACTS if key in given}
    head, private, token = head_of(part), given.get("private"), given.get("token")
    source = None if head is None else head.config.converted_from
    api = HfApi(token=token, library_name="codd-hf")
    if "/" not in repo_id:
        repo_id = f"{api.whoami()['name']}/{repo_id}"
    # A repository that was there before may be public.
    public = not private or (api.repo_exists(repo_id) and not api.model_info(repo_id).private)
    if public and source is not None and facts.get("license") is None:
        raise ValueError(
            f"The circuit was converted from {source}: to make it public give its licence "
            "(`license=...`), or push with `private=True` to a private repository."
        )
    with TemporaryDirectory() as folder:
        make_card(part, repo_id, **facts).save(Path(folder) / CARD)
        save(Path(folder))
        forget_paths(Path(folder))
        return push_folder(Path(folder), repo_id, **given)


@reaching_hub()
def push_folder(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    **upload: Any,
) -> CommitInfo:
    """Uploads a folder that `save_pretrained` has written; `upload` is for `upload_folder`.

    A card that somebody wrote in the repository keeps its text.
    """
    api = HfApi(token=token, library_name="codd-hf")
    card = ModelCard.load(folder / CARD)
    card.validate()  # before there is a repository
    repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    with suppress(EntryNotFoundError):
        present = ModelCard.load(api.hf_hub_download(repo_id, CARD, revision=revision))
        complete_card(present, card).save(folder / CARD)
    return api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, **upload)


def forget_paths(folder: Path) -> None:
    """Takes out of saved configurations where on this machine parts were loaded from."""
    for name in ("config", "model_index", "model/config", "adapter/adapter_config"):
        path = folder / f"{name}.json"
        if not path.exists():
            continue
        content = json.loads(path.read_text(encoding="utf-8"))
        parts = [part for part in (content, *content.values()) if isinstance(part, dict)]
        for part, key in itertools.product(parts, PATHS):
            if part.get(key) and is_local(part[key]):
                del part[key]
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
