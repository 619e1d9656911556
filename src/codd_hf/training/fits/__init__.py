"""The fits of a run: what is learnt from `train` is measured on `validation` with fixed noise.

Each takes `checkpoints`, where it is kept and goes on from, and a `log` that is told of every step;
it returns its history, and raises what `loop.Fit.run` raises.
"""
