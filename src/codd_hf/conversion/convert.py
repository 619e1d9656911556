"""From a PyJuice circuit, on disk or on the Hub, to a head and its repository."""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
)

from ..circuits import Potentials, occupancy
from ..configuration_codd import CoDDHeadConfig
from ..hub.repositories import Repository, can_only_be_a_path, explain_load_errors
from ..modeling_head import CoDDHead
from .jpc import HiddenMarkovModel

FILE_NAME = "model.jpc"
CODD = ("codd", "codd-head")
"""Model types of what is converted already."""
PICKLE = re.compile(rb"\x80[\x02-\x05]")
"""How a pickle of protocol 2 to 5 begins."""
RAREST = torch.finfo(torch.float32).tiny
"""Marginal of a token that a circuit never emits: its logarithm is finite."""


def convert_jpc(
    source: str | Path,
    *,
    output: str | Path | None = None,
    alpha: float = 0.0,
    mask_token_id: int | None = None,
    forbidden_token_ids: list[int] | None = None,
    base_model_name_or_path: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    subfolder: str | None = None,
    overwrite: bool = False,
) -> CoDDHead:
    """Makes a head of a hidden Markov model that PyJuice saved (`.jpc`, a pickle).

    Nothing in the file is run: see `codd_hf.conversion.unpickling`. The head holds the circuit's
    log-probabilities: `initial [H]`, `transition [H, H]` or `[L-1, H, H]`, `emission [H, V]` or
    `[L, H, V]`, as the circuit ties them. The file's arrays are read straight into the head: memory
    for the head and little more is enough (for two heads if the pickle is of protocol 2).

    Args:
        source: a `.jpc` file, a folder with `model.jpc`, or the id of such a repository on the Hub.
        output: a new or empty folder, in which the head's repository is written too:
            `config.json`, `model.safetensors` and a model card that says where the circuit comes
            from.
        alpha: power of the circuit's own token marginal by which its emissions are divided; 0
            leaves the circuit as it is, 1 removes the unigram law that a backbone already has.
        mask_token_id: the backbone's mask token.
        forbidden_token_ids: tokens that are never generated, beside the mask token.
        base_model_name_or_path: the backbone that the circuit belongs to.
        revision: branch, tag or commit of the repository on the Hub.
        token: for the Hub.
        cache_dir: of the Hub.
        local_files_only: take the file from the cache.
        force_download: even if the file is in the cache.
        subfolder: where in the folder or repository `model.jpc` is.
        overwrite: write into `output` though it has files; its model card is replaced as well.

    Raises:
        FileExistsError: `output` has files, or is one.
        ValueError: the file is no such circuit, is damaged, or asks for anything that none needs;
            or `alpha` or a token id is out of range.
        OSError: there is no such file, folder or repository.
    """
    if not 0 <= alpha < math.inf:
        raise ValueError(f"`alpha` must be 0 or a positive number, got {alpha}.")
    if output is not None:
        _check_output(Path(output), overwrite)
    found = _find(
        source,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        force_download=force_download,
        subfolder=subfolder,
    )
    with found.path.open("rb") as file:
        try:
            circuit = HiddenMarkovModel(file)
            config = CoDDHeadConfig(
                vocab_size=circuit.vocab_size,
                num_latents=circuit.num_latents,
                window_length=circuit.length,
                tie_transitions=circuit.tie_transitions,
                tie_emissions=circuit.tie_emissions,
                alpha=0.0,
                mask_token_id=mask_token_id,
                forbidden_token_ids=forbidden_token_ids,
                base_model_name_or_path=base_model_name_or_path,
            )
            head = CoDDHead(config).eval()
            _fill(head, circuit)
        except ValueError as error:
            reason = str(error).rstrip(".")
            raise ValueError(f"{found.name} cannot be converted: {reason}.") from error
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if alpha > 0:
        _correct(head, alpha)
    config.converted_from = (
        f"{found.name} (PyJuice; SHA-256 `{digest}`; licence of the source: unknown)"
    )
    if output is not None:
        (Path(output) / "README.md").unlink(missing_ok=True)  # only there with `overwrite`
        head.save_pretrained(output)
    return head


def holds_circuit(source: str | Path, **hub) -> bool:
    """Whether a file, folder or repository is a PyJuice circuit that has yet to be converted.

    A file is one if it is named `.jpc` or begins as a pickle does; a folder or repository, if it
    has `model.jpc` and is not a CoDD head, model or pipeline as well. The circuit of a repository
    on the Hub is downloaded (to the cache) to find out.

    Args:
        source: as for [`convert_jpc`].
        **hub: `revision`, `token`, `subfolder`, `cache_dir` and the like, as for [`convert_jpc`].
    """
    path, name = Path(source), str(source)
    if path.is_file():
        with path.open("rb") as file:
            return path.suffix == ".jpc" or PICKLE.match(file.read(2)) is not None
    repository = Repository(name, hub)
    try:
        repository.first("config.json", FILE_NAME)
    except LocalEntryNotFoundError:
        return False
    config = repository.find("config.json")
    if config is not None and repository.read(Path(config)).get("model_type") in CODD:
        return False
    return repository.find(FILE_NAME) is not None and repository.find("model_index.json") is None


def _check_output(output: Path, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"`output` {str(output)!r} is a file: give a folder.")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise FileExistsError(
            f"`output` {str(output)!r} is not empty: give a new folder, or pass `overwrite=True` "
            "(`--overwrite`)."
        )


@dataclass
class _Found:
    """A circuit's file, and its name for people (no path of this machine)."""

    path: Path
    name: str


def _find(source: str | Path, **hub) -> _Found:
    path = Path(source)
    if path.is_file():
        return _Found(path, f"`{path.name}`")
    if path.is_dir():
        path = path / (hub.get("subfolder") or "")
        if not (path / FILE_NAME).is_file():
            raise FileNotFoundError(
                f"The folder {str(source)!r} has no `{FILE_NAME}`: give the path of the circuit."
            )
        return _Found(path / FILE_NAME, f"`{FILE_NAME}` of `{path.resolve().name}`")
    if path.suffix == ".jpc" or can_only_be_a_path(str(source)):
        raise FileNotFoundError(
            f"{str(source)!r} is neither a file, nor a folder, nor an id on the Hub: check it."
        )
    try:
        with explain_load_errors(Repository(str(source), hub)):
            cached = Path(hf_hub_download(str(source), FILE_NAME, **hub))
    except OSError as error:
        if not isinstance(error.__cause__, RemoteEntryNotFoundError):
            raise
        raise FileNotFoundError(
            f"The repository {str(source)!r} has no `{FILE_NAME}`: it holds no circuit of PyJuice."
        ) from None
    return _Found(cached, f"`{FILE_NAME}` of {source} at commit `{cached.parent.name}`")


@torch.no_grad()
def _fill(head: CoDDHead, circuit: HiddenMarkovModel) -> None:
    """Writes a circuit's log-probabilities and its token marginal into a head, in place."""
    config = head.config
    states, vocab = config.num_latents, config.vocab_size
    initial = head.initial.detach()
    transition = head.transition.detach().view(-1, states, states)
    emission = head.emission.detach().view(-1, states, vocab)
    circuit.write_initial(initial)
    initial.log_()
    if circuit.length > 1:
        circuit.write_transitions(transition)
        transition.log_()
    circuit.write_emissions(emission)
    occupied = occupancy(Potentials(initial, transition, emission), circuit.length)
    if config.tie_emissions:
        head.token_marginal.copy_(occupied.mean(0) @ emission[0])
    else:
        for marginal, state, matrix in zip(head.token_marginal, occupied, emission, strict=True):
            torch.mv(matrix.T, state, out=marginal)
    head.token_marginal.div_(head.token_marginal.sum(-1, keepdim=True)).clamp_(min=RAREST)
    emission.log_()


@torch.no_grad()
def _correct(head: CoDDHead, alpha: float) -> None:
    """The marginal correction; a token that the circuit never emits gets the ratio 1."""
    emission = head.emission.view(-1, *head.emission.shape[-2:])
    marginals = head.token_marginal.view(-1, head.config.vocab_size)
    for matrix, marginal in zip(emission, marginals, strict=False):
        matrix[:, marginal <= RAREST] = math.log(RAREST)
    head.set_alpha(alpha)
