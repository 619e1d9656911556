"""`save_pretrained` with a model card, and `push_to_hub`, for heads, models and pipelines.

The uploads are huggingface_hub's. The mixins of transformers and diffusers are not enough here:
both write a placeholder over the card that `save_pretrained` made, and that of diffusers does not
know revisions.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, EvalResult, HfApi, ModelCard
from huggingface_hub.errors import (
    EntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..checks.names import ADAPTER_FILES, is_local
from .cards import Artifact, complete_card, make_card
from .repositories import reaching_hub

CARD = "README.md"
FACTS = ("license", "datasets", "eval_results", "tags")
PATHS = ("_name_or_path", "base_model_name_or_path")
UPLOAD = ("commit_message", "commit_description", "private", "token", "revision", "create_pr")
BESIDE = ("adapter",)


class Publishing:
    """What the mixins of heads, models and pipelines share."""

    def _artifact(self) -> Artifact:
        """What a model card is to describe."""
        raise NotImplementedError

    @reaching_hub()
    def push_to_hub(
        self,
        repo_id: str,
        *,
        license: str | None = None,
        datasets: str | list[str] | None = None,
        eval_results: list[EvalResult] | None = None,
        tags: list[str] | None = None,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        **kwargs: Any,
    ) -> CommitInfo:
        """Uploads to a repository, which is created if there is none, with a model card.

        A card that is there already keeps its text; what its metadata lack is added. Where the
        parts were loaded from stays if it is an id on the Hub, and is left out if it is a path of
        this machine.

        Args:
            repo_id: the repository; without a namespace, one of the user's.
            license: an identifier of the Hub (https://hf.co/docs/hub/repositories-licenses).
            datasets: ids of the data sets that it was trained on, for the card.
            eval_results: measured results, for the card.
            tags: further tags for the card.
            commit_message: of the commit.
            commit_description: of the commit.
            private: whether a new repository is private.
            token: of the user; by default the one that `hf auth login` stored.
            revision: the branch, created if there is none.
            create_pr: open a pull request instead of committing to the branch.
            **kwargs: for `save_pretrained`.

        Returns:
            The commit (its `pr_url` with `create_pr`).

        Raises:
            ValueError: the Hub would refuse the card, or a converted circuit would become public
                without a licence.
        """
        artifact = self._artifact()
        _check_license(artifact, license, public=not private)
        api = HfApi(token=token, library_name="codd-hf")
        if "/" not in repo_id:
            repo_id = f"{api.whoami()['name']}/{repo_id}"
        card = make_card(
            artifact,
            repo_id,
            license=license,
            datasets=datasets,
            eval_results=eval_results,
            tags=tags,
            comes_with_code=_comes_with_code(self),
        )
        present = _card_of_repository(api, repo_id, revision)
        if present is not None:
            card = complete_card(present, card)
        card.validate()
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private:  # which a repository that was there before may not be
            _check_license(artifact, license, public=not api.model_info(repo_id).private)
        if revision is not None and not revision.startswith("refs/pr/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        with TemporaryDirectory() as folder:
            card.save(Path(folder) / CARD)
            self.save_pretrained(folder, **kwargs)
            _forget_paths(Path(folder))
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message or f"Upload {type(self).__name__}",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )

    def _write_card(self, folder: Path, options: dict[str, Any]) -> None:
        """Adds a card to a folder that has none."""
        if not (folder / CARD).exists():
            facts = {name: options[name] for name in FACTS if name in options}
            name = options.get("repo_id", folder.resolve().name)
            card = make_card(
                self._artifact(), name, comes_with_code=_comes_with_code(self), **facts
            )
            card.save(folder / CARD)


class WeightsPublishing(Publishing):
    """Mixin of heads and models; it comes before `PreTrainedModel`."""

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        *,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        variant: str | None = None,
        save_peft_format: bool = True,
        **kwargs: Any,
    ) -> None:
        """Saves weights and configuration, and a model card (`README.md`) if there is none.

        Args:
            save_directory: a folder, created if it does not exist.
            is_main_process: whether this process is the one that writes.
            push_to_hub: also push to `repo_id`, or else to a repository of the folder's name.
            max_shard_size: as in transformers.
            variant: as in transformers.
            save_peft_format: as in transformers.
            **kwargs: as in transformers, and the keyword arguments of `push_to_hub`: of them
                `license`, `datasets`, `eval_results` and `tags` go into a new card.
        """
        options = _take_options(kwargs)
        if not _comes_with_code(self) and hasattr(self.config, "auto_map"):
            del self.config.auto_map  # it names code beside the files that were loaded
        super().save_pretrained(
            save_directory,
            is_main_process,
            max_shard_size=max_shard_size,
            variant=variant,
            save_peft_format=save_peft_format,
            **kwargs,
        )
        if not is_main_process:
            return
        folder = Path(save_directory)
        self._write_card(folder, options)
        if push_to_hub:
            self.push_to_hub(
                options.pop("repo_id", folder.resolve().name),
                max_shard_size=max_shard_size,
                variant=variant,
                **options,
            )


class HeadPublishing(WeightsPublishing):
    """Mixin of [`CoDDHead`]."""

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        *,
        adapter: str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        """As for a model, with the LoRA that belongs to the head, if there is one.

        Args:
            save_directory: a folder, created if it does not exist.
            is_main_process: whether this process is the one that writes.
            adapter: folder of a PEFT LoRA of the backbone, which goes into `adapter/` (also of
                what `push_to_hub` uploads).
            **kwargs: as for a model.
        """
        if adapter is not None and is_main_process:
            beside = Path(save_directory, "adapter")
            beside.mkdir(parents=True, exist_ok=True)
            for file in ADAPTER_FILES if Path(adapter).resolve() != beside.resolve() else ():
                shutil.copy(Path(adapter, file), beside / file)
            if kwargs.get("push_to_hub"):
                kwargs["adapter"] = beside
        super().save_pretrained(save_directory, is_main_process, **kwargs)

    def _artifact(self) -> Artifact:
        return Artifact("head", head=self)


class ModelPublishing(WeightsPublishing):
    """Mixin of [`CoDDModel`]."""

    def _artifact(self) -> Artifact:
        return Artifact("model", self.coupling_head, self.backbone, config=self.config)


class PipelinePublishing(Publishing):
    """Mixin of [`CoDDPipeline`]; it comes before `DiffusionPipeline`."""

    def _artifact(self) -> Artifact:
        model = self.model
        return Artifact(
            "pipeline", model.coupling_head, model.backbone, self.tokenizer, model.config
        )

    def save_pretrained(
        self, save_directory: str | Path, *, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Saves all components, and a model card (`README.md`) if there is none.

        Args:
            save_directory: a folder, created if it does not exist.
            push_to_hub: also push to `repo_id`, or else to a repository of the folder's name.
            **kwargs: as in diffusers, and the keyword arguments of `push_to_hub`: of them
                `license`, `datasets`, `eval_results` and `tags` go into a new card.
        """
        options = _take_options(kwargs)
        folder = Path(save_directory)
        card_of_model = folder / "model" / CARD
        kept = card_of_model.exists()
        super().save_pretrained(save_directory, **kwargs)
        self.generation_config.save_pretrained(folder / "model")
        if not kept:
            card_of_model.unlink(missing_ok=True)  # a pipeline has one card, its own
        _forget_paths(folder)
        self._write_card(folder, options)
        if push_to_hub:
            repo_id = options.pop("repo_id", folder.resolve().name)
            self.push_to_hub(repo_id, **options, **kwargs)


@reaching_hub()
def push_folder(
    folder: Path,
    repo_id: str,
    *,
    private: bool = False,
    ignore_patterns: Sequence[str] = (),
    commit_message: str,
) -> CommitInfo:
    """Uploads a folder, with the model card in it, as it is.

    A card that somebody wrote in the repository keeps its text, and replaces the folder's.

    Args:
        folder: what `save_pretrained` has written.
        repo_id: the repository, with its namespace; created if there is none.
        private: whether a new repository is private.
        ignore_patterns: files that stay here.
        commit_message: of the commit.

    Raises:
        ValueError: the Hub would refuse the card.
    """
    api = HfApi(library_name="codd-hf")
    card = ModelCard.load(folder / CARD)
    present = _card_of_repository(api, repo_id, None)
    if present is not None:
        card = complete_card(present, card)
        card.save(folder / CARD)
    card.validate()
    api.create_repo(repo_id, private=private or None, exist_ok=True)
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        ignore_patterns=list(ignore_patterns),
        commit_message=commit_message,
    )


def _comes_with_code(part: Any) -> bool:
    """Whether it was loaded by `trust_remote_code`: transformers then saves its code with it."""
    return getattr(part, "_auto_class", None) is not None


def _card_of_repository(api: HfApi, repo_id: str, revision: str | None) -> ModelCard | None:
    """The card that is there already; a new branch starts with the main one's."""
    for where in dict.fromkeys((revision, None)):
        try:
            return ModelCard.load(api.hf_hub_download(repo_id, CARD, revision=where))
        except RevisionNotFoundError:
            continue
        except (EntryNotFoundError, RepositoryNotFoundError):
            break
    return None


def _forget_paths(folder: Path) -> None:
    """Takes out of what was saved where on this machine its parts were loaded from."""
    for name in ("config.json", "model_index.json", "adapter/adapter_config.json"):
        path = folder / name
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        paths = [k for k in PATHS if content.get(k) and is_local(content[k])]
        if paths:
            content |= dict.fromkeys(paths)
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _take_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    known = ("repo_id", *FACTS, *UPLOAD, *BESIDE)
    return {k: kwargs.pop(k) for k in known if k in kwargs}


def _check_license(artifact: Artifact, license: str | None, public: bool) -> None:
    if public and artifact.source is not None and license is None:
        raise ValueError(
            f"The circuit was converted from {artifact.source}: to make it public give its licence "
            "(`license=...`), or push with `private=True` to a private repository."
        )
