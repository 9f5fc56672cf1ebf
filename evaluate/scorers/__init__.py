"""The benchmarks' scoring rules: pure functions from answers to figures, one benchmark a module.

They read no files, load no model and need no package, so they also serve answers that were collected elsewhere.
"""
