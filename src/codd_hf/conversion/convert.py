"""From a PyJuice circuit, on disk or on the Hub, to a head and its repository."""

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checks.arguments import number
from ..checks.errors import reason
from ..circuits import occupancy
from ..configuration_codd import CoDDHeadConfig
from ..hub.repositories import Repository, checked_name
from ..modeling_head import CoDDHead
from .jpc import HiddenMarkovModel

FILE_NAME = "model.jpc"
CODD = ("codd", "codd-head")
"""Model types of what is converted already."""
RAREST = torch.finfo(torch.float32).tiny
"""Marginal of a token that a circuit never emits: its logarithm is finite."""


def convert_jpc(
    source: str | Path,
    *,
    alpha: float = 0.0,
    mask_token_id: int | None = None,
    forbidden_token_ids: list[int] | None = None,
    base_model_name_or_path: str | None = None,
    **hub: Any,
) -> CoDDHead:
    """Makes a head of a hidden Markov model that PyJuice saved (`.jpc`, a pickle).

    Nothing in the file is run: see `codd_hf.conversion.pickles`. The head holds the circuit's
    log-probabilities, tied as the circuit ties them; the card that it is saved with says where it
    comes from.

    Args:
        source: a `.jpc` file, a folder with `model.jpc`, or the id of such a repository on the Hub.
        alpha: power of the circuit's own token marginal by which its emissions are divided; 0
            leaves the circuit as it is, 1 removes the unigrams that a backbone already has.
        mask_token_id: as in [`CoDDHeadConfig`], and so the next two.
        forbidden_token_ids: further tokens that are never generated.
        base_model_name_or_path: the backbone that the circuit belongs to.
        **hub: where and how to download, as in transformers; `model.jpc` is in `subfolder`.

    Raises:
        ValueError: the file is no such circuit, is damaged, or asks for anything that none needs.
        OSError: there is no such file, folder or repository.
    """
    number("alpha", alpha, least=0)
    path, name = _find(source, hub)
    with path.open("rb") as file:
        try:
            circuit = HiddenMarkovModel(file)
        except Exception as error:  # what is damaged fails in many ways
            why = reason(error) if isinstance(error, ValueError) else f"damaged ({reason(error)})"
            raise ValueError(f"{name} cannot be converted: {why}.") from error
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    head = CoDDHead(
        CoDDHeadConfig(
            vocab_size=circuit.vocab_size,
            num_latents=circuit.num_latents,
            window_length=circuit.length,
            tie_transitions=len(circuit.transitions) < 2,
            tie_emissions=len(circuit.emissions) == 1,
            alpha=0.0,
            mask_token_id=mask_token_id,
            forbidden_token_ids=forbidden_token_ids,
            base_model_name_or_path=base_model_name_or_path,
        )
    ).eval()
    _fill(head, circuit, alpha)
    head.config.converted_from = (
        f"{name} (PyJuice; SHA-256 `{digest}`; licence of the source: unknown)"
    )
    return head


def holds_circuit(source: str | Path, **hub: Any) -> bool:
    """Whether a source is a circuit that has yet to be converted; arguments as in [`convert_jpc`].

    Any file is taken for one; a folder or repository is one if it has `model.jpc` and is not a CoDD
    head, model or pipeline as well.
    """
    repository = Repository(str(source), hub)
    if Path(source).is_file():
        return True
    config, index = repository.find("config.json"), repository.find("model_index.json")
    is_codd = config is not None and repository.read(config).get("model_type") in CODD
    return index is None and not is_codd and repository.fetch(FILE_NAME) is not None


def _find(source: str | Path, hub: dict[str, Any]) -> tuple[Path, str]:
    """A circuit's file, and its name for people (no path of this machine)."""
    repository = Repository(checked_name(source, "source"), hub)
    if unknown := sorted(hub.keys() - repository.hub.keys()):
        raise TypeError(f"`{unknown[0]}` is not an argument of `convert_jpc`.")
    path = Path(repository.name)
    if path.is_file():
        return path, f"`{path.name}`"
    found = repository.fetch(FILE_NAME)
    if found is None:
        raise FileNotFoundError(f"{str(source)!r} has no `{FILE_NAME}`: give a circuit's path.")
    where = f"`{found.resolve().parent.name}`"
    if not path.is_dir():
        where = f"{source} at commit `{found.parent.name}`"
    return found, f"`{FILE_NAME}` of {where}"


@torch.no_grad()
def _fill(head: CoDDHead, circuit: HiddenMarkovModel, alpha: float) -> None:
    """Writes a circuit's log-probabilities and its token marginal into a head, in place.

    The marginal correction of a token that the circuit never emits has the ratio 1.
    """
    states, vocab = circuit.num_latents, circuit.vocab_size
    emission = head.emission.view(-1, states, vocab)
    head.initial.copy_(torch.from_numpy(circuit.initial).log())
    for out, matrix in zip(
        head.transition.view(-1, states, states), circuit.transitions, strict=False
    ):
        out.copy_(torch.from_numpy(matrix).log())
    for out, matrix in zip(emission, circuit.emissions, strict=True):
        np.copyto(out.numpy(), matrix)
    occupied = occupancy(head.potentials, circuit.length)
    if head.config.tie_emissions:
        occupied = occupied.mean(0, keepdim=True)
    marginals: torch.Tensor = head.token_marginal.view(-1, vocab)  # type: ignore[operator]
    for marginal, state, matrix in zip(marginals, occupied, emission, strict=False):
        torch.mv(matrix.T, state, out=marginal)
    marginals.copy_(marginals[: len(occupied)].expand(len(marginals), vocab))
    marginals.div_(marginals.sum(-1, keepdim=True)).clamp_(min=RAREST)
    emission.log_()
    if alpha > 0:
        for matrix, marginal in zip(emission, marginals, strict=False):
            matrix[:, marginal <= RAREST] = math.log(RAREST)
        head.set_alpha(alpha)
