"""The steps of a fit, their checkpoints and trackers."""
