"""The coupled distribution over tokens, and what it is composed of."""

from .coupled import CoupledCategorical, ViterbiPath

__all__ = ["CoupledCategorical", "ViterbiPath"]
