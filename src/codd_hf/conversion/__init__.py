"""From circuits that others saved to CoDD heads, without running anything that a file holds."""

from .convert import convert_jpc, holds_circuit
