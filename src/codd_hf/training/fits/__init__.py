"""One fit a file: pretraining, generative, conditional, joint."""
