"""The parameters of a circuit: how latents start, follow one another and emit tokens."""

from .circuit import Potentials, occupancy, token_marginal
from .emissions import DenseEmission, TiedEmission, fit_tied
from .transitions import StepTransitions

__all__ = [
    "DenseEmission",
    "Potentials",
    "StepTransitions",
    "TiedEmission",
    "fit_tied",
    "occupancy",
    "token_marginal",
]
