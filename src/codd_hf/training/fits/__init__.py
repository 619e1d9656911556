"""The fits of a run.

Each takes its settings, `checkpoints` (where it is kept and goes on from; nowhere if None) and a
`log` that is told of every step, learns from `train`, and is measured on `validation` with fixed
noise. It returns the history of the validation (`loop.steps.History`), and raises what
`loop.steps.run_steps` raises.
"""
