"""Schedulers: which tokens a denoising step commits, and what they are drawn from."""
