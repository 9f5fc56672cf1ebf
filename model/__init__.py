"""LLaMA-Adapter on zinit_kernels: load a LLaMA, train prompts and gates on it, generate. Run as `python -m
model.train` and so on.
"""
