"""Evaluation: what coupling gains over factorized prediction, measured on held-out text."""
