"""`save_pretrained` with a model card, and `push_to_hub`, for heads, models and pipelines.

The uploads are huggingface_hub's. The mixins of transformers and diffusers are not enough: both
write a placeholder over the card, and that of diffusers does not know revisions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, EvalResult, HfApi, ModelCard
from huggingface_hub.errors import (
    EntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .cards import Artifact, complete_card, make_card
from .repositories import is_local, reaching_hub

CARD = "README.md"
FACTS = ("license", "datasets", "eval_results", "tags")
ACCESS = ("private", "token")
UPLOAD = ("revision", "create_pr", "commit_message", "commit_description")
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
        facts = {key: kwargs.pop(key) for key in FACTS if key in kwargs}
        upload = {key: kwargs.pop(key) for key in (*ACCESS, *UPLOAD) if key in kwargs}
        super().save_pretrained(save_directory, *args, **kwargs)
        if not kwargs.get("is_main_process", args[0] if args else True):
            return
        if not (folder / CARD).exists():
            make_card(Artifact.of(self), repo_id, **facts).save(folder / CARD)
        if push_to_hub:
            self.push_to_hub(repo_id, **facts, **upload, **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        license: str | None = None,
        datasets: str | list[str] | None = None,
        eval_results: list[EvalResult] | None = None,
        tags: list[str] | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo:
        """Uploads to a repository, which is created if there is none, with a model card.

        A card that is there already keeps its text, and its metadata are completed. Paths of this
        machine, from which parts were loaded, are left out.

        Args:
            repo_id: the repository; without a namespace, one of the user's.
            license: an identifier of the Hub (https://hf.co/docs/hub/repositories-licenses).
            datasets: ids of the data sets that it was trained on, for the card.
            eval_results: measured results, for the card.
            tags: further tags for the card.
            private: whether a new repository is private.
            token: of the user; by default the one that `hf auth login` stored.
            **kwargs: `revision` (a branch, created if there is none), `create_pr`,
                `commit_message` and `commit_description`; and the arguments of `save_pretrained`.

        Returns:
            The commit (its `pr_url` with `create_pr`).

        Raises:
            ValueError: the Hub would refuse the card, or a converted circuit would become public
                without a licence.
            OSError: the Hub cannot be reached.
        """
        upload = {"commit_message": f"Upload {type(self).__name__}"}
        upload |= {key: kwargs.pop(key) for key in UPLOAD if key in kwargs}
        facts = {"license": license, "datasets": datasets, "eval_results": eval_results}
        return push(
            Artifact.of(self),
            lambda folder: self.save_pretrained(folder, **kwargs),
            repo_id,
            private=private,
            token=token,
            upload=upload,
            tags=tags,
            **facts,
        )


@reaching_hub()
def push(
    artifact: Artifact,
    save: Callable[[Path], None],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    upload: dict[str, Any] | None = None,
    **facts: Any,
) -> CommitInfo:
    """Uploads what `save` writes into a folder, with a model card; see `push_to_hub`."""
    api = HfApi(token=token, library_name="codd-hf")
    if "/" not in repo_id:
        repo_id = f"{api.whoami()['name']}/{repo_id}"
    # A repository that was there before may be public.
    public = not private or (api.repo_exists(repo_id) and not api.model_info(repo_id).private)
    if public and artifact.source is not None and facts.get("license") is None:
        raise ValueError(
            f"The circuit was converted from {artifact.source}: to make it public give its licence "
            "(`license=...`), or push with `private=True` to a private repository."
        )
    with TemporaryDirectory() as folder:
        make_card(artifact, repo_id, **facts).save(Path(folder) / CARD)
        save(Path(folder))
        forget_paths(Path(folder))
        return push_folder(Path(folder), repo_id, private=private, token=token, **(upload or {}))


@reaching_hub()
def push_folder(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    ignore_patterns: Sequence[str] = (),
    **upload: Any,
) -> CommitInfo:
    """Uploads a folder, with the model card in it.

    A card that somebody wrote in the repository keeps its text, and replaces the folder's.

    Args:
        folder: holds what `save_pretrained` has written.
        repo_id: the repository, with its namespace; created if there is none.
        private: whether a new repository is private.
        token: of the user.
        revision: the branch, created if there is none.
        ignore_patterns: files that stay here.
        **upload: for huggingface_hub's `upload_folder`.

    Raises:
        ValueError: the Hub would refuse the card.
        OSError: the Hub cannot be reached.
    """
    api = HfApi(token=token, library_name="codd-hf")
    card = ModelCard.load(folder / CARD)
    for where in dict.fromkeys((revision, None)):  # a new branch starts with the main one's card
        try:
            present = ModelCard.load(api.hf_hub_download(repo_id, CARD, revision=where))
        except RevisionNotFoundError:
            continue
        except (EntryNotFoundError, RepositoryNotFoundError):
            break
        card = complete_card(present, card)
        break
    card.validate()
    card.save(folder / CARD)
    repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    upload |= {"revision": revision, "ignore_patterns": [*ignore_patterns]}
    return api.upload_folder(repo_id=repo_id, folder_path=folder, **upload)


def forget_paths(folder: Path) -> None:
    """Takes out of saved configurations where on this machine parts were loaded from."""
    names = ("config", "model_index", "model/config", "adapter/adapter_config")
    for path in (folder / f"{name}.json" for name in names):
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        parts = [content, *(part for part in content.values() if isinstance(part, dict))]
        found = [(part, key) for part in parts for key in PATHS if part.get(key)]
        if local := [(part, key) for part, key in found if is_local(part[key])]:
            for part, key in local:
                del part[key]
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
