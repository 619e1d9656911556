"""Exact recursions over a chain of latents: sums, samples and the best path."""
