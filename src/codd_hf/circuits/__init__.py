"""Tractable circuits over a window of tokens. `reference` says the method in plain code.

`circuits` knows only torch. The way of the data: `potentials` and the backbone's logits make token
`evidence`, over which the `recursions` run, with what its hidden states add (`context`);
`distribution` puts them behind the interface of `torch.distributions`; `em` fits a circuit.
"""

from .context.maps import Context, ContextMaps, CopyStates, Preceding
from .distribution.coupled import CoupledCategorical, ViterbiPath, without_circuit
from .distribution.dependence import shared_information
from .distribution.latents import IncrementalPosterior
from .em import expected_counts, fit_tied, log_likelihood, maximise, occupancy, token_marginal
from .evidence.dense import DenseEvidence, forbidden_tokens, without_tokens
from .evidence.lists import ListedEvidence
from .potentials.circuit import (
    ONE_PRODUCT,
    DenseEmission,
    Emission,
    Potentials,
    StepTransitions,
    TiedEmission,
)
from .potentials.groups import TokenGroups
from .random import Generators, beside_global, draw_categorical, uniform
