"""Tractable circuits over a window of tokens: potentials, evidence, recursions, distribution.

`circuits` knows only torch. The way of the data: `Potentials` and the backbone's logits make token
evidence (`evidence`), over which the chain recursions run (`chain`); `CoupledCategorical` puts them
behind the interface of `torch.distributions`; `em` fits a circuit to tokens.
"""

from .distribution import CoupledCategorical, ViterbiPath
from .potentials import Potentials, token_marginal

__all__ = ["CoupledCategorical", "Potentials", "ViterbiPath", "token_marginal"]
