"""Tractable circuits over a window of tokens. `reference` says the method in plain code.

`circuits` knows only torch. The way of the data: `potentials` and the backbone's logits make token
`evidence`, over which the `recursions` run, with what its hidden states add (`context`);
`distribution` puts them behind the interface of `torch.distributions`; `em` fits a circuit.
"""

from .context.maps import Context, ContextMaps, CopyStates, Preceding
from .distribution.coupled import CoupledCategorical, ViterbiPath
from .em import fit_tied, occupancy, token_marginal
from .evidence.dense import DenseEvidence
from .evidence.lists import ListedEvidence
from .potentials.circuit import DenseEmission, Potentials, StepTransitions, TiedEmission
from .potentials.groups import TokenGroups

__all__ = [
    "Context",
    "ContextMaps",
    "CopyStates",
    "CoupledCategorical",
    "DenseEmission",
    "DenseEvidence",
    "ListedEvidence",
    "Potentials",
    "Preceding",
    "StepTransitions",
    "TiedEmission",
    "TokenGroups",
    "ViterbiPath",
    "fit_tied",
    "occupancy",
    "token_marginal",
]
