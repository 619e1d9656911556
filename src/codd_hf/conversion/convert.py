"""From a PyJuice circuit, on disk or on the Hub, to a head and its repository."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError

from ..checks.arguments import number
from ..circuits import Potentials, occupancy
from ..configuration_codd import CoDDHeadConfig
from ..hub.repositories import HUB_ARGUMENTS, Repository, checked_name, explain_load_errors
from ..modeling_head import CoDDHead
from .jpc import HiddenMarkovModel

FILE_NAME = "model.jpc"
CODD = ("codd", "codd-head")
"""Model types of what is converted already."""
PICKLES = (b"\x80\x04", b"\x80\x05")
"""How a pickle of protocol 4 or 5 begins."""
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
    overwrite: bool = False,
    **hub: Any,
) -> CoDDHead:
    """Makes a head of a hidden Markov model that PyJuice saved (`.jpc`, a pickle).

    Nothing in the file is run: see `codd_hf.conversion.pickles`. The head holds the circuit's
    log-probabilities: `initial [H]`, `transition [H, H]` or `[L-1, H, H]`, `emission [H, V]` or
    `[L, H, V]`, as the circuit ties them. The file's arrays are read straight into the head: memory
    for the head and little more is enough.

    Args:
        source: a `.jpc` file, a folder with `model.jpc`, or the id of such a repository on the Hub.
        output: a new or empty folder, in which the head's repository is written too, with a model
            card that says where the circuit comes from.
        alpha: power of the circuit's own token marginal by which its emissions are divided; 0
            leaves the circuit as it is, 1 removes the unigrams that a backbone already has.
        mask_token_id: the backbone's mask token.
        forbidden_token_ids: tokens that are never generated, beside the mask token.
        base_model_name_or_path: the backbone that the circuit belongs to.
        overwrite: write into `output` though it has files; its model card is replaced as well.
        **hub: where and how to download: `revision`, `token`, `cache_dir`, `local_files_only`,
            `force_download`, and `subfolder`, in which `model.jpc` is.

    Raises:
        FileExistsError: `output` has files, or is one.
        ValueError: the file is no such circuit, is damaged, or asks for anything that none needs;
            or `alpha` or a token id is out of range.
        OSError: there is no such file, folder or repository.
    """
    number("alpha", alpha, least=0)
    if output is not None:
        _check_output(Path(output), overwrite)
    path, name = _find(source, hub)
    with path.open("rb") as file:
        try:
            circuit = HiddenMarkovModel(file)
            head = CoDDHead(
                CoDDHeadConfig(
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
            ).eval()
            _fill(head, circuit)
        except ValueError as error:
            reason = str(error).rstrip(".")
            raise ValueError(f"{name} cannot be converted: {reason}.") from error
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if alpha > 0:
        _correct(head, alpha)
    head.config.converted_from = (
        f"{name} (PyJuice; SHA-256 `{digest}`; licence of the source: unknown)"
    )
    if output is not None:
        (Path(output) / "README.md").unlink(missing_ok=True)  # only there with `overwrite`
        head.save_pretrained(output)
    return head


def holds_circuit(source: str | Path, **hub: Any) -> bool:
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
            return path.suffix == ".jpc" or file.read(2) in PICKLES
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


def _find(source: str | Path, hub: dict[str, Any]) -> tuple[Path, str]:
    """A circuit's file, and its name for people (no path of this machine)."""
    if unknown := sorted(hub.keys() - set(HUB_ARGUMENTS)):
        raise TypeError(f"`{unknown[0]}` is not an argument of `convert_jpc`.")
    given = checked_name(source, "source")
    path, folder = Path(given), Path(given, hub.get("subfolder") or "")
    if path.is_file():
        return path, f"`{path.name}`"
    if not path.is_dir():
        with explain_load_errors(Repository(given, hub)):
            path = Path(hf_hub_download(given, FILE_NAME, **hub))
        return path, f"`{FILE_NAME}` of {source} at commit `{path.parent.name}`"
    if not (folder / FILE_NAME).is_file():
        raise FileNotFoundError(
            f"The folder {str(source)!r} has no `{FILE_NAME}`: give the path of the circuit."
        )
    return folder / FILE_NAME, f"`{FILE_NAME}` of `{folder.resolve().name}`"


@torch.no_grad()
def _fill(head: CoDDHead, circuit: HiddenMarkovModel) -> None:
    """Writes a circuit's log-probabilities and its token marginal into a head, in place."""
    config = head.config
    states, vocab = config.num_latents, config.vocab_size
    parts = (
        head.initial.detach(),
        head.transition.detach().view(-1, states, states),
        head.emission.detach().view(-1, states, vocab),
    )
    circuit.write(*parts)
    initial, transition, emission = parts
    initial.log_()
    if circuit.length > 1:
        transition.log_()
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
