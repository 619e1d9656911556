"""Tractable circuits over a window of tokens: potentials, evidence, recursions, distribution.

`circuits` knows only torch. The way of the data: `Potentials` and the backbone's logits make token
evidence (`evidence`), over which the chain recursions run (`chain`); `CoupledCategorical` puts them
behind the interface of `torch.distributions`; `em` fits a circuit to tokens.
"""

from .conditioning import Context, ContextMaps, Preceding
from .copies import CopyStates
from .distribution import CoupledCategorical, ViterbiPath
from .emissions import DenseEmission, TiedEmission, fit_tied
from .evidence import DenseEvidence
from .grouped import GroupedEvidence, TokenGroups, group_tokens
from .potentials import Potentials, occupancy, token_marginal
from .topk import TopKEvidence
from .transitions import StepTransitions

__all__ = [
    "Context",
    "ContextMaps",
    "CopyStates",
    "CoupledCategorical",
    "DenseEmission",
    "DenseEvidence",
    "GroupedEvidence",
    "Potentials",
    "Preceding",
    "StepTransitions",
    "TiedEmission",
    "TokenGroups",
    "TopKEvidence",
    "ViterbiPath",
    "fit_tied",
    "group_tokens",
    "occupancy",
    "token_marginal",
]
